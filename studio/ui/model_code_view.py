"""Python code that a base model brings: what would run, its hashes, consent to exactly these files, taking it back."""

from pathlib import Path

import streamlit as st

from studio import model_code, models
from studio.model_code import Need
from studio.ui import state
from studio.ui.dialogs import dialog
from studio.ui.i18n import N_, _
from studio.ui.widgets import guarded, plain

WORDS: dict[Need, str] = {
    "wanted": N_("This model is computed by Python code in its own folder. It is not run unless you consent to it."),
    "changed": N_("The code of this model changed since you consented to it, so it is not run."),
    "elsewhere": N_(
        "This model takes its code from another place, and what is not here cannot be looked at or consented to. "
        "Choose another model, or put the code into the folder itself."
    ),
    "given": N_("You consented to the code that this model brings; it runs whenever the model is loaded."),
}


def offer_code(base: str, key: str) -> None:
    """What there is to know of a model's own code, and the button to it; nothing for a model that needs none."""
    model = models.resolve(base)
    standing = model_code.need(model.folder) if model.present else "no"
    if standing == "no":
        return
    with st.container(gap="xsmall"):
        if standing == "given":
            st.caption(f":material/verified_user: {_(WORDS[standing])}")
        else:
            st.warning(_(WORDS[standing]), icon=":material/shield:")
        if standing != "elsewhere" and st.button(_("Look at its code"), icon=":material/code:", key=f"{key}.code"):
            dialog(_("Code of the model"), _dialog, model.folder, key, width="large", icon=":material/shield:")


def _dialog(folder: Path, key: str) -> None:
    with guarded():
        files = model_code.code_files(folder)
        st.markdown(
            _(
                "Such code can do whatever you can do on this machine. Consent only if you trust who wrote it. "
                "It holds for these very files: when one changes, or one more appears, nothing runs before you "
                "consent again."
            )
        )
        st.caption(plain(folder))
        _files(folder, files, key)
        _consent(folder, files, key)


def _files(folder: Path, files: dict[str, str], key: str) -> None:
    rows = [{"file": name, "bytes": (folder / name).stat().st_size, "sha256": digest} for name, digest in files.items()]
    st.dataframe(
        rows, hide_index=True, height="content" if len(rows) <= 6 else 240, alt=_("Python files of the model"),
        column_config={
            "file": st.column_config.TextColumn(_("File"), width="medium"),
            "bytes": st.column_config.NumberColumn(_("Bytes"), format="%d", width="small"),
            "sha256": st.column_config.TextColumn(
                "SHA-256", width="large", help=_("Changes with every change of the file; the consent is bound to it.")
            ),
        },
    )  # fmt: skip
    name = st.selectbox(_("Read a file"), list(files), key=f"{key}.code.file")
    if name:
        st.code(model_code.source_of(folder, name), language="python", height=320, line_numbers=True)


def _consent(folder: Path, files: dict[str, str], key: str) -> None:
    if model_code.is_trusted(folder):
        if st.button(_("Take consent back"), icon=":material/block:", key=f"{key}.code.revoke"):
            model_code.distrust(folder)
            state.flash(_("The code in {folder} is not run any more.").format(folder=plain(folder.name)))
            st.rerun()
        return
    read = st.checkbox(_("I have looked at these files, and trust who wrote them."), key=f"{key}.code.read")
    if st.button(
        _("Let this code run"), type="primary", icon=":material/check:", disabled=not read, key=f"{key}.code.trust"
    ):
        model_code.trust(folder, files)
        state.flash(_("The code in {folder} runs from now on.").format(folder=plain(folder.name)))
        st.rerun()
