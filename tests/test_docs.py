"""The documentation says what is there: commands, pages, presets, links, pictures."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from studio.config.catalog import preset_names
from studio.paths import REPOSITORY

DOCS = REPOSITORY / "docs"
GUIDES = ["guide.md", "guide.zh.md"]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "README.zh.md", *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
ZH_NAMES = {
    "Data": "数据", "Config": "配置", "Train": "训练", "Checkpoints": "检查点", "Compare": "对比", "Serve": "部署",
}  # fmt: skip


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def relative(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load(DOCS / "make_cli_reference.py")


def test_the_command_reference_is_up_to_date() -> None:
    assert text(DOCS / "cli.md") == reference.page(), "run `python docs/make_cli_reference.py`"


@pytest.mark.parametrize(("name", "command"), list(reference.commands()), ids=lambda value: str(value)[:40])
def test_every_command_and_option_is_documented(name: str, command: object) -> None:
    page = text(DOCS / "cli.md")
    section = re.search(rf"^##+ {re.escape(name)}$(.*?)(?=^##+ |\Z)", page, re.MULTILINE | re.DOTALL)
    assert section, name
    for parameter in command.params:  # type: ignore[attr-defined]
        if parameter.name != "help" and not getattr(parameter, "hidden", False):
            words = parameter.opts if parameter.param_type_name == "option" else [parameter.name.upper()]
            assert all(f"`{word}`" in section[1] for word in words), f"{name} {words}"
            assert parameter.help, f"{name} {words} has no help"


@pytest.mark.parametrize("guide", GUIDES)
def test_every_page_has_a_section_in_the_guide(guide: str) -> None:
    headings = re.findall(r"^## (.+)$", text(DOCS / guide), re.MULTILINE)
    names = [path.stem.split("_", 1)[1] for path in sorted((REPOSITORY / "pages").glob("*.py"))]
    wanted = names if guide == "guide.md" else [ZH_NAMES[name] for name in names]
    assert [heading for heading in headings if heading in wanted] == wanted
    assert headings[0] in ("Home", "首页")


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_readme_says_how_to_start(readme: str) -> None:
    page = text(REPOSITORY / readme)
    for words in ("make demo", "make studio", "streamlit run app.py", "ssh -L 8501:127.0.0.1:8501", "retune doctor"):
        assert words in page, words
    assert "make test" in text(REPOSITORY / "README.md")


@pytest.mark.parametrize("document", PAGES, ids=relative)
def test_commands_that_are_shown_exist(document: Path) -> None:
    known = {name for name, _command in reference.commands()}
    shown = re.findall(r"(?:^|`)retune ([a-z][^`\n]*)", text(document), re.MULTILINE)
    unknown = [line for line in shown if not {" ".join(["retune", *line.split()[:n]]) for n in (1, 2)} & known]
    assert document.name == "cli.md" or not unknown


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_documented(name: str) -> None:
    for page in (REPOSITORY / "README.md", DOCS / "guide.md", DOCS / "guide.zh.md"):
        assert f"`{name}`" in text(page), page.name


@pytest.mark.parametrize("document", PAGES, ids=relative)
def test_every_link_and_picture_is_there(document: Path) -> None:
    missing = []
    for target in LINK.findall(text(document)):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        if not file.exists():
            missing.append(target)
        elif anchor and anchor not in anchors(text(file)):
            missing.append(target)
    assert not missing


def anchors(page: str) -> set[str]:
    """The anchors that headings get: lower-case, punctuation dropped, spaces as hyphens."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", PAGES, ids=relative)
def test_pages_speak_of_the_product_alone(document: Path) -> None:
    """No path of one machine, nothing left to be done."""
    found = re.findall(r"(?:^|[\s`(])(/(?:work|tmp|root|home)/\S*)|\b(TODO|FIXME|TBD)\b", text(document))
    assert not found
