"""The panel that starts a run: what the config will do, what stands in the way, and a start that happens once."""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import streamlit as st
from filelock import FileLock

from studio import dataset_checks, datasets, forecast, models, runs
from studio.config.catalog import preset_names
from studio.config.schema import EVERY_ROW, Portion, RowCount, RunConfig
from studio.config.yaml import load_config, load_text
from studio.data.lint.findings import Finding
from studio.errors import Problem, StudioError
from studio.paths import human_bytes
from studio.projects import Project
from studio.store import checkpoints, open_db
from studio.store import runs as store_runs
from studio.store.checkpoints import Checkpoint
from studio.store.runs import Run
from studio.ui import state
from studio.ui.base_model import offer_model
from studio.ui.config_draft import DEFAULT_PRESET, derived
from studio.ui.frame import CONFIG, DATA, link
from studio.ui.i18n import _, ngettext
from studio.ui.run_list import KEPT_CONFIG
from studio.ui.told import told
from studio.ui.widgets import guarded, plain

SAME_START_SECONDS = 15
SHOWN_FINDINGS = 8
MOST_ROWS_CHECKED_IN_FULL = 20_000
ICONS = {"ok": ":material/check:", "warning": ":material/warning:", "error": ":material/block:"}


Found = tuple[str, Finding]
"""The dataset that a finding is about, and the finding."""


@dataclass(frozen=True)
class Check:
    """One thing looked at before the start. `state` is ok, warning or error; `overridable` errors may be overruled, and
    `wants_data` ones are mended on the Data page."""

    state: str
    text: str
    findings: tuple[Found, ...] = ()
    overridable: bool = False
    wants_data: bool = False


def start_panel(project: Project) -> Run | None:
    """Draw the panel; the run when one was started now."""
    with guarded():
        config = _choose_config(project)
        _summary(project, config)
        found = checks(project, config)
        _show_checks(found)
        config = runs.with_weights(project, config, _choose_weights(project, config))
        offer_model(config.model.base, "train.fetch")
        return _start_button(project, config, found)
    return None


def _choose_config(project: Project) -> RunConfig:
    saved = runs.list_configs(project)
    left, right = st.columns([2, 3], vertical_alignment="bottom")
    label = _("Config") if saved else _("Built-in config")
    names = saved or preset_names()
    wish = state.kept(KEPT_CONFIG, DEFAULT_PRESET)
    st.session_state["train.config"] = wish if wish in names else names[0]
    name = left.selectbox(
        label, names, key="train.config",
        on_change=lambda: state.keep(KEPT_CONFIG, st.session_state["train.config"]),
    )  # fmt: skip
    with right:
        link(CONFIG, _("Edit it on the Config page") if saved else _("Make your own on the Config page"))
    if saved:
        return load_config(runs.config_path(project, name))
    return load_text(runs.preset_text(project, name), name)


def _choose_weights(project: Project, config: RunConfig) -> Checkpoint | None:
    """The checkpoint whose weights the run begins with; None for the base model alone."""
    with open_db(project.folder) as db:
        same = {run.id for run in store_runs.listed(db) if (run.base, run.method) == (config.model.base, config.method)}
        found = {f"{each.run_id}/step_{each.step}": each for each in checkpoints.listed(db) if each.run_id in same}
    if not found:
        return None
    with st.expander(_("Begin with the weights of a checkpoint")):
        chosen = st.selectbox(
            _("Begin with"), ["", *found], format_func=lambda name: name or _("the base model"), key="train.weights",
            help=_("For another batch size, packing or number of processes, with which a run cannot be resumed."),
        )  # fmt: skip
        if chosen:
            st.caption(
                _("Only the weights are carried over; optimizer, schedule, place in the data and chance begin anew.")
            )
    return found.get(chosen or "")


def _summary(project: Project, config: RunConfig) -> None:
    facts = [
        (_("Method"), config.method),
        (_("Base model"), config.model.base),
        (_("Steps"), str(derived(project, config).num_steps or "–")),
        (_("Rows a step"), str(config.examples_per_step)),
        (_("Learning rate"), f"{config.train.learning_rate:g}"),
    ]
    for column, (label, value) in zip(st.columns(len(facts)), facts, strict=True):
        column.caption(label)
        column.markdown(f"**{plain(value)}**")
    mix = ", ".join(portion_words(config.data.sources))
    st.caption(_("Learns from: {mix}").format(mix=plain(mix)))


def portion_words(sources: Mapping[str, Portion]) -> Iterator[str]:
    """'identity 50%', 'general 2000 rows' or 'alpaca all rows' for each source."""
    total = sum(portion for portion in sources.values() if isinstance(portion, float))
    for name, portion in sources.items():
        yield f"{name} {_portion_word(portion, total)}"


def _portion_word(portion: Portion, total: float) -> str:
    """`total`: the sum of all shares."""
    if portion == EVERY_ROW:
        return _("all rows")
    if isinstance(portion, RowCount):
        return ngettext("{n} row", "{n} rows", portion.rows).format(n=portion.rows)
    return f"{portion / total:.0%}"


def checks(project: Project, config: RunConfig) -> list[Check]:
    """What is looked at before a run starts, in the order it would fail."""
    problems = runs.problems_before_start(project, config)
    found = [_check_model(config.model.base)]
    found += [_wrong(problem) for problem in problems]
    if not problems:
        found.append(_check_rows(project, config))
        found.append(_check_lint(project, config))
    found.append(_check_disk(project, config))
    return found


def _wrong(problem: Problem) -> Check:
    allowed = f" ({_('allowed')}: {problem.allowed})" if problem.allowed else ""
    return Check("error", told(problem.message) + allowed, wants_data=problem.path == "data.sources")


def _check_model(base: str) -> Check:
    try:
        models.require(base)
    except StudioError as error:
        return Check("error", told(str(error)))
    return Check("ok", _("The base model {base} is on this machine.").format(base=base))


def _check_rows(project: Project, config: RunConfig) -> Check:
    try:
        epoch = runs.epoch_rows(project, config)
    except StudioError as error:
        return Check("error", told(str(error)), wants_data=True)
    steps = runs.planned_steps(project, config)
    seen = steps * config.examples_per_step
    text = _("{steps} steps see {seen} rows: {passes} passes over the mix of {rows} rows from {count} datasets.")
    return Check(
        "ok",
        text.format(steps=steps, seen=seen, passes=f"{seen / epoch:.1f}", rows=epoch, count=len(config.data.sources)),
    )


def _check_lint(project: Project, config: RunConfig) -> Check:
    found = [(name, finding) for name in config.data.sources for finding in _findings(project, name, config)]
    errors = tuple(each for each in found if each[1].severity == "error")
    warnings = tuple(each for each in found if each[1].severity != "error")
    if errors:
        text = ngettext(
            "{n} row would be learned wrongly: {where}", "{n} rows would be learned wrongly: {where}", len(errors)
        )
        return Check("error", text.format(n=len(errors), where=_where(errors)), errors + warnings, overridable=True)
    if warnings:
        text = ngettext("{n} remark on the data: {where}", "{n} remarks on the data: {where}", len(warnings))
        return Check("warning", text.format(n=len(warnings), where=_where(warnings)), warnings)
    return Check("ok", _("The data has no faults that can be found by rule."))


def _where(found: Sequence[Found]) -> str:
    """'identity (2), general (1)': the datasets, each with its number."""
    numbers = Counter(name for name, _finding in found)
    return ", ".join(f"{name} ({n})" for name, n in numbers.items())


def _findings(project: Project, name: str, config: RunConfig) -> list[Finding]:
    """A large dataset is looked at in full on the Data page or by `retune data lint`; here its errors are enough."""
    if datasets.get(project, name).num_rows > MOST_ROWS_CHECKED_IN_FULL:
        return dataset_checks.lint_before_start(project, name, config).findings
    present = models.resolve(config.model.base).present
    return dataset_checks.lint_dataset(project, name, dataset_checks.tokens_of(config) if present else None).findings


def _check_disk(project: Project, config: RunConfig) -> Check:
    if not models.resolve(config.model.base).present:
        return Check("ok", _("How much disk it takes is known once the base model is there."))
    free = shutil.disk_usage(project.folder).free
    try:
        num_steps = runs.planned_steps(project, config)
        needed = forecast.forecast(project, config, num_steps=num_steps).disk.checkpoints
    except StudioError as error:  # a DeepSpeed file that cannot be used, rows that cannot be counted
        return Check("error", told(str(error)))
    text = _("Checkpoints take up to about {needed}; {free} are free.").format(
        needed=human_bytes(needed), free=human_bytes(free)
    )
    return Check("ok" if needed < free else "error", text)


def _show_checks(found: Sequence[Check]) -> None:
    with st.container(border=True, gap="xsmall"):
        for check in found:
            st.markdown(f"{ICONS[check.state]} {plain(check.text)}")
            if check.findings:
                _show_findings(check.findings)
        if any(check.wants_data for check in found):
            link(DATA, _("Build or import it on the Data page"))


def _show_findings(findings: Sequence[Found]) -> None:
    with st.expander(_("Show them")):
        for name, finding in findings[:SHOWN_FINDINGS]:
            text = _("{dataset}, row {row}: {message}")
            st.text(text.format(dataset=name, row=finding.row, message=told(finding.message)))
        if len(findings) > SHOWN_FINDINGS:
            st.caption(_("and {number} more").format(number=len(findings) - SHOWN_FINDINGS))
            link(DATA, _("See all on the Data page"))


def _start_button(project: Project, config: RunConfig, found: Sequence[Check]) -> Run | None:
    stands_in_way = [check for check in found if check.state == "error"]
    despite = False
    if stands_in_way and all(check.overridable for check in stands_in_way):
        label = _("Start all the same. What was found is recorded with the run.")
        despite = st.checkbox(label, key="train.override")
    disabled = bool(stands_in_way) and not despite
    if st.button(_("Start"), type="primary", icon=":material/play_arrow:", disabled=disabled, key="train.start"):
        return start_once(project, config, despite)
    return None


def start_once(project: Project, config: RunConfig, allow_lint_errors: bool = False) -> Run:
    """Start a run; a second press within a few seconds, here or in another window, returns the same one."""
    with FileLock(project.path(".start.lock"), timeout=30):
        if same := _just_started(project, config):
            return same
        run, _job = runs.start_run(project, config, allow_lint_errors)
    return run


def _just_started(project: Project, config: RunConfig) -> Run | None:
    for run in runs.list_runs(project):
        age = (datetime.now(UTC) - datetime.fromisoformat(run.created_at)).total_seconds()
        if age < SAME_START_SECONDS and run.name == config.name and runs.run_config(project, run.id) == config:
            return run
    return None
