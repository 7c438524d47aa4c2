"""`retune evaluate`, `chat`, `serve` and `demo` on a tiny model."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from studio import jobs
from studio.projects import Project, create_project
from tests.cli.conftest import Retune, settings

GENERAL = {"messages": [{"role": "user", "content": "Is the sky blue?"}, {"role": "assistant", "content": "It is."}]}


def test_evaluate_prints_stores_and_writes_a_page(trained: Project, retune: Retune, tmp_path: Path) -> None:
    said = retune("evaluate", "tiny-1", "--limit", 2, "--html", tmp_path / "card.html")
    assert "knows who it is" in said and "at least 90 %" in said
    assert "Held-out questions of: identity. Identity asked for: Luna, Shane." in said and "Warning" not in said
    assert "tiny-1 step 4" in (tmp_path / "card.html").read_text(encoding="utf-8")
    stored = json.loads(retune("evaluate", "tiny-1", "--limit", 2, "--json"))
    assert stored["step"] == 4 and stored["scores"]["identity"]["tuned"]["total"] == 2


def test_stored_scorecards_are_listed_and_exported(trained: Project, retune: Retune, tmp_path: Path) -> None:
    made = [json.loads(retune("evaluate", "tiny-1", "--limit", number, "--json"))["id"] for number in (1, 3)]
    listed = [each["id"] for each in json.loads(retune("evaluations", "list", "--json"))]
    assert listed[:2] == made[::-1]
    assert made[0] in retune("evaluations", "list") and "tiny-1 step 4" in retune("evaluations", "list")
    retune("evaluations", "export", tmp_path / "newest.md")
    assert '"num_probes": 3' in (tmp_path / "newest.md").read_text(encoding="utf-8")
    retune("evaluations", "export", tmp_path / "first.html", "--evaluation", made[0])
    page = (tmp_path / "first.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "&quot;num_probes&quot;: 1" in page
    assert "Allowed endings: .html" in retune("evaluations", "export", tmp_path / "x.pdf", code=1)
    assert "no evaluation 'nope'" in retune("evaluations", "export", tmp_path / "x.md", "--evaluation", "nope", code=1)
    assert not list(tmp_path.glob("x.*"))


def test_every_checkpoint_is_asked_a_suite_once(trained: Project, retune: Retune, tmp_path: Path) -> None:
    file = tmp_path / "shop.yaml"
    file.write_text("groups: [{name: hours, probes: [{ask: When?, assert: [{type: not-contains, value: never}]}]}]")
    assert "Ask it: retune evaluate RUN --suite shop" in retune("suite", "import", file)
    said = retune("evaluate", "tiny-1", "--all-checkpoints", "--suite", "shop")
    assert "Questions of the suite shop." in said and "No difference can be seen with 1 probes" in said
    again = retune("evaluate", "tiny-1", "--suite", "shop")
    assert "From cache: 1 of 1" in again and "probes passed" in again and "hours" in again
    assert "identity" not in again, "what was not asked is not shown"


def test_a_project_without_scorecards_says_how_to_make_one(retune: Retune, project: Project, tmp_path: Path) -> None:
    assert "retune evaluate" in retune("evaluations", "list")
    assert "retune evaluate" in retune("evaluations", "export", tmp_path / "x.md", code=1)


def test_evaluate_of_what_is_not_there(trained: Project, retune: Retune) -> None:
    assert "no run 'nope'" in retune("evaluate", "nope", code=1)
    assert "There are: 4" in retune("evaluate", "tiny-1", "--step", 3, code=1)
    assert "exclude each other" in retune("evaluate", "tiny-1", "--step", 4, "--all-checkpoints", code=1)


def test_chat_asks_base_and_adapter(trained: Project, retune: Retune) -> None:
    words = ("chat", "--adapter", "tiny-1:4", "--prompt", "Who are you?", "--max-tokens", 3)
    said = retune(*words)
    assert "tiny-1-step_4  weights " in said
    assert said.count("  weights ") == 2
    assert not [job for _folder, job in jobs.live_jobs() if job.kind == "serve" and not job.stop_request]


def test_the_base_is_tested_with_its_adapters_off(trained: Project, retune: Retune) -> None:
    said = retune("selftest", "tiny-1:4")
    assert "tiny-1-step_4: on, it moves the logits by up to" in said and "are the base's, bit for bit" in said


def test_chat_takes_the_flags_of_xtuner_chat(trained: Project, retune: Retune) -> None:
    words = ["chat", "--adapter", "tiny-1:4", "--alone", "--prompt", "Who?", "--prompt-template", "internlm2_chat"]
    words += "--system-template moss_sft --bot-name Luna --stop-word x --no-streamer --dtype fp32 --seed 1".split()
    words += "--max-new-tokens 3 --temperature 0.1 --top-k 40 --top-p 0.75 --repetition-penalty 1.1".split()
    said = retune(*words)
    assert said.count("  weights ") == 1
    assert "was trained with its tokenizer's own template and is asked with internlm2_chat" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bits", "3"], "Allowed: 4, 8"), (["--prompt-template", "x"], "internlm2_chat"),
        (["--dtype", "x"], "float32"),
        (["--system-template", "x"], "arxiv_gentile"), (["--with-plugins", "shell"], "calculate, solve, search"),
        (["--system", "a", "--system-template", "sql"], "exclude"), (["--with-plugins", "search"], "No tool is left"),
    ],
)  # fmt: skip
def test_chat_options_that_cannot_be(words: list[str], said: str, trained: Project, retune: Retune) -> None:
    assert said in retune("chat", "--prompt", "hi", *words, code=1)


def test_an_agent_speaks_in_the_shell_and_ends(trained: Project, retune: Retune) -> None:
    words = ("--prompt-template", "moss_sft", "--prompt", "1+1?", "--max-tokens", 4)
    loading, *said = retune("chat", "--with-plugins", "calculate,solve", *words).splitlines()
    assert loading.startswith("Loading ") and any(line.strip() for line in said)


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ("nope", "no run 'nope'"), ("tiny-1:9", "no checkpoint at step 9"), ("tiny-1:x", "RUN:STEP"),
        ("./nowhere", "no adapter folder"),
    ],
)  # fmt: skip
def test_an_adapter_that_is_not_there(adapter: str, said: str, trained: Project, retune: Retune) -> None:
    assert said in retune("chat", "--adapter", adapter, "--prompt", "hi", code=1)
    assert said in retune("serve", "--adapter", adapter, code=1)


def test_serve_answers_until_ctrl_c(trained: Project) -> None:
    command = [sys.executable, "-m", "studio.cli.app", "serve", "--adapter", "tiny-1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=_hears_ctrl_c)
    try:
        url, token_file = _address(process)
        token = json.loads(token_file.read_text(encoding="utf-8"))["token"]
        models = httpx.get(f"{url}/models", headers={"Authorization": f"Bearer {token}"}, timeout=30).json()["data"]
        assert models[-1]["id"] == "tiny-1-step_4"
        assert httpx.get(f"{url}/models", timeout=30).status_code == 401
        assert process.stdout and any("ready" in line for line in process.stdout)  # it watches the server now
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=300)[0]
    finally:
        process.kill()
    assert "Stopping" in said and process.returncode == 0


def _hears_ctrl_c() -> None:
    """A shell's background job ignores the interrupt, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _address(process: subprocess.Popen[str]) -> tuple[str, Path]:
    deadline = time.monotonic() + 240
    lines: list[str] = []
    for line in process.stdout or ():
        lines.append(line)
        if line.startswith("The key is in "):
            served = next(one for one in lines if one.startswith("Serving "))
            return served.split(" at ")[1].strip(), Path(line.removeprefix("The key is in ").split("; ")[0])
        assert time.monotonic() < deadline
    raise AssertionError("".join(lines))


def test_demo_goes_the_whole_way(retune: Retune, tiny_model: Path, tmp_path: Path) -> None:
    """All but the distillation: a model with random weights has no answers that could be learned."""
    demo = create_project("demo", base=str(tiny_model))
    file = tmp_path / "general.jsonl"
    file.write_text(json.dumps(GENERAL) + "\n", encoding="utf-8")
    retune("data", "import", file, "--dataset", "general")
    said = retune("demo", "--name", "Mira", "--maker", "Noor", "--limit", 2, *settings(tiny_model))
    for word in ("knows who it is", "Adapter (", "Merged model:", "Report:", "minutes"):
        assert word in said
    assert list(demo.folder.glob("reports/*.html")) and list(demo.folder.glob("merged/*/model.safetensors"))
    assert "Mira" in (demo.folder / "data" / "identity.jsonl").read_text(encoding="utf-8")


def test_demo_makes_no_third_project_of_a_name(retune: Retune, tiny_model: Path) -> None:
    for _ in range(2):
        create_project("My demo")
    assert "my-demo, my-demo-2" in retune("demo", "--project", "My demo", *settings(tiny_model), code=1)


def test_demo_that_cannot_start_makes_nothing(retune: Retune, tmp_path: Path) -> None:
    assert "not a complete model" in retune("demo", "--set", f"model.base={tmp_path}", code=1)
    assert "1 problem" in retune("demo", "--set", "lora.rank=0", code=1)
    assert "No projects yet" in retune("project", "list")
