"""Small pieces that every page shows the same way: untrusted text, errors, states as words, progress of a job."""

import re
import time
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import streamlit as st

from studio import jobs
from studio.errors import ConfigError, Problem, StudioError
from studio.paths import as_studio_error
from studio.store.jobs import Job
from studio.ui import state
from studio.ui.i18n import N_, _, ngettext
from studio.ui.told import told

MARKDOWN_SIGNS = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|$~^=&@\"'])")
# Streamlit finds :emoji:, :material/icons:, :colours[…], bare links, mail addresses and arrows (-> becomes one sign)
# after escapes are resolved, so a backslash does not stop them. A word joiner, which has no width, does.
JOINER = "\u2060"
FOUND_LATER = re.compile(r"(?<=[:@])|(?<=www)(?=\.)|(?<=[<>~-])(?=[->=])")
HIDDEN = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)])  # marks that reorder the text around them
STATE_WORDS = {
    "queued": N_("queued"),
    "running": N_("running"),
    "stopping": N_("stopping"),
    "finished": N_("finished"),
    "stopped": N_("stopped"),
    "failed": N_("failed"),
    "lost": N_("lost"),
}
STATE_ICONS = {
    "queued": ":material/schedule:",
    "running": ":material/play_circle:",
    "stopping": ":material/pause_circle:",
    "finished": ":material/check_circle:",
    "stopped": ":material/stop_circle:",
    "failed": ":material/error:",
    "lost": ":material/help:",
}
KIND_WORDS = {
    "fetch": N_("Getting the model"),
    "import": N_("Importing"),
    "tokenize": N_("Tokenising"),
    "check": N_("Checking the rows"),
    "report": N_("Counting the rows"),
    "distill": N_("Asking the base model"),
    "measure": N_("Measuring a step"),
    "train": N_("Training"),
    "convert": N_("Converting"),
    "merge": N_("Merging"),
    "export": N_("Exporting"),
    "push": N_("Uploading"),
    "ollama": N_("Creating it in Ollama"),
    "smoke": N_("Asking another tool"),
    "evaluate": N_("Scoring"),
    "lm_eval": N_("Asking lm-eval tasks"),
    "import_checkpoint": N_("Bringing in a checkpoint"),
    "serve": N_("Model server"),
}


def plain(text: object) -> str:
    """Text from outside (names, cells, model output) as Markdown that shows it letter by letter."""
    parted = FOUND_LATER.sub(JOINER, str(text).translate(HIDDEN))
    escaped = MARKDOWN_SIGNS.sub(r"\\\1", parted)
    lines = [re.sub(r"^[ \t]+", lambda match: "\u00a0" * len(match[0]), line) for line in escaped.splitlines()]
    return "  \n".join(lines)


@contextmanager
def guarded() -> Iterator[None]:
    """The edge of a page: what a person can mend is shown, with what to do next, and the page goes on."""
    try:
        yield
    except StudioError as error:
        show_error(error)
    except OSError as error:
        traceback.print_exception(error)  # the page shows a sentence; the server's log keeps where it came from
        show_error(as_studio_error(error))


def show_error(error: StudioError) -> None:
    if isinstance(error, ConfigError):
        show_problems(error.problems)
        return
    hint = f"  \n{plain(told(error.hint))}" if error.hint else ""
    st.error(plain(told(error.message)) + hint, icon=":material/error:")


def show_problems(problems: list[Problem]) -> None:
    """All problems of a config, each with its path and what is allowed."""
    count = ngettext("{number} setting needs attention:", "{number} settings need attention:", len(problems))
    lines = [f"- **{plain(problem.path)}** {plain(told(problem.message))}{_allowed(problem)}" for problem in problems]
    st.error("\n".join([count.format(number=len(problems)), "", *lines]), icon=":material/error:")


def _allowed(problem: Problem) -> str:
    return f" ({_('allowed')}: {plain(problem.allowed)})" if problem.allowed else ""


def tab_picker(tabs: Mapping[str, tuple[str, Any]], key: str, inputs: Collection[str] = ()) -> str:
    """Tabs of which only the chosen one runs; the choice is in the address and outlives the page.

    What was put into widgets whose keys begin with one of `inputs` stays while their tab is not drawn.
    """
    state.hold(inputs)
    asked, before = st.query_params.get("tab"), st.session_state.get(f"{key}.last")
    name = next((each for each in (asked, before) if each in tabs), next(iter(tabs)))
    st.session_state[key] = st.session_state[f"{key}.last"] = name
    st.segmented_control(
        _("Part of the page"), list(tabs), required=True, format_func=lambda each: tabs[each][0], key=key,
        label_visibility="collapsed", on_change=lambda: st.query_params.update(tab=st.session_state[key]),
    )  # fmt: skip
    return name


def state_word(state: str) -> str:
    """'running' in the reader's language."""
    return _(STATE_WORDS[state]) if state in STATE_WORDS else state


def state_label(state: str) -> str:
    """Icon and word, for Markdown: a state is never told by colour alone."""
    return f"{STATE_ICONS.get(state, '')} {state_word(state)}".strip()


def kind_word(kind: str) -> str:
    return _(KIND_WORDS[kind]) if kind in KIND_WORDS else kind


def phase_word(job: Job) -> str:
    """What it is doing now, in the reader's language; some phases have a name or a number in them."""
    return plain(told(_(job.phase)))


def progress_text(job: Job) -> str:
    """'step 12 / 60 · 1 min 20 s left', as far as the job tells."""
    parts = [phase_word(job) if job.state in ("queued", "running") and job.phase else state_word(job.state)]
    if job.total and job.state != "queued":
        parts.append(f"{job.current} / {job.total} {plain(_(job.unit))}".strip())
    if left := seconds_left(job):
        parts.append(_("{time} left").format(time=duration(left)))
    return " · ".join(parts)


def show_progress(job: Job) -> None:
    """The bar of a live job."""
    st.progress(min(1.0, job.current / job.total) if job.total else 0.0, text=progress_text(job))


def seconds_left(job: Job) -> float:
    """From how fast the present phase went since this session first saw it; 0 when that is not known yet."""
    if job.state != "running" or not job.total or job.current >= job.total:
        return 0.0
    seen: dict[tuple[str, str], tuple[float, int]] = st.session_state.setdefault("studio.progress_seen", {})
    since, first = seen.setdefault((job.id, job.phase), (time.monotonic(), job.current))
    done = job.current - first
    return (time.monotonic() - since) / done * (job.total - job.current) if done > 0 else 0.0


def duration(seconds: float) -> str:
    """75 -> '1 min 15 s'."""
    whole = max(1, round(seconds))
    if whole < 60:
        return _("{seconds} s").format(seconds=whole)
    if whole < 3600:
        return _("{minutes} min {seconds} s").format(minutes=whole // 60, seconds=whole % 60)
    return _("{hours} h {minutes} min").format(hours=whole // 3600, minutes=whole % 3600 // 60)


def ago(at: str) -> str:
    """How long ago an ISO time was, in words."""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds()
    if seconds < 60:
        return _("just now")
    if seconds < 3600:
        return _("{number} min ago").format(number=int(seconds // 60))
    if seconds < 86400:
        return _("{number} h ago").format(number=int(seconds // 3600))
    return at[:10]


def stop_button(folder: Path, job: Job, key: str) -> None:
    """Stops a job after saving; once it is stopping, the second press ends its process at once."""
    if job.state == "stopping":
        st.button(
            _("Kill"), key=f"{key}.kill", icon=":material/dangerous:", on_click=_kill, args=(folder, job.id),
            help=_("End the process now. What was saved before stays."),
        )  # fmt: skip
    else:
        st.button(
            _("Stop"), key=f"{key}.stop", icon=":material/stop:", on_click=_stop, args=(folder, job.id),
            help=_("Stop at the next step and save what there is."),
        )  # fmt: skip


def _stop(folder: Path, job_id: str) -> None:
    with guarded():
        jobs.stop(folder, job_id)


def _kill(folder: Path, job_id: str) -> None:
    with guarded():
        jobs.kill(folder, job_id)
