"""A run held against the one that it reproduces: losses step by step, the weights it learned, scores in intervals."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sqlite_utils import Database

from studio import runs, suites
from studio.bundles.content import Expected, Interval, Numbers, Score, Scorecard, scores_of
from studio.bundles.reproducing import Difference, differences, expected_of
from studio.projects import Project
from studio.store import checkpoints, evaluations, metrics, open_db
from studio.store import jobs as store_jobs
from studio.store.evaluations import STANDARD, Evaluation

# Numbers that two equal runs share; those that measure time or memory are not among them.
COMPARED = ("train/loss", "train/grad_norm", "train/learning_rate", "valid/loss", "probe/identity", "probe/leakage")
LOSSES = ("train/loss", "valid/loss")


@dataclass(frozen=True)
class Line:
    """One thing compared, in words. `kind`: steps, numbers, weights or score.

    `verdict`: equal (to the last bit), close (a score in the other's interval), apart, or missing on this side.
    """

    kind: str
    what: str
    there: str
    here: str
    verdict: str
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """`sentences` say what it comes to; `differences` are those of the circumstances that both runs noted."""

    lines: tuple[Line, ...]
    differences: tuple[Difference, ...]
    sentences: tuple[str, ...]

    @property
    def is_exact(self) -> bool:
        """Whether everything that both have is equal to the last bit."""
        return all(line.verdict in ("equal", "missing") for line in self.lines)


@dataclass(frozen=True)
class Due:
    """A scorecard of the bundle that the second run has not got yet; `limit` probes of each group, 0 for all."""

    step: int
    limit: int
    suite: str = STANDARD


def scorecards_due(project: Project, run_id: str) -> list[Due]:
    """Scorecards to make before the scores can be compared; of steps whose checkpoint is here, by suites that are."""
    expected = expected_of(project, run_id)
    cards = expected.manifest.scorecards if expected else ()
    with open_db(project.folder) as db:
        made = _made(db, run_id, cards)
        kept = {checkpoint.step for checkpoint in checkpoints.listed(db, run_id)}
    known = suites.names(project)
    return [
        Due(card.step, card.limit, card.suite)
        for card in cards
        if card.step in kept and card.suite in known and (card.suite, card.step) not in made
    ]


def _made(db: Database, run_id: str, cards: Iterable[Scorecard]) -> dict[tuple[str, int], Evaluation]:
    """The run's own scorecards by (suite, step), of the suites that the bundle's are by."""
    asked = {card.suite for card in cards}
    return {(suite, each.step): each for suite in asked for each in evaluations.of_run(db, run_id, suite)}


def compare(project: Project, run_id: str) -> Comparison | None:
    """The run beside the one it reproduces, as far as it is; None for a run that reproduces nothing."""
    expected = expected_of(project, run_id)
    if expected is None:
        return None
    run = runs.get_run(project, run_id)
    with open_db(project.folder) as db:
        numbers = {name: [(p.step, p.value) for p in metrics.series(db, run_id, name)] for name in COMPARED}
        cards = _made(db, run_id, expected.manifest.scorecards)
        learned = store_jobs.get(db, run.job_id).result.get("weights_sha256", "") if run.job_id else ""
    there = expected.manifest
    lines = [
        Line("steps", "steps", str(there.run.step), str(run.step), "equal" if there.run.step == run.step else "apart"),
        *_number_lines(expected.metrics, numbers),
        *_weights(there.run.learned_sha256, learned if run.step == there.run.step else ""),
        *(line for card in there.scorecards for line in _score_lines(card, cards.get((card.suite, card.step)))),
    ]
    began = run.detail.get("began", [])
    parted = tuple(differences(there.circumstances, began[-1]["circumstances"])) if began else ()
    return Comparison(tuple(lines), parted, tuple(_sentences(lines, parted, expected)))


def _number_lines(there: Numbers, here: Numbers) -> Iterator[Line]:
    for name in COMPARED:
        if name not in there:
            continue
        before, after = dict(there[name]), dict(here[name])
        both = sorted(before.keys() & after.keys())
        if not both:
            yield Line("numbers", name, f"{len(before)} values", "none yet", "missing")
            continue
        unequal = [step for step in both if before[step] != after[step]]
        last = both[-1]
        note = _largest(before, after, unequal) if unequal else f"all {len(both)} values equal to the last bit"
        yield Line("numbers", name, _shown(before[last]), _shown(after[last]), "apart" if unequal else "equal", note)


def _largest(before: dict[int, float | None], after: dict[int, float | None], unequal: Sequence[int]) -> str:
    """'first unequal at step 3; at most 0.0012 apart (0.05 %), at step 9'."""
    first = f"first unequal at step {unequal[0]}"
    both = [(abs(a - b), abs(a - b) / max(abs(b), 1e-12), step) for step in unequal
            if (b := before[step]) is not None and (a := after[step]) is not None]  # fmt: skip
    if not both:
        return first
    apart, share, step = max(both)
    return f"{first}; at most {apart:.2g} apart ({share:.2%}), at step {step}"


def _weights(there: str, here: str) -> Iterator[Line]:
    if there:
        verdict = "missing" if not here else "equal" if there == here else "apart"
        yield Line("weights", "weights after the last step", there[:12], here[:12] or "not known yet", verdict)


def _score_lines(card: Scorecard, made: Evaluation | None) -> Iterator[Line]:
    """Each score of the tuned model. Close: the value lies in the other's 95 % interval."""
    after = {each.name: each.tuned for each in scores_of(made)} if made else {}
    by = "" if card.suite == STANDARD else f"{card.suite}: "
    for score in card.scores:
        if score.tuned is None:
            continue
        what, value = f"{by}{score.name} at step {card.step}", after.get(score.name)
        if value is None:
            yield Line("score", what, _interval(score.tuned), "not scored", "missing")
        else:
            yield Line("score", what, _interval(score.tuned), _interval(value), _score_verdict(score, value))


def _score_verdict(score: Score, value: Interval) -> str:
    if score.tuned is None or tuple(value) == tuple(score.tuned):
        return "equal"
    return "close" if score.tuned[1] <= value[0] <= score.tuned[2] else "apart"


def _sentences(lines: Sequence[Line], parted: Sequence[Difference], expected: Expected) -> Iterator[str]:
    """What the lines come to, no more than they say."""
    seen = [line for line in lines if line.verdict != "missing"]
    unequal = [line for line in seen if line.verdict != "equal"]
    if unequal:
        yield from _how_far(seen, unequal)
        yield _why(parted, expected)
    else:
        yield f"Reproduced to the last bit: all {len(seen)} lines that can be compared are equal."
    if len(seen) < len(lines):
        yield f"Not compared yet: {len(lines) - len(seen)} of {len(lines)} lines."


def _how_far(seen: Sequence[Line], unequal: Sequence[Line]) -> Iterator[str]:
    losses = [line for line in seen if line.what in LOSSES]
    if parted := next((line for line in losses if line.verdict != "equal"), None):
        yield f"The losses are not equal to the last bit: {parted.note}."
    elif losses:
        yield "The losses are bit-equal."
    scored = [line for line in seen if line.kind == "score"]
    if outside := [line.what for line in scored if line.verdict == "apart"]:
        yield f"Outside the bundle's 95 % interval: {', '.join(outside)}."
    elif scored:
        yield "Every score lies in the bundle's 95 % interval."


def _why(parted: Sequence[Difference], expected: Expected) -> str:
    there = expected.manifest
    if parted:
        named = ", ".join(f"{each.what} {each.there} → {each.here}" for each in parted[:4])
        return f"The circumstances differ: {named}{', …' if len(parted) > 4 else ''}."
    if not there.is_uniform:
        return "The bundled run went on under other circumstances than it began with."
    if (there.circumstances.get("device"), there.circumstances.get("dtype")) == ("cpu", "float32"):
        return "The circumstances are the same, so something that they do not name has changed the numbers."
    return "The circumstances are the same; on this device, in this number format, equal bits are not promised."


def _shown(value: float | None) -> str:
    return "no number" if value is None else f"{value:.6g}"


def _interval(value: Interval) -> str:
    return f"{value[0]:.1%} [{value[1]:.1%}, {value[2]:.1%}]"
