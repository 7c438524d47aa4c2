"""What happened to a run besides its numbers, in sentences, for pages and shell."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from studio.paths import human_bytes
from studio.store.run_events import RunEvent
from studio.ui.i18n import _, ngettext
from studio.ui.told import told


def together(events: Sequence[RunEvent]) -> Iterator[list[RunEvent]]:
    """Neighbours of one kind together: they make one sentence."""
    for _kind, group in groupby(events, key=lambda event: event.kind):
        yield list(group)


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
        case "computed_twice":
            text = _(
                "Gradient checkpointing is on, for memory: a step may take {without} otherwise, and {free} were free."
            )
            return text.format(without=human_bytes(detail["without"]), free=human_bytes(detail["budget"]))
        case "save_put_off":
            text = _("Step {step} could not be saved at once; training went on. {reason}")
            return text.format(step=event.step, reason=told(detail.get("reason", "")))
        case "resumed":
            return _("Resumed from {file}.").format(file=detail.get("file", ""))
        case "weights_only":
            text = _("Begun with the weights of {path}. Optimizer, schedule and place in the data anew.")
            return text.format(path="/".join(Path(detail.get("path", "")).parts[-2:]))
        case "passed_over":
            return " ".join(told(each.detail.get("reason", "")) for each in group)
        case "spread_anew":
            return _spread(detail)
        case "valid_not_finite":
            text = _("The validation loss of step {steps} was no finite number. The curve has a gap there.")
            return text.format(steps=_steps(group))
        case "rows_missing":
            return _("Some numbers from before step {step} are missing in the database.").format(step=event.step)
        case "early_stop" if detail.get("reason") == "learnt":
            text = _("Stopped early: it answers {share} of the held-out identity questions, as was asked for.")
            return text.format(share=f"{detail['latest']:.0%}")
        case "early_stop" if detail.get("reason") == "forgot":
            text = _("Stopped early: its perplexity on what the base knew has grown by {growth}, of {allowed} allowed.")
            return text.format(growth=f"{detail['latest']:.0%}", allowed=f"{detail['allowed']:.0%}")
        case "early_stop" if detail.get("value") is None:
            text = _("Stopped early: {waited} measurements in a row were no finite numbers.")
            return text.format(waited=detail.get("waited"))
        case "early_stop":
            text = _("Stopped early: {waited} measurements in a row were no better than {value} at step {step}.")
            return text.format(
                waited=detail.get("waited"), value=f"{detail['value']:.4g}", step=detail.get("best_step")
            )
        case _other:
            return event.kind.replace("_", " ")


def _spread(detail: Mapping[str, Any]) -> str:
    """A resume by another number of processes, or by such that share out their weights otherwise."""
    before, now = _processes(detail["before"]), _processes(detail["now"])
    if detail["whole"]:
        return _("Saved by {before}; {now} went on.").format(before=before, now=now)
    text = _("Saved by {before}; {now} went on with weights, schedule and place in the data, the optimizer anew.")
    return text.format(before=before, now=now)


def _processes(layout: Mapping[str, Any]) -> str:
    number, stage = layout["world"], layout["zero_stage"]
    words = ngettext("{n} process", "{n} processes", number).format(n=number)
    return words if stage is None else f"{words} (ZeRO-{stage})"


def _steps(group: Sequence[RunEvent]) -> str:
    steps = [str(event.step) for event in group]
    return ", ".join(steps if len(steps) <= 8 else [*steps[:4], "…", *steps[-3:]])
