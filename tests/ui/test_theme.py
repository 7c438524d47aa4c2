"""What the themes put on top of each other can be read: contrast by WCAG's formula."""

import re
import tomllib

import pytest

from studio.paths import REPOSITORY
from studio.ui.frame import STYLE

THEMES = tomllib.loads((REPOSITORY / ".streamlit" / "config.toml").read_text(encoding="utf-8"))["theme"]
READABLE = 4.5
TINT = 0.1  # what is chosen is written in the primary colour on a tenth of it


def channels(color: str) -> list[int]:
    return [int(color[place : place + 2], 16) for place in (1, 3, 5)]


def luminance(color: list[float]) -> float:
    linear = [c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: list[float], other: list[float]) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def on_primary(theme: str) -> str:
    """The colour that style.css gives to the words on primary buttons."""
    found = re.search(r'stBaseButton-primary"\] \{ color: light-dark\((#\w+), (#\w+)\)', STYLE.read_text())
    assert found
    return found[1 if theme == "light" else 2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_on_primary_buttons(theme: str) -> None:
    assert contrast(channels(on_primary(theme)), channels(THEMES[theme]["primaryColor"])) >= READABLE


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("place", ["page", "sidebar"])
def test_what_is_chosen(theme: str, place: str) -> None:
    colors = THEMES[theme] if place == "page" else THEMES[theme]["sidebar"]
    primary, ground = channels(THEMES[theme]["primaryColor"]), channels(colors["backgroundColor"])
    tinted = [TINT * above + (1 - TINT) * below for above, below in zip(primary, ground, strict=True)]
    assert contrast(primary, tinted) >= READABLE


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_and_remarks(theme: str) -> None:
    ground = channels(THEMES[theme]["backgroundColor"])
    for name in ("textColor", "grayTextColor", "linkColor"):
        assert contrast(channels(THEMES[theme][name]), ground) >= READABLE
