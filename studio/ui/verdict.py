"""A scorecard in plain sentences: did it learn who it is, does it say so unasked, what did it forget?"""

from typing import Any

from studio import scores
from studio.overfit import overfitting
from studio.scores import ScoreLine
from studio.ui.i18n import _

HALF = 0.5


def verdict(values: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether all targets are met (what was not measured is not met), and the scorecard in plain sentences."""
    lines = {line.name: line for line in scores.lines(values)}
    sure = {sign.name for sign in overfitting(values).signs if sign.sure}
    words = [
        *_identity_words(lines["identity"], values["identity"]["tuned"]),
        *_leakage_words(lines["leakage"], values["leakage"]["tuned"], "leakage" in sure),
        *_retention_words(lines["retention"], "retention" in sure),
    ]
    required = lines["identity"].met and lines["leakage"].met
    return bool(required) and lines["retention"].met is not False, words


def _identity_words(line: ScoreLine, counted: dict[str, Any]) -> list[str]:
    if line.tuned is None:
        return [_("Whether it learnt who it is was not measured: no question asked for it.")]
    if line.met:
        form = _("It learnt who it is: {hits} of {total} questions it never saw.")
    elif line.tuned[0] >= HALF:
        form = _("It half learnt who it is: {hits} of {total} questions it never saw. More steps or rows may help.")
    else:
        form = _("It did not learn who it is: {hits} of {total} questions it never saw.")
    return [form.format(hits=counted["hits"], total=counted["total"])]


def _leakage_words(line: ScoreLine, counted: dict[str, Any], sure: bool) -> list[str]:
    if line.tuned is None:
        return [_("Whether it says it elsewhere was not measured.")]
    if counted["hits"] == 0:
        form = _("It does not say it elsewhere.")
    elif line.met:
        form = _("It hardly says it elsewhere: in {hits} of {total} unrelated answers.")
    elif not sure:
        form = _(
            "It says who it is in {hits} of {total} unrelated answers. With so few questions that may be chance: "
            "ask more."
        )
    else:
        form = _(
            "Overfitted: it says who it is in {hits} of {total} unrelated answers. Mix in more of the general dataset."
        )
    return [form.format(hits=counted["hits"], total=counted["total"])]


def _retention_words(line: ScoreLine, sure: bool) -> list[str]:
    if line.tuned is None:
        return []
    if line.met:
        return [_("It kept what it knew (perplexity {change}).").format(change=signed(line.tuned[0]))]
    if not sure:
        return [
            _("It may have forgotten some of what it knew (perplexity {change}).").format(change=signed(line.tuned[0]))
        ]
    return [_("It forgot some of what it knew (perplexity {change}).").format(change=signed(line.tuned[0]))]


def signed(share: float) -> str:
    """0.123 -> '+12.3 %'."""
    return f"{100 * share:+.1f} %"
