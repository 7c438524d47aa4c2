"""Hostile texts where no browser is needed: reports, names, the shell. What a browser makes of them is walked through
in tests/browser/test_hostile_text.py."""

import html.parser
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest
from markdown_it import MarkdownIt

from studio import chat_export, chats, comparison, datasets, report, run_report, runs
from studio.cli import show
from studio.errors import ProjectError, StudioError
from studio.projects import Project, create_project, list_projects
from studio.store import evaluations, open_db
from tests.browser import workspace
from tests.cli.conftest import run as retune
from tests.hostile_texts import TEXTS

Make = Callable[[Project, str], str]


class Tags(html.parser.HTMLParser):
    """Every tag of a page with its attributes; those of text that was meant as text are none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, [name for name, _ in attrs]))


def tags_of(page: str) -> list[tuple[str, list[str]]]:
    reader = Tags()
    reader.feed(page)
    return reader.found


def scorecard_html(project: Project, text: str) -> str:
    card, answers = the_card(project, text)
    return report.as_html(card, answers)


def scorecard_markdown(project: Project, text: str) -> str:
    card, answers = the_card(project, text)
    return report.as_markdown(card, answers)


def the_card(project: Project, text: str) -> tuple[evaluations.Evaluation, list[evaluations.Answer]]:
    with open_db(project.folder) as db:
        [card] = evaluations.listed(db)
        answers = evaluations.answers(db, card.id)
    card.subject = card.base = text
    return card, answers


def runs_html(project: Project, text: str) -> str:
    return run_report.as_html(comparison.compare(project, [workspace.RUN]), text, "now")


def runs_markdown(project: Project, text: str) -> str:
    return run_report.as_markdown(comparison.compare(project, [workspace.RUN]), text, "now")


def chat_html(project: Project, text: str) -> str:
    return chat_export.exported(project, chats.listed(project)[0].id, "html")


def chat_markdown(project: Project, text: str) -> str:
    return chat_export.exported(project, chats.listed(project)[0].id, "md")


def made(make: Make, *texts: str) -> str:
    """A report in which all that a model or a person said are the texts."""
    project = create_project("Luna")
    workspace.fill(project, *texts)
    workspace.converse(project, *texts)
    return make(project, texts[0])


@pytest.mark.parametrize("make", [scorecard_html, runs_html, chat_html])
def test_a_page_has_the_same_tags_whatever_its_texts_are(make: Make) -> None:
    expected = tags_of(made(make, *(f"word {number}" for number in range(len(TEXTS)))))
    assert "script" not in {tag for tag, _ in expected} and len(expected) > 50
    assert tags_of(made(make, *TEXTS)) == expected


@pytest.mark.parametrize("make", [scorecard_markdown, runs_markdown, chat_markdown])
def test_markdown_has_no_link_image_or_html_whatever_its_texts_are(make: Make) -> None:
    tokens = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(made(make, *TEXTS))
    kinds = {each.type for token in tokens for each in (token, *(token.children or ()))}
    assert "text" in kinds and not kinds & {"link_open", "image", "html_inline", "html_block", "s_open", "em_open"}


def test_names_that_cannot_be_are_refused_and_others_become_slugs(project: Project) -> None:
    refusing: list[Callable[[str], object]] = [
        datasets.checked_name,
        partial(runs.get_run, project),
        partial(runs.start_merge, project, "x-1", 1),
        partial(runs.beginning, project),
    ]
    for text in TEXTS:
        for refuse in refusing:
            with pytest.raises((StudioError, OSError)):  # a name may be too long for the system
                refuse(text)
    for text in TEXTS[::4]:
        with suppress(ProjectError):  # nothing is left of it
            create_project(text)
    assert all(set(each.slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for each in list_projects())


def test_a_terminal_is_not_driven_by_a_text() -> None:
    for text in TEXTS:
        shown = show.plain(text).plain
        assert all(character.isprintable() or character in "\n\t" for character in shown), text


def test_the_shell_says_what_is_wrong_with_a_name_as_text(project: Project) -> None:
    for text in TEXTS[::6]:
        if text.startswith("-") or "\0" in text:
            continue
        said = retune("runs", "show", text, "--project", project.slug, code=1)
        assert "There is no run" in said and "\x1b" not in said
