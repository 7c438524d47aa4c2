"""Rows of MSAgent-Bench and MOSS from file to a model that calls tools: imported, trained, asked by the loop."""

import json
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import torch

from studio.agent.session import Session
from studio.agent.steps import Step
from studio.agent.tools import pick_tools
from studio.config.schema import RunConfig
from studio.data.formats import read_conversations
from studio.engine.chat import TextStream, prompt_ids
from studio.engine.generate import generate
from studio.engine.models.load import LoadedModel, load_base
from studio.engine.safe_load import load_pth
from studio.projects import create_project
from tests.engine.conftest import add_dataset, add_run, train_here

Make = Callable[..., RunConfig]
[CALCULATOR] = pick_tools(["calculate"])
DESCRIBED = json.dumps({
    "name": CALCULATOR.call_name, "description": CALCULATOR.description,
    "paths": [{"parameters": [{"name": CALCULATOR.parameter, "description": CALCULATOR.description}]}],
})  # fmt: skip
CALL = '<|startofthink|>```JSON\n{"api_name": "Calculate", "parameters": {"expression": "1+1"}}```<|endofthink|>'
RESULT = "<|startofexec|>```JSON\n2```<|endofexec|>\nIt is 2."
MSAGENT = {
    "conversations": [
        {"from": "system", "value": DESCRIBED},
        {"from": "user", "value": "1+1?"},
        {"from": "assistant", "value": f"I add.{CALL}{RESULT}"},
    ]
}
MOSS_SYSTEM = (
    "You are an AI assistant whose name is MOSS.\nCapabilities and tools that MOSS can possess.\n"
    "- Inner thoughts: enabled.\n- Web search: disabled.\n- Calculator: enabled. API: Calculate(expression)\n"
    "- Equation solver: disabled.\n- Text-to-image: disabled.\n- Image edition: disabled.\n"
    "- Text-to-speech: disabled.\n"
)
MOSS = {
    "meta_instruction": MOSS_SYSTEM,
    "chat": {
        "turn_1": {
            "Human": "<|Human|>: 1+1?<eoh>\n",
            "Inner Thoughts": "<|Inner Thoughts|>: I add.<eot>\n",
            "Commands": '<|Commands|>: Calculate("1+1")<eoc>\n',
            "Tool Responses": '<|Results|>:\nCalculate("1+1") => 2.00<eor>\n',
            "MOSS": "<|MOSS|>: It is 2.<eom>\n",
        }
    },
}


@pytest.mark.parametrize(
    ("format", "row", "template", "protocol"),
    [("msagent_react", MSAGENT, "qwen_chat", "react"), ("moss_sft", MOSS, "moss_sft", "moss")],
)
def test_rows_train_a_model_that_calls_tools(
    format: str, row: dict, template: str, protocol: str, tiny_config: Make, tiny_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    project = create_project("agents")
    add_dataset(project, "agent", read_conversations(file, format))
    settings = {"data.sources": {"agent": 1}, "data.valid_share": 0, "data.template": template, "data.max_length": 2048,
                "train.num_steps": 80, "train.micro_batch_size": 1, "train.gradient_accumulation_steps": 1,
                "train.learning_rate": 0.008, "record.evaluate_every_steps": 0, "record.sample_every_steps": 0,
                "record.sample_prompts": ()}  # fmt: skip
    job = train_here(project, add_run(project, tiny_config(method="full", **settings)))
    assert (job.state, job.cause) == ("finished", "") and job.result["final_loss"] < 0.2
    loaded = load_base(tiny_model, dtype=torch.float32, device=torch.device("cpu"), template=template)
    loaded.model.load_state_dict(load_pth(project.path(job.result["checkpoint"]))["state_dict"])
    call, last = _steps(loaded, protocol)
    assert (call.tool, call.tool_input, call.failed) == ("Calculate", "1+1", False)
    assert call.result == ("2.00" if protocol == "moss" else "2")
    assert (last.answer, last.ended_by) == ("It is 2.", "answer")


def _steps(loaded: LoadedModel, protocol: str) -> list[Step]:
    def ask(messages: list[dict[str, str]], stops: list[str]) -> Generator[str, None, None]:
        ids = prompt_ids(loaded, messages)
        [answer] = generate(loaded.model, [ids], eos_ids=loaded.eos_ids, pad_id=loaded.pad_id, max_new_tokens=120)
        stream = TextStream(loaded, stops)
        for token in answer:
            yield stream.feed(token)
            if stream.stopped:
                return
        yield stream.finish()

    return list(Session(ask, ["calculate"], protocol).answer("1+1?"))
