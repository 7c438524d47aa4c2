"""Tokens of a row, coloured by whether they are trained. Their texts travel as data and are set as text, not HTML."""

from collections.abc import Sequence

import streamlit as st

from studio.row_life import Chip
from studio.ui.i18n import _

CSS = """
.tokens { font-family: var(--st-code-font); font-size: 0.9em; line-height: 2.05; white-space: pre-wrap;
          overflow-wrap: anywhere; max-height: 26em; overflow-y: auto; padding: 0.5em 0.7em;
          border: 1px solid var(--st-border-color); border-radius: var(--st-base-radius);
          background: var(--st-background-color); color: var(--st-text-color); }
.tokens:focus-visible { outline: 2px solid var(--st-primary-color); }
.token { padding: 0.18em 0; border-bottom: 2px solid transparent; border-radius: 3px; margin-right: 1px;
         background: var(--st-secondary-background-color); color: var(--st-gray-text-color); }
.trained { background: var(--st-green-background-color); color: var(--st-green-text-color);
           border-bottom-color: var(--st-green-text-color); }
.cut { background: var(--st-red-background-color); color: var(--st-red-text-color); text-decoration: line-through; }
.sign { opacity: 0.55; }
"""

JS = """
export default function ({ data, parentElement }) {
  let box = parentElement.querySelector(".tokens");
  if (!box) {
    box = document.createElement("div");
    box.className = "tokens";
    box.tabIndex = 0;
    parentElement.appendChild(box);
  }
  box.setAttribute("aria-label", data.label);
  box.replaceChildren();
  for (const [text, id, kind] of data.tokens) {
    const token = document.createElement("span");
    token.className = `token ${kind}`;
    token.title = `${id} · ${data.words[kind]}`;
    text.split("\\n").forEach((line, index) => {
      if (index > 0) {
        const sign = document.createElement("span");
        sign.className = "sign";
        sign.textContent = "↵";
        token.append(sign, "\\n");
      }
      token.append(line);
    });
    box.append(token);
  }
}
"""

_component = st.components.v2.component("retune_tokens", css=CSS, js=JS)


def token_view(shown: Sequence[Chip], key: str) -> None:
    """Trained tokens stand out by colour and underline, cut ones are struck through, the rest is grey; hovering tells
    the ids."""
    _component(
        key=key,
        data={
            "tokens": [[chip.text, " ".join(map(str, chip.ids)), chip.kind] for chip in shown],
            "label": _("Tokens of the row"),
            "words": {"trained": _("trained"), "masked": _("not trained"), "cut": _("cut off")},
        },
    )
