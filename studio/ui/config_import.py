"""A Python config of XTuner on the Config page: read without running it, what is otherwise is listed, then opened."""

import streamlit as st

from studio.config.xtuner.importing import Imported, import_bytes, import_file
from studio.paths import typed_path
from studio.ui import config_draft as drafts
from studio.ui.dialogs import dialog
from studio.ui.i18n import _
from studio.ui.told import told
from studio.ui.widgets import guarded, plain

KEY = "config.import"
EXAMPLE = "work_dirs/my_run/my_config.py"


def import_button() -> None:
    """The button that opens the dialog."""
    if st.button(
        _("Bring in XTuner's"), icon=":material/move_to_inbox:", key=f"{KEY}.open",
        help=_("A Python config of XTuner, as it was written or as XTuner dumped it. It is read and never run."),
    ):  # fmt: skip
        dialog(_("A config of XTuner"), _dialog, width="large", icon=":material/move_to_inbox:")


def _dialog() -> None:
    with guarded():
        found = _read()
        if found is None:
            st.caption(
                _("Micro-batches become steps, with the arithmetic shown. Whatever would have to be run is listed.")
            )
            return
        _say(found)
        if st.button(_("Open this config"), type="primary", icon=":material/edit:", key=f"{KEY}.take"):
            drafts.taken(found.config.name, found.text)
            st.rerun()


def _read() -> Imported | None:
    """The config of the file that was chosen; None while there is none."""
    file = st.file_uploader(_("A config (.py)"), ["py"], key=f"{KEY}.file", max_upload_size=1)
    path = st.text_input(
        _("Or a file on this machine"), key=f"{KEY}.path", placeholder=EXAMPLE,
        help=_("Files that it inherits from are found beside it."),
    )  # fmt: skip
    if file is not None:
        return import_bytes(file.getvalue(), file.name)
    return import_file(typed_path(path.strip())) if path.strip() else None


def _say(found: Imported) -> None:
    """What it is, what is otherwise here, and what was not taken over."""
    config = found.config
    st.markdown(f"**{plain(config.name)}** — {plain(config.method)}, {plain(config.model.base)}")
    if found.unread:
        lines = "\n".join(f"- {plain(told(each))}" for each in found.unread)
        st.warning(f"{_('Not taken over:')}\n\n{lines}", icon=":material/warning:")
    for note in found.notes:
        st.caption(plain(told(note)))
    with st.expander(_("As YAML")):
        st.code(found.text, language="yaml", height=320)
