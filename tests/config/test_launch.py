"""How many processes a run has, what starts them, and what DeepSpeed is told: from config and environment alone."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from studio.config import launch, zero
from studio.config.schema import ZERO_PRESETS, DistributedSection, RunConfig, parse_config
from studio.errors import ConfigError


def config(train: dict[str, Any] | None = None, **spread: Any) -> RunConfig:
    return parse_config({"distributed": spread, "train": train or {}})


def test_the_global_batch_counts_every_process() -> None:
    sizes = {"micro_batch_size": 2, "gradient_accumulation_steps": 4}
    assert config(sizes).examples_per_step == 8
    assert config(sizes, strategy="ddp", nodes=2, processes_per_node=3).examples_per_step == 48


@pytest.mark.parametrize("name", ZERO_PRESETS)
def test_presets_go_by_our_names_and_xtuners(name: str) -> None:
    for spelt in (name, f"deepspeed_{name}"):
        found = config(strategy="deepspeed", deepspeed=spelt)
        assert found.distributed.deepspeed == name
        values = zero.complete(zero.chosen(found), found, "float32", 1000)
        assert values["zero_optimization"]["stage"] == int(name[4])
        assert ("offload_optimizer" in values["zero_optimization"]) == name.endswith("offload")
        assert values["gradient_accumulation_steps"] == 1 and values["gradient_clipping"] == found.train.max_grad_norm


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"processes_per_node": 2}, "choose ddp or deepspeed"),
        ({"strategy": "deepspeed", "deepspeed": "zero9"}, "no preset"),
        ({"strategy": "ddp", "launcher": "deepspeed"}, "of the strategy deepspeed only"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config(**values)


def test_a_file_of_ones_own_keeps_what_it_says_and_leaves_the_rest_to_the_run(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(
        json.dumps({"zero_optimization": {"stage": 2, "round_robin_gradients": True}, "bf16": {"enabled": "auto"}})
    )
    own = config(strategy="deepspeed", deepspeed=str(path)).model_copy(update={"method": "full"})
    values = zero.complete(zero.chosen(own), own, "bfloat16", 1000)
    assert values["zero_optimization"]["round_robin_gradients"] and values["bf16"]["enabled"] is True
    assert (
        zero.complete(zero.chosen(own), config(), "bfloat16", 1000)["bf16"]["enabled"] is False
    )  # an adapter: autocast


@pytest.mark.parametrize(("size", "expected"), [("auto", 1000), (5e8, 500_000_000), (None, 1000)])
def test_a_bucket_that_is_left_to_the_run_is_no_larger_than_what_learns(
    tmp_path: Path, size: Any, expected: int
) -> None:
    """Files made for transformers say "auto", which DeepSpeed itself reads as 500 million."""
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2} | ({"reduce_bucket_size": size} if size else {})}))
    own = config(strategy="deepspeed", deepspeed=str(path))
    assert zero.complete(zero.chosen(own), own, "float32", 1000)["zero_optimization"]["reduce_bucket_size"] == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "JSON"), ("[]", "holds list"), ('{"optimizer": {}}', "sets optimizer"),
     ('{"zero_optimization": {"stage": 7}}', "stage 7"), ('{"zero_optimization": true}', "without settings"),
     ('{"bf16": true, "fp16": {}}', "bf16 without settings"),
     ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}', "reduce_bucket_size 'big'")],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        zero.chosen(config(strategy="deepspeed", deepspeed=str(path)))


def test_virtual_tokens_do_not_go_with_shared_out_weights() -> None:
    spread = {"strategy": "deepspeed", "deepspeed": "zero3_offload"}
    with pytest.raises(ConfigError, match="must see whole"):
        zero.chosen(parse_config({"method": "prompt_tuning", "distributed": spread}))


def test_variables_of_xtuner_and_of_torchrun_are_read() -> None:
    spread = DistributedSection(strategy="ddp")
    xtuner = {"NNODES": "2", "NPROC_PER_NODE": "4", "NODE_RANK": "1", "ADDR": "first", "PORT": "2345"}
    found = launch.with_environment(spread, xtuner)
    assert (found.nodes, found.processes_per_node, found.world_size) == (2, 4, 8)
    assert launch.meeting(found, xtuner) == launch.Meeting(1, "first", 2345)
    torchs = {"GROUP_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "first", "MASTER_PORT": "2345"}
    assert launch.meeting(found, torchs) == launch.Meeting(1, "first", 2345)
    assert launch.with_environment(spread, {}) == spread


@pytest.mark.parametrize(
    ("environment", "says"),
    [({}, "ADDR"), ({"ADDR": "a", "NODE_RANK": "2"}, "is 2 of 2"), ({"ADDR": "a", "PORT": "x"}, "is 'x'")],
)
def test_machines_that_could_not_meet_are_told_why(environment: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        launch.meeting(DistributedSection(strategy="ddp", nodes=2), environment)


def test_launch_lines_are_argument_lists(tmp_path: Path) -> None:
    place = launch.Meeting(1, "first", 2345)
    job_dir = tmp_path / "a job; touch x"
    sizes = {
        "torchrun": {"--nnodes=2", "--nproc_per_node=4", "--node_rank=1", "--master_addr=first", "--master_port=2345"},
        "deepspeed": {f"--hostfile={job_dir}/hosts", "--no_ssh", "--node_rank=1", "--master_addr=first"},
        "slurm": {"--nodes=2", "--ntasks-per-node=4"},
    }
    for launcher, wanted in sizes.items():
        spread = DistributedSection(strategy="deepspeed", launcher=launcher, nodes=2, processes_per_node=4)
        line = launch.command(spread, place, job_dir)
        assert line[-2:] == [launch.MODULE, str(job_dir)] and all(isinstance(part, str) for part in line)
        assert wanted <= set(line)
    assert launch.hosts(spread) == "machine-0 slots=4\nmachine-1 slots=4\n"


def test_each_process_knows_its_rank() -> None:
    spread = DistributedSection(strategy="ddp", nodes=2, processes_per_node=4)
    found = launch.rank_variables(spread, launch.Meeting(1, "first", 2345), 3)
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == ("7", "3", "8")
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
    assert launch.slurm_rank_variables(slurm)["RANK"] == "5"
    assert launch.slurm_rank_variables({"RANK": "0", **slurm}) == {}


def test_spread_anew_keeps_the_rows_of_a_step() -> None:
    sizes = {"micro_batch_size": 2, "gradient_accumulation_steps": 2}
    two = config(sizes, strategy="ddp", processes_per_node=2)
    one = launch.spread_anew(two, {"processes_per_node": 1})
    assert one.examples_per_step == two.examples_per_step == 8 and one.train.gradient_accumulation_steps == 4
    with pytest.raises(ConfigError, match="cannot share the run's 8 rows"):
        launch.spread_anew(two, {"processes_per_node": 3})


def test_an_sbatch_file_is_safe_to_run_from_a_folder_with_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "x; touch y"
    spread = DistributedSection(strategy="ddp", launcher="slurm", nodes=2, processes_per_node=8)
    text = launch.sbatch_script(spread, "luna", ["retune", "train", "luna config"], folder)
    assert f"cd {shlex.quote(str(folder))}\n" in text and "retune train 'luna config'\n" in text
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=8\n#SBATCH --gres=gpu:8\n" in text


def test_an_sbatch_file_for_processors_asks_for_no_gpu_and_uses_none(tmp_path: Path) -> None:
    spread = DistributedSection(strategy="ddp", launcher="slurm", nodes=2)
    text = launch.sbatch_script(spread, "luna", ["retune", "train", "luna"], tmp_path, on_gpu=False)
    assert "gpu" not in text and "\nexport CUDA_VISIBLE_DEVICES=\n" in text
    assert text.index("CUDA_VISIBLE_DEVICES") < text.index("retune train luna\n")
