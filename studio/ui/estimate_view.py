"""What the config on the Config page will need: memory, disk and time, a dry run, and settings that would fit."""

from collections.abc import Sequence
from dataclasses import asdict

import streamlit as st

from studio import datasets, forecast, machine
from studio.config.schema import RunConfig
from studio.config.yaml import update_text
from studio.errors import StudioError
from studio.estimate import GIB, Suggestion, changed
from studio.forecast import Forecast
from studio.machine import Device
from studio.paths import human_bytes
from studio.projects import Project
from studio.ui import config_draft as drafts
from studio.ui import state
from studio.ui.config_draft import Draft
from studio.ui.i18n import N_, _
from studio.ui.job_panel import job_panel
from studio.ui.widgets import ago, duration, guarded, plain

CARDS = (8, 12, 16, 24, 48, 80)  # GB of common graphics cards
PARTS = {
    "weights": (N_("Weights"), N_("the model's own numbers")),
    "quantisation": (N_("Scales"), N_("what makes 4-bit weights into numbers again")),
    "adapter": (N_("Adapter"), N_("the small part that learns")),
    "gradients": (N_("Gradients"), N_("in which direction each learning weight is to change")),
    "optimizer": (N_("Optimizer"), N_("its memory of earlier gradients")),
    "activations": (N_("Activations"), N_("what each layer keeps of the micro-batch for the way back")),
    "logits": (N_("Logits"), N_("a score for every word of the vocabulary")),
    "overhead": (N_("Overhead"), N_("libraries, the device's context, the allocator")),
}
KEPT_DEVICE = "config.device"


def estimate_panel(project: Project, draft: Draft, config: RunConfig, num_steps: int) -> None:
    """Draw the panel; `num_steps` 0 while they are not known."""
    with st.container(gap="small", border=True):
        on = _choose_device()
        try:
            made = forecast.forecast(project, config, on, num_steps)
        except StudioError as error:
            st.caption(plain(error))
            return
        _memory(made)
        if not made.fits:
            word = _("Memory of a process") if made.num_processes > 1 else _("Memory")
            _smaller(draft, config, forecast.suggestions(project, config, on, on.memory_bytes), word)
        _disk(made)
        if on == machine.device():
            _time(project, config, made, num_steps)


def _choose_device() -> Device:
    here = machine.device()
    names = ["", *(str(size) for size in CARDS)]
    wish = state.kept(KEPT_DEVICE, "")
    st.session_state[KEPT_DEVICE] = wish if wish in names else ""
    left, right = st.columns([2, 3], vertical_alignment="center")
    left.markdown(f"**{_('What it needs')}**")
    chosen = right.selectbox(
        _("Computes on"), names, key=KEPT_DEVICE, label_visibility="collapsed",
        format_func=lambda name: _device_word(here, name),
        on_change=lambda: state.keep(KEPT_DEVICE, st.session_state[KEPT_DEVICE]),
    )  # fmt: skip
    return machine.card(int(chosen) * GIB) if chosen else here


def _device_word(here: Device, name: str) -> str:
    if name:
        return _("a graphics card of {size} GB").format(size=name)
    return _("this machine ({memory})").format(memory=human_bytes(here.memory_bytes))


def _memory(made: Forecast) -> None:
    total, there = made.needed_bytes, made.device.memory_bytes
    words = _("Memory: about {needed} of {there}").format(needed=human_bytes(total), there=human_bytes(there))
    icon = ":material/check:" if made.fits else ":material/block:"
    verdict = _("It fits.") if made.fits else _("It does not fit.")
    st.progress(min(1.0, total / there), text=f"{words}. {icon} {verdict}")
    st.caption(_basis(made))
    with st.expander(_("Where the memory of a process goes") if made.num_processes > 1 else _("Where the memory goes")):
        lines = [f"| {_('Part')} | {_('Size')} | {_('What it is')} |", "| --- | ---: | --- |"]
        for name, size in asdict(made.memory).items():
            if size:
                word, hint = PARTS[name]
                lines.append(f"| {_(word)} | {_size(size)} | {_(hint)} |")
        st.markdown("\n".join(lines))


def _size(num_bytes: int) -> str:
    """On one line, however narrow its column."""
    return human_bytes(num_bytes).replace(" ", "\u00a0")


def _basis(made: Forecast) -> str:
    load = made.load
    basis = {
        "counted": _("at most {tokens} tokens at once, counted on your data"),
        "drawn": _("about {tokens} tokens at once at most, judged by some of your rows"),
        "longest": _("for the longest rows that may come: {tokens} tokens at once"),
    }
    notes = [basis[load.basis].format(tokens=load.num_tokens)]
    if not made.is_known_architecture:
        notes.append(_("this architecture is counted as if it were a Llama"))
    if made.num_processes > 1:
        notes.append(_("{number} processes together").format(number=made.num_processes))
    if made.computes_twice:
        notes.append(_("with gradient checkpointing"))
    if made.is_in_heap:
        notes.append(_("more than with compiled layers (a C++ compiler, train.compile: auto)"))
    if made.device.kind == "cuda":
        notes.append(_("for a GPU by arithmetic, not measured"))
    return "; ".join(notes)


def _smaller(draft: Draft, config: RunConfig, ways: Sequence[Suggestion], memory: str) -> None:
    """Each way is on top of the ones before; the last one fits, if any does."""
    if not ways or not ways[-1].fits:
        st.markdown(_("No setting makes it fit; choose a smaller base model."))
        return
    st.markdown(_("What would fit, each on top of the ones before:"))
    lines = [f"| {_('Setting')} | {memory} |", "| --- | ---: |"]
    for number, way in enumerate(ways):
        lines.append(f"| {plain(_change(ways, number))} | {_size(way.memory.total)} |")
    st.markdown("\n".join(lines))
    st.button(
        _("Apply"), key="config.apply", type="primary", icon=":material/check:", on_click=_apply,
        args=(draft, config, ways[-1]), help=_("Puts all of these settings into the config."),
    )  # fmt: skip


def _change(ways: Sequence[Suggestion], number: int) -> str:
    """The settings that a way adds, as `micro_batch_size 4`."""
    before = ways[number - 1].settings if number else {}
    added = {path: value for path, value in ways[number].settings.items() if before.get(path) != value}
    return ", ".join(f"{path.rpartition('.')[2]} {str(value).lower()}" for path, value in added.items())


def _apply(draft: Draft, config: RunConfig, way: Suggestion) -> None:
    with guarded():
        drafts.edited_text(draft, update_text(draft.text, changed(config, way.settings)))
        state.flash(_("The settings are in the config; save it to keep them."))


def _disk(made: Forecast) -> None:
    disk = made.disk
    text = _("Disk: a checkpoint {one}, {all} at most").format(
        one=human_bytes(disk.checkpoint), all=human_bytes(disk.checkpoints)
    )
    if disk.merged:
        text += _("; merged model {size}").format(size=human_bytes(disk.merged))
    st.markdown(text)


def _time(project: Project, config: RunConfig, made: Forecast, num_steps: int) -> None:
    st.markdown(_time_words(made, num_steps))
    job = forecast.newest_measurement(project, config)
    job_panel(project.folder, job, "config.measure")
    there = {dataset.name for dataset in datasets.listed(project)}
    if not (job and job.live) and set(config.data.sources) <= there:
        label = _("Measure again") if made.pace and made.pace.is_measured else _("Measure a step")
        st.button(
            label, icon=":material/timer:", key="config.measure", on_click=_measure, args=(project, config),
            help=_("Loads the model and takes a real step or two with your data, in a process of its own."),
        )  # fmt: skip


def _time_words(made: Forecast, num_steps: int) -> str:
    pace = made.pace
    if pace is None:
        return _("Time: not known yet")
    seconds = pace.seconds_per_step
    text = _("Time: {seconds} s a step").format(seconds=f"{seconds:.2f}")
    if num_steps:
        text += ", " + _("about {time} in all").format(time=duration(seconds * num_steps))
    if not pace.is_measured:
        return f"{text} :gray[{_('as fast as run {run}').format(run=plain(pace.source))}]"
    measured = _("measured {when}, with {memory} at the peak")
    return f"{text} :gray[{measured.format(when=ago(pace.source), memory=human_bytes(pace.memory_bytes))}]"


def _measure(project: Project, config: RunConfig) -> None:
    with guarded():
        forecast.start_measuring(project, config)
