"""Messages of the rooms below in Chinese: each template is one that the sources still write, and comes back filled."""

import ast
import errno
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from studio import errors, jobs
from studio.data.lint.findings import RULES
from studio.data.rows import parse
from studio.engine.health import Health
from studio.engine.job import STOPPED, STOPPED_BY_SYSTEM, STOPPED_WITHOUT_SAVING, explain
from studio.errors import ConfigError, Problem, StudioError
from studio.paths import REPOSITORY, require_free_space
from studio.store.jobs import Job
from studio.ui import told as module
from studio.ui.i18n import LOCALES
from studio.ui.told import SLOT

SENTENCES: dict[str, str] = YAML(typ="safe").load((LOCALES / "zh" / "told.yaml").read_text(encoding="utf-8"))
# Written by Python's parser.
BROKEN_JSON = ('{"a": "x', '{"a": "\n"}', '{"a": }', "{a}", "1 2")
JSON_WORDS = {
    "Unterminated string", "Invalid control character", "Expecting value",
    "Expecting property name enclosed in double quotes", "Extra data",
}  # fmt: skip


def in_chinese(text: str) -> str:
    return module._told(text, "zh")


def templates_in(source: Path) -> Iterator[str]:
    """Every text of a module, a {0}, {1}… for what is filled in; each line of it by itself too."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        yield from templates_of(node)


def templates_of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.JoinedStr):
        yield from _lines("".join(each.value if isinstance(each, ast.Constant) else "\0" for each in node.values))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from _lines(node.value)


def _lines(text: str) -> Iterator[str]:
    for line in (text, *text.split("\n")):
        first, *others = line.split("\0")
        yield first + "".join(f"{{{number}}}{text}" for number, text in enumerate(others))


def test_every_template_is_one_that_is_written() -> None:
    written = {text for path in (REPOSITORY / "studio").rglob("*.py") for text in templates_in(path)}
    made_of_parts = {"edited row {0}", "deleted row {0}", "row {0} (line {1}): {2}", "{0} (allowed: {1})"}
    assert not set(SENTENCES) - written - made_of_parts - JSON_WORDS


@pytest.mark.parametrize("english", SENTENCES)
def test_fillings_stand_in_both(english: str) -> None:
    assert sorted(SLOT.findall(english)) == sorted(SLOT.findall(SENTENCES[english]))
    fillings = {slot: f"<{slot[1]}>" for slot in SLOT.findall(english)}
    filled = in_chinese(SLOT.sub(lambda slot: fillings[slot[0]], english))
    assert filled == SLOT.sub(lambda slot: fillings[slot[0]], SENTENCES[english])


def test_what_is_wrong_with_json_is_said_with_one_place() -> None:
    problems = [parse(text.encode())[1] for text in BROKEN_JSON]
    assert {problem.removeprefix("is not valid JSON: ").rsplit(" at ", 1)[0].split(" at line")[0]
            for problem in problems} == JSON_WORDS  # fmt: skip
    assert problems[0] == "is not valid JSON: Unterminated string at column 7."
    assert in_chinese(problems[0]) == "不是有效的 JSON：字符串没有结束（第 7 列）。"


def test_a_list_of_bad_rows() -> None:
    message = "a.csv: 2 of 9 rows cannot be used:\n  - row 3: the text is empty.\n  - row 4 (line 5): who knows\n"
    assert in_chinese(message) == (
        "a.csv：9 行中有 2 行不能用：\n  - 第 3 行：文本是空的。\n  - 第 4 行（文件第 5 行）：who knows\n"
    )


def test_a_reason_that_all_rows_share() -> None:
    message = "a.csv: 9 of 9 rows cannot be used:\n  - all 9 rows: the text is empty.\n"
    assert in_chinese(message) == "a.csv：9 行中有 9 行不能用：\n  - 全部 9 行：文本是空的。\n"


def test_what_is_filled_in_is_told_too_and_braces_stay() -> None:
    assert in_chinese('the format is not recognised: it has "chosen" and "rejected".').startswith("无法识别格式：它有")
    assert in_chinese("There is no file '{0}{x}'.") == "没有文件 '{0}{x}'。"
    assert in_chinese("Nobody wrote this.") == "Nobody wrote this."
    assert module._told("There is no file 'a'.", "en") == "There is no file 'a'."
    assert in_chinese("is empty. " * 500) == "is empty. " * 500


def test_every_rule_is_explained() -> None:
    assert {text for rule in RULES.values() for text in (rule.reason, rule.remedy)} <= set(SENTENCES)


def causes() -> Iterator[str]:
    """How runs and jobs end, as their rows keep it: message and hint in one text."""
    for losses in ((), (2.0,)):
        health = Health(3, 5.0, 0.001)
        for step, loss in enumerate(losses, 1):
            health.good_step(step, loss)
        with pytest.raises(StudioError) as broke:
            for step in (4, 5, 6):
                health.bad_step(step, "loss nan")
        yield str(broke.value)
    yield str(health.spoilt(9))
    yield explain(OSError(errno.ENOSPC, "No space left on device"), REPOSITORY)
    yield explain(RuntimeError("DefaultCPUAllocator: can't allocate memory"), REPOSITORY)
    with pytest.raises(StudioError) as full:
        require_free_space(REPOSITORY, 2**60, "the first checkpoint")
    yield str(full.value)
    yield from (jobs.KILLED, STOPPED, STOPPED_WITHOUT_SAVING, STOPPED_BY_SYSTEM)
    yield jobs._how_it_died(Job("train", boot_id="another"))
    yield jobs._how_it_died(Job("train", pid=0))
    yield "Rank 1: " + explain(MemoryError("no room"), REPOSITORY)


def test_how_a_run_ended_is_said_in_chinese() -> None:
    """Names of settings, sizes and what a library said stay; no English sentence does."""
    english = re.compile(r"\b(the|is|are|was|its|try|free some|checkpoints)\b")
    for said in map(in_chinese, causes()):
        assert said.endswith("。") and not english.search(said.lower()), said


WORDS = re.compile(r"[a-z]{2,} [a-z]{2,}")
ROOMS_OF_JOBS = ("engine", "foreign", "data", "models.py", "model_code.py", "model_shapes.py", "weight_folders.py",
                 "conversions.py", "paths.py", "checkpoint_files.py")  # fmt: skip


def errors_in(source: Path) -> Iterator[str]:
    """What the errors of a module say and what they advise, where it is written in the error itself."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and hasattr(errors, node.func.id):
            for argument in node.args:
                yield from (text for text in templates_of(argument) if "\n" not in text and WORDS.search(text))


def test_what_a_job_can_end_with_is_told_in_chinese() -> None:
    """Each message and each hint of an error in the rooms where jobs do their work has a template."""
    rooms = [REPOSITORY / "studio" / room for room in ROOMS_OF_JOBS]
    sources = [path for room in rooms for path in (room.rglob("*.py") if room.is_dir() else [room])]
    said = {text for path in sources for text in errors_in(path)}
    assert len(said) > 300 and not {text for text in said if in_chinese(text) == text}


def test_a_hint_is_told_behind_what_a_library_said() -> None:
    foreign = (
        "The model in 'm' cannot be loaded: KeyError: lm_head Check that the files are complete (fetch it again) "
        "and that transformers knows this architecture."
    )
    assert in_chinese(foreign) == (
        "无法加载 'm' 中的模型：KeyError：lm_head。请确认文件完整（可重新获取），并且 transformers 支持这种结构。"
    )
    assert in_chinese("Who knows this. Fetch the model again.") == "Who knows this. 请重新获取模型。"


def test_a_long_list_of_a_library_stays_as_it_is() -> None:
    """Not every part of it is what a message is about."""
    listed = ", ".join(["12"] * 990)
    assert in_chinese(listed) == listed and in_chinese(f"train.seed: {listed}") == f"train.seed: {listed}"


def test_problems_of_a_config_are_told_one_by_one() -> None:
    wrong = [Problem("model.device", "is no device: 'x'", "auto, cpu"), Problem("data.pack", "who knows")]
    assert in_chinese(str(ConfigError(wrong, "demo"))) == (
        "demo 有 2 处问题：\n  - model.device: 不是设备：'x'（允许：auto, cpu）\n  - data.pack: who knows\n"
        "请改正后再试；什么都没有启动。"
    )
