"""What happened to a run besides its numbers, in sentences: newest last, the same kind together when it repeats."""

from collections.abc import Sequence
from itertools import groupby

import streamlit as st

from studio.store.run_events import RunEvent
from studio.ui.i18n import _, ngettext
from studio.ui.widgets import plain

ICONS = {
    "bad_step": ":material/warning:",
    "save_put_off": ":material/disc_full:",
    "smaller_micro_batch": ":material/memory:",
    "early_stop": ":material/flag:",
    "rows_missing": ":material/warning:",
    "passed_over": ":material/warning:",
}
SHOWN_EVENTS = 6


def events_view(events: Sequence[RunEvent]) -> None:
    """Draw them; nothing for none."""
    if not events:
        return
    lines = [_line(list(group)) for _kind, group in groupby(events, key=lambda event: event.kind)]
    st.markdown(f"**{_('What happened')}**")
    for line in lines[-SHOWN_EVENTS:]:
        st.markdown(line)
    if len(lines) > SHOWN_EVENTS:
        with st.expander(_("Earlier")):
            for line in lines[:-SHOWN_EVENTS]:
                st.markdown(line)


def _line(group: Sequence[RunEvent]) -> str:
    icon = ICONS.get(group[0].kind, ":material/info:")
    return f"{icon} {plain(sentence(group))}"


def sentence(group: Sequence[RunEvent]) -> str:
    """Neighbouring events of one kind in one sentence."""
    event = group[-1]
    detail = event.detail
    match event.kind:
        case "bad_step":
            text = ngettext(
                "Step {steps} was not taken: no finite loss or gradient. The curve has a gap there.",
                "{n} steps were not taken ({steps}): no finite loss or gradient. The curve has gaps there.",
                len(group),
            )
            return text.format(n=len(group), steps=_steps(group))
        case "smaller_micro_batch":
            text = _("Out of memory at step {step}: micro-batches of {now} from there on, not {before}. Same result.")
            return text.format(step=event.step, now=detail.get("now"), before=detail.get("before"))
        case "save_put_off":
            text = _("Step {step} could not be saved at once; training went on. {reason}")
            return text.format(step=event.step, reason=detail.get("reason", ""))
        case "resumed":
            return _("Resumed from {file}.").format(file=detail.get("file", ""))
        case "weights_only":
            text = _(
                "Begun with the weights of {run} after step {step}. Optimizer, schedule and place in the data anew."
            )
            return text.format(run=detail.get("run", ""), step=detail.get("from_step", ""))
        case "passed_over":
            return _("A checkpoint was not used: {reason}").format(reason=detail.get("reason", ""))
        case "rows_missing":
            return _("Some numbers from before step {step} are missing in the database.").format(step=event.step)
        case "early_stop" if detail.get("reason") == "learnt":
            text = _("Stopped early: it answers {share} of the held-out identity questions, as was asked for.")
            return text.format(share=f"{detail['latest']:.0%}")
        case "early_stop" if detail.get("reason") == "forgot":
            text = _("Stopped early: its perplexity on what the base knew has grown by {growth}, of {allowed} allowed.")
            return text.format(growth=f"{detail['latest']:.0%}", allowed=f"{detail['allowed']:.0%}")
        case "early_stop":
            text = _("Stopped early: {waited} measurements in a row were no better than {value} at step {step}.")
            value = f"{detail.get('value') or 0:.4g}"
            return text.format(waited=detail.get("waited"), value=value, step=detail.get("best_step"))
        case _other:
            return event.kind.replace("_", " ")


def _steps(group: Sequence[RunEvent]) -> str:
    steps = [str(event.step) for event in group]
    return ", ".join(steps if len(steps) <= 8 else [*steps[:4], "…", *steps[-3:]])
