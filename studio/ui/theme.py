"""What pages ask about the look; the look itself is in .streamlit/config.toml."""

import streamlit as st


def is_dark() -> bool:
    """Whether the person sees the dark theme (the system's, or their own choice in the menu)."""
    return getattr(st.context.theme, "type", None) == "dark"
