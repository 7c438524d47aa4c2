"""Checkpoints of XTuner on this machine: look inside, then bring one into the project as a run of its own."""

from pathlib import Path
from typing import Any

import streamlit as st

from studio import runs
from studio.foreign.xtuner import checkpoints_in, is_checkpoint, open_checkpoint
from studio.paths import human_bytes, typed_path
from studio.projects import Project
from studio.ui import state
from studio.ui.i18n import _
from studio.ui.job_panel import job_panel, newest_job
from studio.ui.widgets import guarded, plain

LOOKED = "checkpoints.import.looked"
EXAMPLE = "work_dirs/my_run/iter_96.pth"


def import_view(project: Project, is_open: bool) -> None:
    """A folded form; open where there is nothing else to see."""
    job_panel(project.folder, newest_job(project.folder, "import_checkpoint"), "checkpoints.import.job")
    with st.expander(_("Bring in a checkpoint of XTuner"), icon=":material/move_to_inbox:", expanded=is_open):
        st.caption(
            _(
                "An iter_N.pth, the folder of that name that DeepSpeed writes, or the work folder that holds them. "
                "Nothing in it runs. It becomes a run of this project, to convert, compare, score and continue from."
            )
        )
        path = st.text_input(_("File or folder on this machine"), key="checkpoints.import.path", placeholder=EXAMPLE)
        if st.button(_("Look inside"), key="checkpoints.import.look"):
            state.keep(LOOKED, path.strip())
        if path.strip() and state.kept(LOOKED) == path.strip():
            with guarded():
                if chosen := _chosen(typed_path(path.strip())):
                    _found(project, chosen)


def _chosen(path: Path) -> Path | None:
    """The path itself, or one of the checkpoints in a work folder."""
    if not path.is_dir() or is_checkpoint(path):
        return path
    inside = checkpoints_in(path)
    return st.selectbox(
        _("Checkpoint in this folder"), inside, format_func=lambda each: str(each.relative_to(path)),
        key=f"checkpoints.import.chosen.{path}",
    ) if inside else path  # fmt: skip


def _found(project: Project, path: Path) -> None:
    """What is in it, and the button that brings it in."""
    facts = open_checkpoint(path).facts()
    st.dataframe([_row(facts)], hide_index=True, column_config=_columns(), alt=_("What is in the checkpoint"))
    base = st.text_input(
        _("Base model"),
        value=str(facts["base"]),
        key="checkpoints.import.base",
        help=_("As its config names it; change it where the model lies elsewhere on this machine."),
    )
    if st.button(_("Bring it in"), type="primary", disabled=not base.strip(), key="checkpoints.import.start"):
        runs.import_checkpoint(project, path, base.strip())
        state.keep(LOOKED, "")
        state.flash(_("{name} is being read; it becomes a run of this project.").format(name=plain(path.name)))
        st.rerun()


def _row(facts: dict[str, Any]) -> dict[str, Any]:
    lora = facts["lora"]
    return {
        "method": facts["method"],
        "iteration": facts["iteration"],
        "step": facts["step"],
        "loss": facts["last loss"],
        "adapter": f"r {lora['rank']}, alpha {lora.get('lora_alpha', '?')}" if lora else "–",
        "template": facts["template"] or "–",
        "weights": human_bytes(facts["weight bytes"]),
        "layout": facts["layout"],
    }


def _columns() -> dict[str, Any]:
    return {
        "method": st.column_config.TextColumn(_("Method")),
        "iteration": st.column_config.NumberColumn(
            _("Iterations"), format="%d", help=_("XTuner counts micro-batches; a step here is one optimizer update.")
        ),
        "step": st.column_config.NumberColumn(_("Steps"), format="%d"),
        "loss": st.column_config.NumberColumn(_("Last loss"), format="%.3f"),
        "adapter": st.column_config.TextColumn(_("Adapter")),
        "template": st.column_config.TextColumn(_("Template")),
        "weights": st.column_config.TextColumn(_("Weights")),
        "layout": st.column_config.TextColumn(_("Layout")),
    }
