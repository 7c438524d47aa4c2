"""A run as one file to take along, a bundle to run again, and how the second run came out beside the first."""

from pathlib import Path
from typing import Any, BinaryIO

import streamlit as st

from studio import runs
from studio.bundles import comparing
from studio.bundles.comparing import Comparison, Line
from studio.bundles.content import Bundle, Manifest, open_bundle
from studio.bundles.packing import pack
from studio.bundles.reproducing import Plan, make_plan, start
from studio.paths import human_bytes, typed_path
from studio.projects import Project
from studio.store.runs import Run
from studio.ui import state
from studio.ui.frame import TRAIN, go
from studio.ui.i18n import N_, _, ngettext
from studio.ui.job_panel import job_panel, newest_job
from studio.ui.told import told
from studio.ui.widgets import guarded, plain

MOST_DOWNLOADED_BYTES = 500 * 2**20
VERDICTS = {
    "equal": N_("equal to the last bit"),
    "close": N_("in the interval"),
    "apart": N_("differs"),
    "missing": N_("not compared yet"),
}


def take_bundle(project: Project, run: Run) -> None:
    """A button that opens what can be taken along, and makes the file when asked to."""
    with st.popover(_("Bundle"), icon=":material/package_2:", key=f"train.bundle.{run.id}"):
        st.markdown(_("This run in one file: whoever has it can train it again and compare, to the last bit."))
        rows = st.toggle(_("With the rows"), value=True, key="train.bundle.rows")
        if rows:
            st.caption(_("Rows, questions and answers are inside, for whoever gets the file to read."))
        else:
            st.caption(_("Without rows, questions, answers and samples; who runs it again brings the rows."))
        kept = f"train.bundle.made.{run.id}.{'with' if rows else 'without'}"
        if st.button(_("Make the file"), type="primary", key="train.bundle.make"):
            with guarded(), st.spinner(_("Packing…")):
                name = f"{run.id}.bundle.zip" if rows else f"{run.id}.without-rows.bundle.zip"
                state.keep(kept, pack(project, run.id, project.path("exports", name), rows).path)
        if (made := state.kept(kept)) and made.is_file():
            _made(made)


def _made(path: Path) -> None:
    st.code(str(path), language=None, wrap_lines=True)
    size = path.stat().st_size
    if size <= MOST_DOWNLOADED_BYTES:
        label = _("Download ({size})").format(size=human_bytes(size))
        st.download_button(
            label, path.read_bytes, path.name, "application/zip", icon=":material/download:", on_click="ignore",
            key="train.bundle.download",
        )  # fmt: skip


def reproduce_form() -> None:
    """On Home: give a bundle, see what it is and what is missing here, and run it again."""
    with st.expander(_("Run a bundle again"), icon=":material/replay:"):
        st.caption(_("A bundle is a run in one file, made on the Train page or with `retune bundle`."))
        file = st.file_uploader(_("Bundle"), ["zip"], key="home.bundle")
        if file is not None:
            with guarded():
                _look(file)


def _look(file: BinaryIO) -> None:
    with open_bundle(file) as bundle:
        _facts(bundle.manifest)
        given = _given(make_plan(bundle))
        plan = make_plan(bundle, None, given)
        _differences(plan)
        _missing(plan)
        name = st.text_input(
            _("Name of the new project"), bundle.manifest.run.id, max_chars=120, key="home.bundle.name"
        )
        pressed = st.button(
            _("Train it again"), type="primary", icon=":material/replay:", disabled=bool(plan.missing) or not name,
            key="home.bundle.start",
        )  # fmt: skip
        if pressed:
            _start(bundle, plan, given, name)


def _start(bundle: Bundle, plan: Plan, given: dict[str, Path], name: str) -> None:
    project, _run, _job = start(bundle, plan, given, name)
    state.choose_project(project.slug)
    go(TRAIN)


def _facts(manifest: Manifest) -> None:
    run = manifest.run
    steps = _("{step} of {steps} steps").format(step=run.step, steps=run.num_steps)
    st.markdown(f"**{plain(run.id)}** · {plain(run.method)} · {plain(manifest.base)} · {steps}")
    rows = ", ".join(
        f"{each.name} ({ngettext('{n} row', '{n} rows', each.num_rows).format(n=each.num_rows)})"
        for each in manifest.datasets
    )
    inside = _("Rows inside: {rows}") if manifest.has_rows else _("Rows not inside: {rows}")
    st.caption(inside.format(rows=plain(rows)))


def _given(plan: Plan) -> dict[str, Path]:
    """Places that the person types for what is neither in the bundle nor found here."""
    given = {}
    for what in plan.missing:
        typed = st.text_input(_("Where is {what}?").format(what=plain(what)), key=f"home.bundle.{what}")
        if typed.strip():
            given[what] = typed_path(typed.strip())
    return given


def _differences(plan: Plan) -> None:
    if not plan.differences:
        st.markdown(f":material/check: {_('Packages and machine are those of the bundle, as far as it says.')}")
        return
    st.markdown(_("Different here; the numbers may differ too:"))
    st.dataframe(
        [{_("What"): each.what, _("In the bundle"): each.there, _("Here"): each.here} for each in plan.differences],
        hide_index=True, key="home.bundle.differences", alt=_("What is different here"),
    )  # fmt: skip


def _missing(plan: Plan) -> None:
    for sentence in plan.missing.values():
        st.warning(_("Missing: {what}").format(what=plain(told(sentence))), icon=":material/search_off:")


def reproduced(project: Project, run: Run) -> None:
    """How a run that reproduces another came out; nothing for any other run."""
    if "reproduces" not in run.detail:
        return
    with guarded():
        found = comparing.compare(project, run.id)
        if found is None:
            return
        st.markdown(f"**{_('Beside the run that it reproduces')}** · {plain(run.detail['reproduces']['run'])}")
        _sentences(found)
        st.dataframe(
            [_row(line) for line in found.lines], hide_index=True, key="train.reproduced",
            alt=_("This run beside the one it reproduces"),
        )  # fmt: skip
        _score_too(project, run)


def _sentences(found: Comparison) -> None:
    show = st.success if found.is_exact else st.info
    show("  \n".join(plain(told(sentence)) for sentence in found.sentences), icon=":material/compare_arrows:")


def _row(line: Line) -> dict[str, Any]:
    return {
        _("What"): told(line.what), _("In the bundle"): told(line.there), _("Here"): told(line.here),
        _("Verdict"): _(VERDICTS[line.verdict]), _("Note"): told(line.note),
    }  # fmt: skip


def _score_too(project: Project, run: Run) -> None:
    """The scorecards that the bundle has and this run has not, each by a job of its own."""
    job = newest_job(project.folder, "evaluate")
    due = comparing.scorecards_due(project, run.id)
    if job and job.live:
        job_panel(project.folder, job, "train.reproduced.job")
    elif due and st.button(_("Score it as the bundle was"), key="train.reproduced.score"):
        for each in due:
            runs.start_evaluate(project, run.id, each.step, each.limit, each.suite)
        st.rerun()
