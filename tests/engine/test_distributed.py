"""Two processes agree with one, whatever they share out: the same global batch, loss by loss and weight by weight."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from studio.foreign.deepspeed_folder import DeepSpeedFolder
from studio.paths import REPOSITORY
from tests.engine import rank_worker
from tests.engine.folders import make_base

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
KINDS = ("lora-tree-float32", "full-sequence-float32")
QUANTISED = ("zero2-qlora-tree-float32", "zero3-qlora-tree-float32")
VIRTUAL = ("ddp-prompt_tuning-none-float32", "zero2-prefix_tuning-none-float32")
SHORT = "short-lora-tree-float32"
UNMADE = ("ddp-lora-tree-float32", "zero2-lora-tree-float32")
ILL = ("zero2-full-sequence-float32", "zero3-lora-tree-float32")
WITHIN = 1e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def together(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Every case in one start of two processes, which start in the time of one."""
    out = tmp_path_factory.mktemp("ranks") / "found.pt"
    cases = [f"{strategy}-{kind}" for kind in KINDS for strategy in STRATEGIES]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--module"]
    done = subprocess.run(
        [*line, "tests.engine.rank_worker", str(base), str(out), *cases, *QUANTISED, *VIRTUAL, SHORT,
         *(f"ill-{case}" for case in ILL), *(f"unmade-{case}" for case in UNMADE)],
        cwd=REPOSITORY, env={**os.environ, "DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def alone(base: Path) -> dict[str, dict]:
    kinds = [*KINDS, "qlora-tree-float32", *(case.partition("-")[2] for case in VIRTUAL)]
    return {kind: rank_worker.train(base, f"none-{kind}", 1) for kind in kinds}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_agree_with_one(together: dict, alone: dict, strategy: str, kind: str) -> None:
    require_agreement(together[f"{strategy}-{kind}"], alone[kind])


@pytest.mark.slow
@pytest.mark.parametrize("case", QUANTISED)
def test_a_four_bit_base_is_shared_out_too(together: dict, alone: dict, case: str) -> None:
    require_agreement(together[case], alone["qlora-tree-float32"])


@pytest.mark.slow
@pytest.mark.parametrize("case", VIRTUAL)
def test_virtual_tokens_are_learned_together(together: dict, alone: dict, case: str) -> None:
    require_agreement(together[case], alone[case.partition("-")[2]])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [*(f"{each}-{kind}" for each in STRATEGIES[1:] for kind in KINDS), *QUANTISED, VIRTUAL[1]]
)
def test_deepspeeds_files_go_on_bit_equal(together: dict, case: str) -> None:
    whole, resumed = together[case], together[case]["resumed"]
    assert resumed["losses"] == whole["losses"][-len(resumed["losses"]) :]
    assert all(torch.equal(tensor, resumed["weights"][name]) for name, tensor in whole["weights"].items())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["zero1-lora-tree-float32", *QUANTISED, VIRTUAL[1]])
def test_nothing_frozen_is_in_deepspeeds_files(together: dict, case: str) -> None:
    """The base's embedding is tied to its head, so DeepSpeed knows it by two names."""
    found = DeepSpeedFolder(Path(together[case]["resumed"]["folder"]))
    assert set(found.weights) == {f"llm.{name}" for name in together[case]["weights"]}
    assert found.content["module"].keys() <= found.weights.keys()


@pytest.mark.slow
def test_all_processes_take_the_step_again_when_one_is_short_of_memory(together: dict, alone: dict) -> None:
    found, expected = together[SHORT], alone["lora-tree-float32"]
    assert found["sizes"] == [1, 1]
    assert found["losses"] == pytest.approx(expected["losses"], rel=WITHIN)
    assert found["valid"] == pytest.approx(expected["valid"], rel=WITHIN)
    assert distance(found["weights"], expected["weights"]) < WITHIN


@pytest.mark.slow
@pytest.mark.parametrize("case", UNMADE)
def test_memory_that_runs_out_in_one_process_before_anything_is_exchanged_is_told_to_all(
    together: dict, alone: dict, case: str
) -> None:
    found, expected = together[f"unmade-{case}"], alone["lora-tree-float32"]
    assert found["sizes"] == [1, 1]
    assert found["losses"] == pytest.approx(expected["losses"], rel=WITHIN)
    assert distance(found["weights"], expected["weights"]) < WITHIN


@pytest.mark.slow
@pytest.mark.parametrize("case", ILL)
def test_what_goes_wrong_in_one_process_all_learn_of_and_nothing_changes(together: dict, case: str) -> None:
    """A step without a finite gradient, a disk that fills up in the middle of a save, a weight that is not finite."""
    found = together[f"ill-{case}"]
    assert found["found"] == [[True] * 5] * 2
    assert found["losses"] == together[case]["losses"]


def require_agreement(found: dict, expected: dict) -> None:
    assert all(found[name] == expected[name] for name in ("trained", "tokens", "num_learned"))
    assert found["losses"] == pytest.approx(expected["losses"], rel=WITHIN)
    assert found["norms"] == pytest.approx(expected["norms"], rel=WITHIN)
    assert found["valid"] == pytest.approx(expected["valid"], rel=WITHIN)
    assert distance(found["weights"], expected["weights"]) < WITHIN


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of all weights together, relative to their size."""
    assert one.keys() == other.keys()
    apart = sum(float((one[name] - other[name]).double().square().sum()) for name in one)
    return (apart / sum(float(tensor.double().square().sum()) for tensor in other.values())) ** 0.5
