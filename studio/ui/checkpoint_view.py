"""The checkpoints of a project as a table, and what can be made from the chosen one."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from studio import comparison, exports, runs
from studio.checkpoint_files import glance, verify
from studio.paths import human_bytes
from studio.projects import Project
from studio.store import checkpoints as store
from studio.store import metrics, open_db
from studio.store import runs as store_runs
from studio.store.checkpoints import Checkpoint, Output
from studio.store.jobs import Job
from studio.ui import state
from studio.ui.export_view import export_section
from studio.ui.frame import COMPARE, SERVE, link
from studio.ui.i18n import _
from studio.ui.job_panel import job_panel, newest_job
from studio.ui.told import told
from studio.ui.widgets import ago, plain


@dataclass(frozen=True)
class Row:
    """A checkpoint with what is known about it. `problem` is empty when its file looks sound; `standing` says whether
    its scorecard recommends it or calls it overfitted."""

    checkpoint: Checkpoint
    method: str
    base: str
    valid_loss: float | None
    converted: bool
    merged: Output | None
    problem: str
    standing: str = ""

    @property
    def label(self) -> str:
        return f"{self.checkpoint.run_id} · {_('step {step}').format(step=self.checkpoint.step)}"


def load_rows(project: Project) -> list[Row]:
    """All checkpoints, newest first."""
    with open_db(project.folder) as db:
        found = store.listed(db)
        merged = {(output.run_id, output.step): output for output in reversed(store.outputs(db, "merged"))}
        known = {run.id: run for run in store_runs.listed(db)}
        losses = {run_id: metrics.series(db, run_id, "valid/loss") for run_id in {each.run_id for each in found}}
    standing = comparison.standing(project)
    rows = []
    for each in found:
        run = known.get(each.run_id)
        loss = next(
            (p.value for p in reversed(losses[each.run_id]) if p.step <= each.step and p.value is not None), None
        )
        rows.append(
            Row(
                checkpoint=each,
                method=run.method if run else "",
                base=run.base if run else project.base,
                valid_loss=loss,
                converted=runs.is_converted(project, each.run_id, each.step),
                merged=merged.get((each.run_id, each.step)),
                problem=glance(project.path(each.path)),
                standing=standing.get((each.run_id, each.step), ""),
            )
        )
    return rows


def choose_row(rows: Sequence[Row]) -> Row:
    """Draw the table and return the chosen checkpoint: the newest until another is clicked."""
    event = st.dataframe(
        [_table_row(row) for row in rows],
        hide_index=True,
        on_select="rerun",
        selection_mode="single-row-required",
        selection_default={"selection": {"rows": [0]}},
        key="checkpoints.table",
        column_config={
            "loss": st.column_config.NumberColumn(_("Validation loss"), format="%.3f"),
            "run": st.column_config.TextColumn(_("Run"), width="medium"),
            "step": st.column_config.NumberColumn(_("Step"), format="%d"),
            "best": st.column_config.TextColumn(_("Best"), help=_("The best one of its run by record.best_by.")),
            "advice": st.column_config.TextColumn(
                _("Advice"),
                width=115,
                help=_("By its scorecard beside the others of its run; Compare's tab Runs gives the reason."),
            ),
            "method": st.column_config.TextColumn(_("Method")),
            "size": st.column_config.TextColumn(_("Size")),
            "saved": st.column_config.TextColumn(_("Saved")),
            "hf": st.column_config.TextColumn(_("Hugging Face form")),
            "merged": st.column_config.TextColumn(_("Merged model")),
            "file": st.column_config.TextColumn(_("File")),
        },
        alt=_("Checkpoints of this project"),
        placeholder="–",
    )
    chosen = event.selection.rows
    return rows[chosen[0]] if chosen and chosen[0] < len(rows) else rows[0]


def _table_row(row: Row) -> dict[str, object]:
    each = row.checkpoint
    return {
        "run": each.run_id,
        "step": each.step,
        "best": f"★ {each.score:.3f}" if each.is_best and each.score is not None else "",
        "advice": {"recommended": _("★ recommended"), "overfitted": _("✕ overfitted")}.get(row.standing, ""),
        "method": row.method,
        "loss": row.valid_loss,
        "size": human_bytes(each.size_bytes),
        "saved": ago(each.created_at),
        "hf": _("converted") if row.converted else "–",
        "merged": _merged_word(row.merged),
        "file": told(row.problem) or _("complete"),
    }


def _merged_word(merged: Output | None) -> str:
    if merged is None:
        return "–"
    return _("verified") if merged.detail.get("verified") else _("differs: see below")


def checkpoint_view(project: Project, row: Row) -> None:
    """What the chosen checkpoint is, what can be made from it, and its paths."""
    each = row.checkpoint
    st.subheader(plain(row.label), anchor=False)
    if row.problem:
        st.error(_("This checkpoint cannot be used: {problem}.").format(problem=plain(told(row.problem))))
    convert, check, delete = st.columns(3, border=True)
    with convert:
        _convert_card(project, row)
    with check:
        _verify_card(project, row)
    with delete:
        _delete_card(project, row)
    key = f"{each.run_id}.{each.step}"
    job_panel(project.folder, _job(project, "convert", row), f"checkpoints.convert.{key}")
    if row.converted:
        with st.container(horizontal=True):
            link(COMPARE, _("Ask it and score it"))
            link(SERVE, _("Serve it"))
    export_section(project, each, row.method, row.base)
    _paths(project, row)


def _job(project: Project, kind: str, row: Row) -> Job | None:
    return newest_job(project.folder, kind, run_id=row.checkpoint.run_id, step=row.checkpoint.step)


def _busy(project: Project, kind: str, row: Row) -> bool:
    job = _job(project, kind, row)
    return job is not None and job.live


def _convert_card(project: Project, row: Row) -> None:
    st.markdown(f"**{_('Hugging Face form')}**")
    st.caption(_("An adapter or a full model that transformers and peft load."))
    full = st.checkbox(_("32-bit weights"), key="checkpoints.fp32", help=_("Twice the size; no rounding."))
    label = _("Convert again") if row.converted else _("Convert")
    busy = _busy(project, "convert", row)
    if (
        st.button(label, type="secondary" if row.converted else "primary", disabled=busy, key="checkpoints.convert")
        and not busy
    ):
        runs.start_convert(project, row.checkpoint.run_id, row.checkpoint.step, fp32=full)
        st.rerun()


def _verify_card(project: Project, row: Row) -> None:
    st.markdown(f"**{_('Verify the file')}**")
    st.caption(_("Reads every byte and compares with what was saved."))
    key = f"checkpoints.verified.{row.checkpoint.run_id}.{row.checkpoint.step}"
    if st.button(_("Verify"), key="checkpoints.verify"):
        with st.spinner(_("Reading {size}").format(size=human_bytes(row.checkpoint.size_bytes))):
            state.keep(key, verify(project.path(row.checkpoint.path)))
    result = state.kept(key)
    if result == "":
        st.markdown(f":material/verified: {_('Every byte is as it was saved.')}")
    elif result:
        st.markdown(f":material/error: {plain(result)}")


def _delete_card(project: Project, row: Row) -> None:
    st.markdown(f"**{_('Delete')}**")
    st.caption(_("Frees {size}. What was converted from it stays.").format(size=human_bytes(row.checkpoint.size_bytes)))
    with st.popover(_("Delete"), icon=":material/delete:"):
        st.markdown(_("Delete {name} for good? A run cannot be resumed from it then.").format(name=plain(row.label)))
        if st.button(_("Delete for good"), type="primary", key="checkpoints.delete"):
            runs.delete_checkpoint(project, row.checkpoint.run_id, row.checkpoint.step)
            state.flash(_("Deleted."))
            st.rerun()


def _paths(project: Project, row: Row) -> None:
    each = row.checkpoint
    hf_folder = runs.hf_folder(project, each.run_id, each.step)
    with st.expander(_("Paths"), icon=":material/folder:"):
        paths = [(_("Checkpoint"), project.path(each.path))]
        paths += [(_("Hugging Face form"), hf_folder)] if row.converted else []
        paths += [(_("Merged model"), project.path(row.merged.path))] if row.merged else []
        for label, path in paths:
            st.caption(label)
            st.code(str(path), language=None, wrap_lines=True)
    with st.expander(_("The same in a shell"), icon=":material/terminal:"):
        st.code("\n".join(shell_lines(project, row, hf_folder)), language="bash", wrap_lines=True)


def shell_lines(project: Project, row: Row, hf_folder: Path) -> list[str]:
    """The commands that do what the buttons do."""
    each = row.checkpoint
    name = Path(each.path).name
    lines = [["retune", "convert", "pth_to_hf", each.run_id, name, str(hf_folder), "--project", project.slug]]
    lines[0] += ["--overwrite"] if row.converted else []
    if row.method in exports.METHODS["merged"]:
        merged = project.path("merged", f"{each.run_id}-step_{each.step}")
        lines.append(["retune", "convert", "merge", row.base, str(hf_folder), str(merged)])
    if row.method in exports.METHODS["ollama"]:
        lines.append(["retune", "export", "ollama", each.run_id, "--step", str(each.step), "--project", project.slug])
    lines.append(["retune", "evaluate", each.run_id, "--step", str(each.step), "--project", project.slug])
    return [shlex.join(line) for line in lines]
