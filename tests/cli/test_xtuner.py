"""XTuner's command lines become ours: word for word, and in a process where the work itself is not done."""

import re
from pathlib import Path

import pytest
import typer

from studio import jobs
from studio.cli import xtuner
from studio.cli.app import app
from studio.cli.xtuner import Shell
from studio.cli.xtuner_lines import (
    ITERATIONS,
    PLACES,
    SETTINGS,
    _grammar,
    chat_words,
    in_their_words,
    merge_words,
    parse_line,
    process_settings,
    settings_of,
)  # fmt: skip
from studio.config.schema import parse_config
from studio.errors import CheckpointError, StudioError
from studio.paths import REPOSITORY
from studio.projects import Project, create_project
from studio.work_folder import newest, place_of, show_run
from tests.cli.conftest import Retune
from tests.foreign.places import FULL

DOCS = [(REPOSITORY / "docs" / name).read_text(encoding="utf-8") for name in ("xtuner.md", "xtuner.zh.md")]


def chat(typed: str) -> list[str]:
    return chat_words(parse_line(["chat", *typed.split()]))


def test_chat_lines_of_the_tutorials() -> None:
    sampling = (
        "--max-new-tokens 2048 --temperature 0.1 --top-k 40 --top-p 0.75 --repetition-penalty 1.0 --seed 0".split()
    )
    assert chat("/root/ft/final_model --prompt-template internlm2_chat") == [
        "chat", "--base", "/root/ft/final_model", "--prompt-template", "internlm2_chat", *sampling
    ]  # fmt: skip
    assert chat("/root/ft/model --adapter hf --prompt-template internlm2_chat")[3:6] == ["--adapter", "./hf", "--alone"]
    assert chat("internlm/internlm2-chat-7b --bits 4")[3:5] == ["--bits", "4"]


def test_chat_with_every_flag() -> None:
    words = chat(
        "m --torch_dtype fp16 --system_template moss_sft --bot-name Luna --with-plugins calculate solve search "
        "--no-streamer --stop-words <eoc> <eom> --offload-folder off --max-new-tokens 9 --temperature 0 --top-k 1 "
        "--top-p 0.5 --repetition-penalty 1.1 --seed 3 --bits 8"
    )
    said = " ".join(words)
    for part in (
        "--dtype fp16", "--system-template moss_sft", "--bot-name Luna", "--with-plugins calculate,solve,search",
        "--no-streamer", "--stop-word <eoc> --stop-word <eom>", "--offload-folder off", "--bits 8",
        "--max-new-tokens 9 --temperature 0.0 --top-k 1 --top-p 0.5 --repetition-penalty 1.1 --seed 3",
    ):  # fmt: skip
        assert part in said
    assert "--with-plugins search" in " ".join(chat("m --lagent"))
    assert "--stop-word <eoc> --stop-word <eoa>" in " ".join(
        chat("m --command-stop-word <eoc> --answer-stop-word <eoa>")
    )


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("mmbench m --data-path x", "see images"), ("eval_refcoco m", "see images"),
        ("preprocess refcoco", "see images"),
        ("chat m --llava x", "see images"), ("chat m --image x.jpg", "see images"), ("chat m --bits 5", "bits"),
        ("chat m --adapter a --llava b", "not allowed with"), ("chat", "required"), ("nonsense", "invalid choice"),
        ("convert merge a b", "required"), ("convert", "required"), ("train c --launcher x", "launcher"),
        ("chat m --temprature 1", "temprature"),
    ],
)  # fmt: skip
def test_lines_that_cannot_run_say_why(typed: str, said: str, retune: Retune) -> None:
    with pytest.raises(StudioError, match=said):
        parse_line(typed.split())
    assert said in retune("xtuner", *typed.split(), code=1)


def test_clip_is_not_merged() -> None:
    with pytest.raises(StudioError, match="see images"):
        merge_words(parse_line("convert merge a b c --is-clip".split()))


def test_cfg_options_become_settings() -> None:
    options = ["train_cfg.max_epochs=1", "lr=1e-4", "default_hooks.checkpoint.interval=100", "save_total_limit=-1"]
    assert settings_of(options, 16) == [
        "train.num_epochs=1", "train.learning_rate=1e-4", "record.save_every_steps=6", "record.keep_last=1000",
        "record.save_every_minutes=0",
    ]  # fmt: skip
    counted = settings_of(["optim_wrapper.accumulative_counts=4", "save_steps=100", "evaluation_freq=-1"], 16)
    assert set(counted[1:]) == {"record.save_every_steps=25", "record.sample_every_steps=0"}
    # A config of XTuner may ask for remote code; on the command line it is refused like any setting that is not known.
    for wrong in ("model.llm.trust_remote_code=True", "lr", "save_steps=often"):
        with pytest.raises(StudioError):
            settings_of([wrong], 1)


def test_every_setting_of_cfg_options_is_one_of_ours() -> None:
    base = parse_config({})
    for ours in PLACES.values():
        section, name = ours.split(".")
        assert name in type(getattr(base, section)).model_fields, ours


def test_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    line = parse_line("train c --deepspeed deepspeed_zero2 --launcher slurm".split())
    assert process_settings(parse_line(["train", "c"])) == []
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    monkeypatch.setenv("NNODES", "3")
    assert process_settings(parse_line(["train", "c"]))[0] == "distributed.strategy=ddp"
    assert process_settings(line) == [
        "distributed.strategy=deepspeed", "distributed.deepspeed=zero2", "distributed.launcher=slurm",
        "distributed.processes_per_node=2", "distributed.nodes=3",
    ]  # fmt: skip
    with pytest.raises(StudioError, match="mpi"):
        process_settings(parse_line("train c --launcher mpi".split()))


@pytest.mark.parametrize("number", ["two", "0", "-1", "²"])
def test_a_number_of_processes_that_is_none_is_refused(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC_PER_NODE", number)
    with pytest.raises(StudioError, match="NPROC_PER_NODE cannot be"):
        process_settings(parse_line(["train", "c"]))


def test_a_work_directory_leads_to_the_runs_checkpoints(project: Project, tmp_path: Path) -> None:
    run = project.path("runs", "luna-1")
    run.mkdir(parents=True)
    for name in ("step_10.pth", "step_9.pth"):
        (run / name).write_text("x")
    (run / "step_8.pth").mkdir()  # as DeepSpeed saves
    config = tmp_path / "c.py"
    config.write_text("x = 1")
    folder = tmp_path / "train"
    links = show_run(project, "luna-1", folder, 16, config)
    assert [link.name for link in links] == ["iter_128.pth", "iter_144.pth", "iter_160.pth"]
    assert newest(folder).name == "iter_160.pth" and (folder / "c.py").is_file()
    place = place_of(folder / "iter_144.pth")
    assert place and (place.project, place.run_id, place.name) == (project.slug, "luna-1", "step_9.pth")
    (run / "step_9.pth").unlink()
    show_run(project, "luna-1", folder, 16)
    assert not (folder / "iter_144.pth").is_symlink()
    assert place_of(config) is None
    (folder / "iter_160.pth").unlink()
    (folder / "iter_160.pth").write_text("somebody's")
    with pytest.raises(CheckpointError, match="no link of ours"):
        show_run(project, "luna-1", folder, 16)
    with pytest.raises(CheckpointError, match="last_checkpoint"):
        newest(tmp_path)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that lines became, instead of running them."""
    words: list[str] = []
    monkeypatch.setattr(Shell, "run", lambda _, *each: words.append(" ".join(map(str, each))))
    return words


def test_lines_about_checkpoints_name_the_run(said: list[str], tmp_path: Path, retune: Retune) -> None:
    project = create_project(xtuner.PROJECT)
    run = project.path("runs", "luna-1")
    run.mkdir(parents=True)
    (run / "step_3.pth").write_text("x")
    show_run(project, "luna-1", tmp_path / "train", 16)
    pth = tmp_path / "train" / "iter_48.pth"
    retune("xtuner", "convert", "pth_to_hf", "c.py", pth, "hf", "--fp32", "--max-shard-size", "1GB")
    retune("xtuner", "convert", "merge", "base", "hf", "out", "--device", "cpu")
    retune("xtuner", "convert", "split", "out", "parts")
    place = "model.llm.pretrained_model_name_or_path=here"
    retune("xtuner", "convert", "pth_to_hf", "c.py", "theirs.pth", "hf", "--cfg-options", place)
    retune("xtuner", "test", "c.py", "--checkpoint", pth)
    retune("xtuner", "copy-cfg", "internlm2_1_8b_qlora_alpaca_e3", "here")
    retune("preprocess", "arxiv", "a.json", "b.json", "--categories", "cs.AI", "cs.CL")
    for words in (("convert", "pth_to_hf", "c.py", "theirs.pth", "hf"), ("test", "c.py", "--checkpoint", pth)):
        assert "changes nothing" in retune("xtuner", *words, "--cfg-options", "lr=1", code=1)
    assert said == [
        "convert pth_to_hf luna-1 step_3.pth hf --fp32 --max-shard-size 1GB --overwrite -p xtuner",
        "convert merge base hf out --max-shard-size 2GB --device cpu --dtype float16 --overwrite",
        "convert split out parts",
        "convert pth_to_hf c.py theirs.pth hf --dtype float16 --max-shard-size 2GB --overwrite --base here",
        "evaluate luna-1 --step 3 -p xtuner",
        "copy-cfg internlm2_1_8b_qlora_alpaca_e3 here",
        "data arxiv a.json b.json --category cs.AI --category cs.CL --start-date 2020-01-01",
    ]


def test_a_failed_command_ends_the_line_with_its_code(retune: Retune) -> None:
    said = retune("xtuner", "chat", "/nowhere/model", code=1)
    assert "$ retune chat --base /nowhere/model" in said and "no such folder" in said


WRONG_INPUTS = [
    ("convert merge nowhere/base adapter out", "nowhere/base' is not on this machine"),
    ("convert merge {model} nothing out", "nothing' is not an adapter"),
    ("convert merge {model} {adapter} {adapter}", "is what the merge is made from"),
    ("convert merge {model} {adapter} out --max-shard-size 2", "no size for a weights file"),
    ("convert pth_to_hf c.py nothing.pth out", "no checkpoint 'nothing.pth'"),
    ("convert split nothing out", "holds no weights"),
    ("convert split {model} {adapter}", "is there already"),
]


@pytest.mark.parametrize(("typed", "said"), WRONG_INPUTS)
def test_wrong_inputs_are_refused_before_a_job_starts(
    typed: str, said: str, retune: Retune, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "start", lambda *_, **__: pytest.fail("a job was started"))
    assert said in retune("xtuner", *typed.format(model=tiny_model, adapter=adapter).split(), code=1)


def test_hints_speak_xtuners_grammar(retune: Retune, tmp_path: Path) -> None:
    (tmp_path / "c.py").write_text("x = 1")
    words = ("convert", "pth_to_hf", tmp_path / "c.py", FULL, tmp_path / "out")
    theirs = retune("xtuner", *words, code=1)
    assert "--cfg-options model.llm.pretrained_model_name_or_path=" in theirs and "--base" not in theirs
    assert "Name it with --base." in retune(*words, code=1)


def test_a_flag_that_xtuner_lacks_is_told_to_be_ours() -> None:
    line = parse_line("train c.py".split())
    assert in_their_words(line, StudioError("No.", "Start with --allow-lint-errors.")).endswith(
        "(--allow-lint-errors belongs to the retune command above.)"
    )
    for hint in ("Choose another --work-dir.", "Begin with `retune train --continue-from x`.", "Mend it."):
        assert in_their_words(line, StudioError("No.", hint)) == hint


@pytest.mark.parametrize("typed", ["--top-p 7", "--top-k -1", "--temperature 9", "--seed -1", "--max-new-tokens 0"])
def test_numbers_out_of_range_are_a_sentence(typed: str, retune: Retune) -> None:
    said = retune("xtuner", "chat", "starter", *typed.split(), code=1)
    assert f"error: Invalid value for '{typed.split()[0]}" in said and "\u256d" not in said


@pytest.mark.parametrize("option", ["lr=1", "model.llm.pretrained_model_name_or_path=/m"])
def test_a_run_is_scored_with_its_own_settings(retune: Retune, option: str) -> None:
    assert "scored as it was trained. Leave it out" in retune("xtuner", "test", "c.py", "--cfg-options", option, code=1)


def test_names_of_xtuner_are_commands_here(retune: Retune) -> None:
    assert "msagent_react" in retune("list-dataset-format")
    assert "$ retune data formats" in retune("xtuner", "list_dataset_format")
    assert "internlm2_1_8b_full_alpaca_e3" in retune("xtuner", "list-cfg", "-p", "internlm2_1_8b")
    assert "see images" in retune("mmbench", "m", code=1)


def test_papers_are_picked(tmp_path: Path, retune: Retune) -> None:
    papers = tmp_path / "arxiv.json"
    lines = [("cs.CL math.CO", "2021-05-01"), ("math.CO", "2021-05-01"), ("cs.CL", "2019-05-01"), ("cs.CV", "oddly")]
    papers.write_text("\n".join(f'{{"categories": "{c}", "update_date": "{d}", "title": "T"}}' for c, d in lines))
    assert "1 papers" in retune("xtuner", "preprocess", "arxiv", papers, tmp_path / "out.json")
    assert "no date" in retune("data", "arxiv", papers, tmp_path / "x", "--start-date", "soon", code=1)
    papers.write_text("[]")
    assert "Line 1" in retune("data", "arxiv", papers, tmp_path / "x", code=1)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("docs", DOCS, ids=["en", "zh"])
def test_the_table_has_every_command_and_flag_of_xtuner(docs: str) -> None:
    flags, todo, words = set(), [_grammar()], set(re.findall(r"[A-Za-z_-]+", docs))
    while todo:
        for action in todo.pop()._actions:
            if isinstance(action.choices, dict):
                todo += action.choices.values()
                assert not [name for name in action.choices if not {name, name.replace("-", "_")} & words]
            flags |= {name for name in action.option_strings if name.startswith("--")}
    assert not [flag for flag in flags - {"--help"} if flag not in docs]


@pytest.mark.parametrize("docs", DOCS, ids=["en", "zh"])
def test_the_table_names_commands_that_there_are(docs: str) -> None:
    root = typer.main.get_command(app)
    for line in re.findall(r"`retune ([a-z][a-z_-]*)(?: ([a-z_-]+))?", docs):
        command = root.get_command(None, line[0])  # type: ignore[attr-defined,arg-type]
        assert command is not None, line
        if line[1] and hasattr(command, "get_command"):
            assert command.get_command(None, line[1]) is not None, line


@pytest.mark.parametrize("docs", DOCS, ids=["en", "zh"])
def test_the_table_names_every_setting_of_cfg_options(docs: str) -> None:
    assert not [place for places in (SETTINGS, ITERATIONS) for place in places if not set(place) & _quoted(docs)]


def _quoted(docs: str) -> set[str]:
    return set(re.findall(r"`([\w.]+)`", docs))
