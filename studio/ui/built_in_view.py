"""The built-in configs on the Config page: searched, marked by what fits this machine, opened."""

import streamlit as st

from studio import built_in, machine
from studio.built_in import BuiltIn
from studio.estimate import GIB
from studio.projects import Project
from studio.ui import config_draft as drafts
from studio.ui.dialogs import dialog
from studio.ui.i18n import _
from studio.ui.told import told
from studio.ui.widgets import guarded, plain

KEY = "config.built_in"
SIZES = (0, 2, 4, 9, 15, 35, 75)  # billions of weights at most; 0 for all
MEMORIES = (0, 8, 12, 16, 24, 48, 80, 640)  # GiB at most, as cards and machines with eight of them have
METHODS = {"qlora": "QLoRA", "lora": "LoRA", "full": "full"}
TABLE_HEIGHT, ROW_HEIGHT = 353, 35  # pixels; a row as Streamlit draws it
FITS_WIDTH, INCOMPLETE_WIDTH = 60, 100  # pixels that their headers need, in English and Chinese


def open_button(project: Project) -> None:
    """The button that opens the search."""
    if st.button(
        _("Browse built-in configs"), icon=":material/search:", key=f"{KEY}.open",
        help=_("Configs for 120 models, XTuner's 576 among them."),
    ):  # fmt: skip
        _dialog(project)


def _dialog(project: Project) -> None:
    dialog(_("Built-in configs"), _browse, project, width="large", icon=":material/library_books:")


def _browse(project: Project) -> None:
    with guarded():
        rows = built_in.listed()
        found = _filtered(rows)
        here = machine.device()
        st.caption(
            _("{found} of {all} configs. Memory is for examples as long as may be; this machine has {memory:.0f} GiB.")
            .format(found=len(found), all=len(rows), memory=here.memory_bytes / GIB)
        )  # fmt: skip
        if not found:
            st.info(_("No config has all of this. Take a word or a filter away."), icon=":material/search_off:")
            return
        chosen = _table(found)
        if chosen is None:
            st.caption(_("Choose a row to see what it is, and to open it."))
            return
        _details(project, chosen)


def _filtered(rows: tuple[BuiltIn, ...]) -> list[BuiltIn]:
    words = st.text_input(
        _("Search"), key=f"{KEY}.words", placeholder="internlm2 1_8b alpaca", label_visibility="collapsed",
        icon=":material/search:",
    )  # fmt: skip
    left, middle, right = st.columns(3, vertical_alignment="top")
    families = left.multiselect(
        _("Model"), sorted({row.family for row in rows}), key=f"{KEY}.families", placeholder=_("All")
    )
    recipes = middle.multiselect(
        _("Data"), sorted({row.recipe for row in rows}), key=f"{KEY}.recipes", placeholder=_("All")
    )
    with right:
        methods = st.pills(
            _("Method"), list(METHODS), selection_mode="multi", key=f"{KEY}.methods", format_func=METHODS.get
        )  # fmt: skip
    left, middle, right = st.columns(3, vertical_alignment="bottom")
    size = left.selectbox(_("Size at most"), SIZES, format_func=_billions, key=f"{KEY}.size")
    memory = middle.selectbox(_("Memory at most"), MEMORIES, format_func=_gib, key=f"{KEY}.memory")
    fitting = right.toggle(_("Only what fits this machine"), key=f"{KEY}.fits")
    return built_in.search(rows, words or "", families, methods or (), recipes, fitting, size, memory)


def _billions(number: int) -> str:
    return _("{number} billion weights").format(number=number) if number else _("All")


def _gib(number: int) -> str:
    return f"{number} GiB" if number else _("All")


def _table(found: list[BuiltIn]) -> BuiltIn | None:
    """The rows; the one that is chosen."""
    event = st.dataframe(
        [
            {
                "fits": "✓" if row.fits else "", "name": row.name, "size": row.billions, "method": row.method,
                "memory": row.memory_bytes / GIB, "data": _(row.about), "missing": "✓" if row.missing else "",
            }
            for row in found
        ],
        hide_index=True, on_select="rerun", selection_mode="single-row",
        height=min(TABLE_HEIGHT, ROW_HEIGHT * (len(found) + 1) + 3),
        key=f"{KEY}.table.{hash(tuple(row.name for row in found))}",
        column_config={
            "fits": st.column_config.TextColumn(
                _("Fits"), width=FITS_WIDTH, help=_("It needs less memory than this machine has.")
            ),
            "name": st.column_config.TextColumn(_("Name"), width="large"),
            "size": st.column_config.NumberColumn(_("Size"), format="%.1f B", width="small"),
            "method": st.column_config.TextColumn(_("Method"), width="small"),
            "memory": st.column_config.NumberColumn(_("Memory"), format="%.1f GiB", width="small"),
            "data": st.column_config.TextColumn(_("Data")),
            "missing": st.column_config.TextColumn(
                _("Incomplete"), width=INCOMPLETE_WIDTH, help=_("Part of it cannot be done in Retune yet.")
            ),
        },
    )  # fmt: skip
    selected = event.selection.rows
    return found[selected[0]] if selected and selected[0] < len(found) else None


def _details(project: Project, row: BuiltIn) -> None:
    st.markdown(f"**{plain(row.name)}** — {plain(row.base)}, {plain(_(row.about))}")
    if row.missing:
        st.warning(plain(told(row.missing)), icon=":material/construction:")
    if not row.fits:
        st.caption(_("It needs more memory than this machine has; the Config page suggests what would fit."))
    if st.button(_("Open this config"), type="primary", icon=":material/edit:", key=f"{KEY}.take"):
        with guarded():
            drafts.opened(project, f"{drafts.PRESET}:{row.name}")
            st.rerun()
