"""One run as the person watches it: state, progress, curves, samples, log, and what may be asked of it."""

import html
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import streamlit as st

from studio import charts, forecast, jobs, runs
from studio.paths import human_bytes
from studio.projects import Project
from studio.store import checkpoints, metrics, open_db, run_events, samples
from studio.store import runs as store_runs
from studio.store.jobs import LIVE_STATES, Job
from studio.store.metrics import Point
from studio.store.runs import Run
from studio.store.samples import Sample
from studio.ui import state
from studio.ui.bundle_view import reproduced, take_bundle
from studio.ui.dialogs import redraw_page
from studio.ui.frame import CHECKPOINTS, COMPARE, CONFIG, link
from studio.ui.i18n import _, ngettext
from studio.ui.run_events import events_view
from studio.ui.told import told
from studio.ui.widgets import ago, duration, guarded, phase_word, plain, progress_text, state_label

LIVE_SECONDS = 1.5
SILENT_SECONDS = 20
NUM_STEPS_FOR_SPEED = 20
LATEST_SAMPLE_COLUMNS = 3
LOG_HEIGHT = 280
LITTLE_SPACE_BYTES = 8 * 2**20
SERIES = (
    "train/loss", "valid/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second",
    "probe/identity", "probe/leakage", "probe/retention",
)  # fmt: skip


def run_view(project: Project, run_id: str) -> None:
    """Draw a run. While it is live its moving parts are looked at again every second or two."""
    run, job = runs.get_run(project, run_id), run_job(project, run_id)
    live = job is not None and job.live
    _head(run)
    if live and job:
        _live_controls(project, job)
    else:
        _ended(project, run, job)
    st.fragment(_moving_parts, run_every=LIVE_SECONDS if live else None)(project, run_id, run.state)
    _frozen_config(project, run)


def run_job(project: Project, run_id: str) -> Job | None:
    """The newest job of a run; None for a run that was recorded without one."""
    with open_db(project.folder) as db:
        run = store_runs.get(db, run_id)
    return jobs.get(project.folder, run.job_id) if run.job_id else None


def _head(run: Run) -> None:
    st.subheader(plain(run.id), anchor=False)
    facts = [state_label(run.state), plain(run.method), plain(run.base), plain(ago(run.created_at))]
    st.markdown(" · ".join(fact for fact in facts if fact))
    if despite := run.detail.get("started_despite"):
        st.warning(_("Started although the data had faults:") + "  \n" + "  \n".join(map(plain, despite[:5])))


def _live_controls(project: Project, job: Job) -> None:
    with st.container(horizontal=True):
        if job.state == "stopping":
            _kill_button(project, job)
            st.caption(_("It stops at the next step. Kill ends it now; what was saved before stays."))
            return
        if job.waiting:
            label = _("Take it out of the line")
            _button(label, "leave_line", ":material/close:", lambda: _stop(project, job, save=False))
            return
        _stop_popover(project, job)
        _button(_("Save now"), "save", ":material/save:", lambda: _ask(project, job, "save"))
        _button(_("Sample now"), "sample", ":material/chat:", lambda: _ask(project, job, "sample"))
        if _is_full(project):  # nothing else can be asked of it: what is asked would have to be stored
            _kill_button(project, job)


def _kill_button(project: Project, job: Job) -> None:
    _button(_("Kill"), "kill", ":material/dangerous:", lambda: jobs.kill(project.folder, job.id))


def _stop_popover(project: Project, job: Job) -> None:
    presses = st.session_state.get("train.stop_presses", 0)
    with st.popover(_("Stop"), icon=":material/stop:", key=f"train.stop.{presses}"):
        _button(_("Save and stop"), "stop_save", ":material/save:", lambda: _stop(project, job, save=True), wide=True)
        _button(
            _("Stop without saving"),
            "stop_now",
            ":material/delete:",
            lambda: _stop(project, job, save=False),
            wide=True,
        )
        _button(_("Keep going"), "keep_going", ":material/play_arrow:", _close_popover, wide=True)


def _button(label: str, key: str, icon: str, action: Callable[[], None], wide: bool = False) -> None:
    width = "stretch" if wide else "content"
    st.button(label, key=f"train.{key}", icon=icon, on_click=_guarded_call, args=(action,), width=width)


def _guarded_call(action: Callable[[], None]) -> None:
    with guarded():
        action()


def _ask(project: Project, job: Job, what: str) -> None:
    jobs.request(project.folder, job.id, what)
    state.flash(_("Asked for; it is done at the next step."))


def _stop(project: Project, job: Job, save: bool) -> None:
    jobs.stop(project.folder, job.id, save)
    _close_popover()


def _close_popover() -> None:
    """A popover cannot be told to close; one with a new key begins closed."""
    st.session_state["train.stop_presses"] = st.session_state.get("train.stop_presses", 0) + 1


def _ended(project: Project, run: Run, job: Job | None) -> None:
    with open_db(project.folder) as db:
        kept = checkpoints.listed(db, run.id)
    steps = [checkpoint.step for checkpoint in kept]
    _best(kept)
    if run.state == "finished":
        with st.container(border=True, horizontal=True, vertical_alignment="center"):
            early = bool(job and job.result.get("early_stop"))
            word = _("Finished early.") if early else _("Finished.")
            st.markdown(f":material/check_circle: **{word}** " + _("See what it became:"), width="content")
            link(CHECKPOINTS, _("Convert its checkpoint"))
            link(COMPARE, _("Compare it with its base"))
            take_bundle(project, run)
        reproduced(project, run)
        return
    if run.cause:
        show = st.error if run.state in ("failed", "lost") else st.info
        show(plain(told(run.cause)), icon=":material/error:" if run.state in ("failed", "lost") else ":material/info:")
    with st.container(horizontal=True, vertical_alignment="center"):
        if steps:
            label = _("Resume from step {step}").format(step=max(steps))
            _button(label, "resume", ":material/resume:", lambda: _resume(project, run.id))
            if run.state == "failed":
                link(CONFIG, _("Other settings are another run"))
        else:
            st.caption(_("It saved no checkpoint, so there is nothing to resume from. Start it again."))
            _button(_("Start again"), "again", ":material/replay:", lambda: _resume(project, run.id))
            link(CONFIG)


def _best(kept: Sequence[checkpoints.Checkpoint]) -> None:
    best = next((each for each in kept if each.is_best and each.score is not None), None)
    if best:
        measures = {
            "valid_loss": _("Validation loss"),
            "probe_score": _("Identity minus leakage"),
            "probe_balance": _("Identity minus leakage and forgetting"),
        }
        measure = measures.get(best.score_name, "")
        text = _("Best checkpoint: step {step} ({measure} {score}). It is kept.")
        st.markdown(":material/star: " + text.format(step=best.step, measure=measure, score=f"{best.score:.3f}"))


def _resume(project: Project, run_id: str) -> None:
    if runs.get_run(project, run_id).state not in LIVE_STATES:  # the second of two presses finds it queued
        runs.resume_run(project, run_id)


def _moving_parts(project: Project, run_id: str, drawn_state: str) -> None:
    """What changes while a run goes on. Another state than the one drawn above redraws the whole page."""
    with guarded():
        run, job = runs.get_run(project, run_id), run_job(project, run_id)
        if run.state != drawn_state:
            redraw_page()
        if theirs := run.detail.get("imported"):
            return _trained_elsewhere(theirs)
        with open_db(project.folder) as db:
            series = {name: metrics.series(db, run_id, name) for name in SERIES}
            said, happened = samples.listed(db, run_id), run_events.listed(db, run_id)
        if job:
            _progress(run, job, series["train/loss"])
            _sign_of_life(project, job)
        if any(series.values()):
            _numbers(series)
        _outcome(project, run)
        events_view(happened)
        is_over = run.state not in LIVE_STATES  # then nothing appears any more
        if series["train/loss"] or not is_over:
            _curves(series)
        if said or not is_over:
            _samples(said)
        if job:
            _log(job)
    return None


def _trained_elsewhere(facts: dict[str, Any]) -> None:
    """What is known of a run that was brought in: it has no curves and no samples here."""
    st.caption(_("Trained by another tool and brought in. Its curves, samples and optimizer are not here."))
    rows = [
        (_("File"), facts.get("file")), (_("Layout"), facts.get("layout")), (_("Saved at"), facts.get("saved at")),
        (_("Micro-batches"), facts.get("iteration")), (_("Steps"), facts.get("step")),
        (_("Last loss"), _loss_of(facts)),
    ]  # fmt: skip
    with st.container(border=True, gap="xsmall"):
        for label, value in rows:
            if value:
                st.text(f"{label}: {value}")


def _loss_of(facts: dict[str, Any]) -> str:
    loss = facts.get("last loss")
    return f"{loss:.3f}" if isinstance(loss, float) else ""


def _progress(run: Run, job: Job, losses: Sequence[Point]) -> None:
    current, total = (job.current, job.total) if job.total else (run.step, run.num_steps)
    if not job.live:
        ended = _("Ended after step {step} of {steps}.").format(step=run.step, steps=run.num_steps)
        st.caption(ended if run.step else _("It ended before its first step."))
        return
    if job.waiting:
        st.caption(_place_words(job))
        return
    st.progress(min(1.0, current / total) if total else 0.0, text=_progress_words(run, job, losses))


def _place_words(job: Job) -> str:
    if job.held:
        return phase_word(job)
    line = [each.id for _folder, each in jobs.waiting() if not each.held]  # who is held lets others pass
    before = line.index(job.id) if job.id in line else 0
    first = _("It is next, and starts by itself when the device is free.")
    later = ngettext("{n} job in line comes before it.", "{n} jobs in line come before it.", before)
    return later.format(n=before) if before else first


def _sign_of_life(project: Project, job: Job) -> None:
    """When it was heard of last. On a full disk it cannot be heard: the page looks for itself."""
    if not job.live or job.waiting:
        return
    if _is_full(project):
        text = _("The disk is full ({free} free). The run waits with what it could not store; free some space.")
        st.warning(text.format(free=human_bytes(_free_bytes(project))), icon=":material/disc_full:")
        return
    silent = seconds_since(job.heartbeat_at or job.created_at)
    if silent > SILENT_SECONDS:
        st.warning(_("No sign of life for {time}.").format(time=duration(silent)), icon=":material/heart_broken:")
    else:
        st.caption(_("Last sign of life: {time} ago").format(time=duration(silent)))


def _is_full(project: Project) -> bool:
    return _free_bytes(project) < LITTLE_SPACE_BYTES


def _free_bytes(project: Project) -> int:
    return shutil.disk_usage(project.folder).free


def _progress_words(run: Run, job: Job, losses: Sequence[Point]) -> str:
    left = seconds_left(losses, run.num_steps, since=job.started_at)
    if left is None or job.unit not in ("step", "steps"):
        return progress_text(job)
    place = _("step {step} of {steps}").format(step=job.current, steps=job.total)
    return " · ".join([phase_word(job) or job.state, place, _("{time} left").format(time=duration(left))])


def seconds_left(losses: Sequence[Point], num_steps: int, since: str = "") -> float | None:
    """From the pace of the last steps of this process; None until two of them are known."""
    recent = [point for point in losses if point.at >= since][-NUM_STEPS_FOR_SPEED:]
    if len(recent) < 2 or not num_steps:
        return None
    first, last = recent[0], recent[-1]
    elapsed = (datetime.fromisoformat(last.at) - datetime.fromisoformat(first.at)).total_seconds()
    return elapsed / (last.step - first.step) * max(0, num_steps - last.step)


def seconds_since(at: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds()


def _numbers(series: dict[str, list[Point]]) -> None:
    shown = [
        (_("Training loss"), "train/loss", "{:.3f}"),
        (_("Validation loss"), "valid/loss", "{:.3f}"),
        (_("Tokens a second"), "train/tokens_per_second", "{:,.0f}"),
        (_("Learning rate"), "train/learning_rate", "{:.3g}"),
        (_("Gradient norm"), "train/grad_norm", "{:.2f}"),
    ]
    for column, (label, name, form) in zip(st.columns(len(shown)), shown, strict=True):
        value = next((point.value for point in reversed(series[name]) if point.value is not None), None)
        column.metric(label, "–" if value is None else form.format(value))


def _outcome(project: Project, run: Run) -> None:
    """What was predicted beside what was measured, in a small line."""
    found = forecast.outcome(project, run)
    if found is None:
        return
    words = _("Memory: predicted {predicted}, measured {measured} ({error} off)").format(
        predicted=human_bytes(found.predicted_bytes),
        measured=human_bytes(found.measured_bytes),
        error=f"{found.memory_error:+.0%}",
    )
    if found.time_error is not None and found.predicted_seconds and found.measured_seconds:
        words += " · " + _("a step: predicted {predicted} s, measured {measured} s ({error} off)").format(
            predicted=f"{found.predicted_seconds:.2f}",
            measured=f"{found.measured_seconds:.2f}",
            error=f"{found.time_error:+.0%}",
        )
    st.caption(words)


def _curves(series: dict[str, list[Point]]) -> None:
    if not series["train/loss"]:
        st.caption(_("Curves appear with the first step."))
        return
    title, smoothing, log = st.columns([5, 3, 2], vertical_alignment="bottom")
    title.markdown(f"**{_('Loss')}**")
    weight = smoothing.slider(_("Smoothing"), 0.0, 0.95, 0.0, 0.05, key="train.smoothing")
    use_log = log.toggle(_("Log scale"), key="train.log_scale")
    figure = charts.loss_chart(
        series["train/loss"],
        series["valid/loss"],
        train_label=_("training"),
        valid_label=_("validation"),
        step_label=_("Step"),
        loss_label=_("Loss (nats a token)"),
        smoothing=weight,
        log=use_log,
    )
    if probes := _probe_lines(series):
        charts.add_below(figure, probes, _("Held-out questions"))
    _plot(figure, "loss", _("Loss over steps"))
    if probes:
        st.caption(
            _(
                "Identity: questions about itself that it answers; it should rise to 100 %. Leakage: other answers "
                "that say its name; it should stay at 0. Forgetting: how much perplexity on the base's answers grew."
            )
        )
    small = [
        ("train/learning_rate", _("Learning rate"), charts.PURPLE, ".2~e"),
        ("train/grad_norm", _("Gradient norm"), charts.GREEN, ""),
        ("train/tokens_per_second", _("Tokens a second"), charts.GREY, ""),
    ]
    for column, (name, label, color, form) in zip(st.columns(len(small)), small, strict=True):
        with column:
            _plot(charts.small_chart(series[name], _("Step"), label, color, form), name, label)


def _probe_lines(series: dict[str, list[Point]]) -> list[charts.Line]:
    """What it answers to held-out questions on the way, where the config asks for that."""
    lines = [
        charts.Line(_("identity"), series["probe/identity"], charts.GREEN, markers=True),
        charts.Line(_("leakage"), series["probe/leakage"], charts.ORANGE, markers=True),
        charts.Line(_("forgetting"), series["probe/retention"], charts.PURPLE, markers=True),
    ]
    return [line for line in lines if line.points]


def _plot(figure: object, key: str, alt: str) -> None:
    st.plotly_chart(
        figure,
        key=f"train.chart.{key}",
        theme="streamlit",
        config={"displayModeBar": False, "displaylogo": False},
        alt=alt,
    )


def _samples(said: Sequence[Sample]) -> None:
    st.markdown(f"**{_('What it says')}**")
    if not said:
        st.caption(_("Samples appear before the first step and then every few steps."))
        return
    steps = sorted({sample.step for sample in said})
    if len(steps) > LATEST_SAMPLE_COLUMNS + 1 and not st.toggle(_("All steps"), key="train.all_samples"):
        steps = [steps[0], *steps[-LATEST_SAMPLE_COLUMNS:]]
    st.html(samples_table(said, steps))


def samples_table(said: Sequence[Sample], steps: Sequence[int]) -> str:
    """Prompts down, steps across, every text escaped: models may write HTML."""
    cells = {(sample.prompt, sample.step): sample for sample in said}
    prompts = list(dict.fromkeys(sample.prompt for sample in said))
    heads = "".join(f"<th>{html.escape(_step_word(step))}</th>" for step in steps)
    rows = "".join(
        f"<tr><th>{html.escape(prompt)}</th>" + "".join(_cell(cells.get((prompt, step))) for step in steps) + "</tr>"
        for prompt in prompts
    )
    return f"{SAMPLES_STYLE}<div class='rt-samples'><table><tr><th></th>{heads}</tr>{rows}</table></div>"


def _step_word(step: int) -> str:
    return _("before training") if step == 0 else _("step {step}").format(step=step)


def _cell(sample: Sample | None) -> str:
    if sample is None:
        return "<td></td>"
    if sample.error:
        return f"<td class='rt-error'>{html.escape(_('failed'))}: {html.escape(told(sample.error))}</td>"
    return f"<td>{html.escape(sample.text)}</td>"


SAMPLES_STYLE = """<style>
.rt-samples { overflow-x: auto; }
.rt-samples table { border-collapse: collapse; width: 100%; font-size: 0.93rem; }
.rt-samples th, .rt-samples td { text-align: left; vertical-align: top; padding: 0.45rem 0.7rem; min-width: 11rem;
  border-bottom: 1px solid color-mix(in srgb, currentColor 16%, transparent); white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: isolate; }
.rt-samples th { font-weight: 600; }
.rt-samples .rt-error { opacity: 0.7; font-style: italic; }
</style>"""


def _log(job: Job) -> None:
    with st.expander(_("Log"), icon=":material/article:", expanded=job.state in ("failed", "lost")):
        text = jobs.tail(Path(job.log_path)) if job.log_path else ""
        with st.container(height=LOG_HEIGHT, border=False, autoscroll=True):
            st.code(text or _("Nothing was written yet."), language=None, wrap_lines=True)


def _frozen_config(project: Project, run: Run) -> None:
    path = runs.run_folder(project, run.id) / runs.CONFIG_FILE
    if path.is_file():
        with st.expander(_("Config of this run"), icon=":material/tune:"):
            st.code(path.read_text(encoding="utf-8"), language="yaml", height=LOG_HEIGHT)
