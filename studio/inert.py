"""Text from models and people inside pages that are kept or sent: it stays text, whatever it says."""

import html

_MARKS = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_{}[]()#+-!|<>~&$"})


def html_text(value: object) -> str:
    """Text inside HTML, or inside a quoted attribute."""
    return html.escape(str(value), quote=True)


def markdown_text(value: object) -> str:
    """Text on one line of Markdown."""
    return " ".join(str(value).split()).translate(_MARKS)


def markdown_lines(value: str) -> list[str]:
    """Text as lines of Markdown, breaks kept."""
    return [line.translate(_MARKS) for line in value.splitlines()] or [""]
