"""Torch files and DeepSpeed folders of others: their tensors bit for bit, or a typed error; never other numbers."""

import hashlib
import json
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from studio.engine.foreign import iter_weights, read_tensor, read_weight
from studio.errors import CheckpointError, StudioError, UnsafeFileError
from studio.foreign.deepspeed_folder import DeepSpeedFolder
from studio.foreign.pickles import StandIn, StoredTensor
from studio.foreign.torch_file import TorchFile, open_dictionary
from studio.foreign.xtuner import is_checkpoint
from tests.foreign.canary import quiet
from tests.foreign.places import DEEPSPEED, FULL, LORA, XTUNER, ZERO2, copied

EXPECTED = json.loads((XTUNER / "expected_state_dicts.json").read_text())
LAYOUTS = ["zero1_bf16", "zero2", "zero3_bf16", "zero3"]


def fingerprint(tensor: torch.Tensor) -> list[Any]:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), hashlib.sha256(data).hexdigest()[:16]]


def everything(value: Any) -> Any:
    """A content with its tensors read: what two readings are compared by."""
    if isinstance(value, StoredTensor):
        return fingerprint(read_tensor(value))
    if isinstance(value, StandIn):
        return {name: everything(each) for name, each in value.state.items()}
    if isinstance(value, dict):
        return {name: everything(each) for name, each in value.items()}
    return [everything(each) for each in value] if isinstance(value, list | tuple) else repr(value)


@pytest.mark.parametrize("path", [LORA, FULL], ids=["lora", "full"])
def test_the_weights_of_xtuner_are_read_bit_for_bit(path: Path) -> None:
    key = f"{path.parent.name}/{path.name}"
    with quiet():
        file = open_dictionary(path)
    found = {name: fingerprint(read_tensor(tensor)) for name, tensor in file.content["state_dict"].items()}
    assert found == {name: values[:3] for name, values in EXPECTED[key].items()}


def test_the_rest_of_an_xtuner_file_is_read() -> None:
    content = open_dictionary(LORA).content
    assert list(content) == ["meta", "state_dict", "message_hub", "optimizer", "param_schedulers"]
    assert content["meta"]["iter"] == 96 and "tiny-llama" in content["meta"]["cfg"]
    loss = content["message_hub"]["log_scalars"]["train/loss"]
    assert loss.name == "HistoryBuffer" and len(loss.state["_log_history"].values()) == 96
    assert content["message_hub"]["runtime_info"]["iter"] == 95
    assert len(content["optimizer"]["param_groups"][0]["params"]) == 49 and len(content["optimizer"]["state"]) == 28


def test_a_deepspeed_folder_of_xtuner_is_put_together() -> None:
    with quiet():
        folder = DeepSpeedFolder(ZERO2)
    weights = dict(iter_weights(folder.weights))
    key = "zero2/mp_rank_00_model_states.pt module"  # trained in float32, so the module equals the optimizer's masters
    assert {n: fingerprint(t) for n, t in weights.items()} == {n: v[:3] for n, v in EXPECTED[key].items()}
    halves = EXPECTED["zero2/iter_96.pth (folder, via guess_load_checkpoint)"]
    assert {n: fingerprint(t.half()) for n, t in weights.items()} == {n: v[:3] for n, v in halves.items()}
    assert (folder.stage, folder.world_size, folder.content["meta"]["iter"]) == (2, 2, 96)
    assert folder.content["ds_config"]["zero_optimization"]["stage"] == 2
    assert folder.optimizer_state(1)["loss_scaler"].state["cur_scale"] == 1.0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_zero_stage_gives_what_deepspeed_itself_gathers(layout: str) -> None:
    folder = DeepSpeedFolder(DEEPSPEED / layout / "step_3.pth")
    assert folder.stage == int(layout[4]) and folder.content["note"] == "real"
    expected = load_file(DEEPSPEED / layout / "expected.safetensors")
    found = dict(iter_weights(folder.weights))
    for name, tensor in expected.items():
        assert torch.equal(found[name].float(), tensor.float()), name
    assert torch.equal(found["head.weight"], expected["embed.weight"])  # shared weights have both names
    assert torch.equal(found["steps"], torch.arange(3.0))  # a buffer
    trained = set(expected) - {"frozen.weight", "frozen.bias"}
    assert {found[name].dtype for name in trained} == {torch.float32}


def test_folders_without_addresses_are_put_together_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """As DeepSpeed wrote them before it noted where each weight lies."""
    plain = DeepSpeedFolder.optimizer_state
    monkeypatch.setattr(
        DeepSpeedFolder,
        "optimizer_state",
        lambda self, rank: {k: v for k, v in plain(self, rank).items() if k != "param_slice_mappings"},
    )
    for path, expected in ((DEEPSPEED / "zero2/step_3.pth", load_file(DEEPSPEED / "zero2/expected.safetensors")),):
        found = dict(iter_weights(DeepSpeedFolder(path).weights))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_views_and_empty_tensors_are_read(tmp_path: Path) -> None:
    grid = torch.arange(24.0).view(4, 6)
    content = {"t": grid.t(), "part": grid[1:3, 2:5], "empty": torch.empty(0, 3), "one": torch.tensor(7).to(torch.int8)}
    torch.save(content, tmp_path / "x.pt")
    found = TorchFile(tmp_path / "x.pt").content
    assert all(torch.equal(read_tensor(found[name]), tensor) for name, tensor in content.items())


def test_a_weight_that_is_read_does_not_write_into_the_file(tmp_path: Path) -> None:
    path = copied(LORA, tmp_path / "x.pth")
    before = path.read_bytes()
    tensor = read_tensor(next(iter(open_dictionary(path).content["state_dict"].values())))
    tensor.zero_()
    assert path.read_bytes() == before


def cut(data: bytearray, chance: random.Random) -> bytearray:
    return data[: chance.randrange(len(data))]


def flip(data: bytearray, chance: random.Random) -> bytearray:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return data


def zero_page(data: bytearray, chance: random.Random) -> bytearray:
    at = chance.randrange(len(data))
    data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    return data


def flip_in_the_directory(data: bytearray, chance: random.Random) -> bytearray:
    """Names, sizes, flags and places of the archive's members stand at its end."""
    start = bytes(data).rfind(b"PK\x01\x02", 0, bytes(data).rfind(b"PK\x05\x06") - 200)
    data[chance.randrange(start, len(data))] ^= 1 << chance.randrange(8)
    return data


def flip_in_the_pickle(data: bytearray, chance: random.Random) -> bytearray:
    data[chance.randrange(60, 20_000)] ^= 1 << chance.randrange(8)
    return data


def shift(data: bytearray, chance: random.Random) -> bytearray:
    at = chance.randrange(len(data))
    return data[:at] + bytes(chance.randrange(1, 64)) + data[at:]


DAMAGES = [cut, flip, zero_page, flip_in_the_directory, flip_in_the_pickle, shift]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("source", [LORA, ZERO2], ids=["file", "folder"])
def test_damage_gives_the_same_numbers_or_a_typed_error(
    tmp_path: Path, damage: Callable[[bytearray, random.Random], bytearray], source: Path
) -> None:
    chance = random.Random(f"{damage.__name__} {source.name}")
    copy = copied(source, tmp_path / source.name)
    files = sorted(copy.iterdir()) if copy.is_dir() else [copy]
    sound, num_refused = reading(copy), 0
    for _ in range(24):
        file = chance.choice(files)
        kept = file.read_bytes()
        file.write_bytes(damage(bytearray(kept), chance))
        try:
            with quiet():
                assert reading(copy) == sound
        except StudioError as error:
            assert error.hint and file.name in str(error) or copy.name in str(error)
            num_refused += 1
        file.write_bytes(kept)
    assert num_refused >= 12 or damage is flip_in_the_directory
    assert reading(copy) == sound


def reading(path: Path) -> Any:
    if path.is_dir():
        folder = DeepSpeedFolder(path)
        return everything(folder.content), {n: fingerprint(t) for n, t in iter_weights(folder.weights)}
    return everything(open_dictionary(path).content)


def test_missing_and_foreign_files_of_a_folder_are_named(tmp_path: Path) -> None:
    def spoiled(change: Callable[[Path], Any], name: str = "zero2") -> str:
        folder = tmp_path / "f"
        shutil.rmtree(folder, ignore_errors=True)
        copied(DEEPSPEED / name / "step_3.pth", folder)
        change(folder)
        with pytest.raises(CheckpointError) as refused:
            DeepSpeedFolder(folder)
        return str(refused.value)

    rank = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    assert "rank 0" in spoiled(lambda f: (f / rank.format(0)).unlink())
    assert "by 2 ranks, and 1 optimizer files" in spoiled(lambda f: (f / rank.format(1)).unlink())
    assert "no model_states" in spoiled(lambda f: (f / "mp_rank_00_model_states.pt").unlink())
    assert "two files of rank 1" in spoiled(lambda f: copied(f / rank.format(1), f / f"bf16_{rank.format(1)}"))
    second = "zero_pp_rank_1_mp_rank_01_optim_states.pt"
    assert "by tensors" in spoiled(lambda f: copied(f / rank.format(1), f / second))
    model = "zero_pp_rank_1_mp_rank_00_model_states.pt"
    assert "2 ranks have 1 model files" in spoiled(lambda f: (f / model).unlink(), "zero3")
    other = DEEPSPEED / "zero1_bf16/step_3.pth/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    smaller = torch.zeros(3)
    save = {"optimizer_state_dict": {"zero_stage": 2, "single_partition_of_fp32_groups": [smaller, smaller]}}
    assert "do not make up" in spoiled(lambda f: torch.save(save, f / rank.format(1)))
    assert is_checkpoint(other.parent) and not is_checkpoint(tmp_path)


def test_files_of_two_checkpoints_in_one_folder_are_refused(tmp_path: Path) -> None:
    folder = copied(DEEPSPEED / "zero3/step_3.pth", tmp_path / "f")
    source = DEEPSPEED / "zero2/step_3.pth/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    copied(source, folder / source.name)
    with pytest.raises(CheckpointError):
        dict(iter_weights(DeepSpeedFolder(folder).weights))


def rezipped(source: Path, path: Path, change: Callable[[zipfile.ZipFile, str, bytes], None]) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            change(new, name, old.read(name))
    return path


def compressed(new: zipfile.ZipFile, name: str, data: bytes) -> None:
    new.writestr(name, data, zipfile.ZIP_DEFLATED)


def doubled(new: zipfile.ZipFile, name: str, data: bytes) -> None:
    new.writestr(name, data)
    if name.endswith("data/0"):
        new.writestr(name, bytes(len(data)))


def with_torchscript(new: zipfile.ZipFile, name: str, data: bytes) -> None:
    new.writestr(name, data)
    if name.endswith("version"):
        new.writestr("archive/constants.pkl", b"\x80\x02).")


def with_a_nested_archive(new: zipfile.ZipFile, name: str, data: bytes) -> None:
    new.writestr(name, data)
    if name.endswith("version"):
        new.writestr("archive/inner/data.pkl", data)


@pytest.mark.parametrize(
    "change", [compressed, doubled, with_torchscript, with_a_nested_archive], ids=lambda each: each.__name__
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_torch_does_not_write_are_refused(tmp_path: Path, change: Any) -> None:
    path = rezipped(LORA, tmp_path / "x.pth", change)
    with quiet(), pytest.raises(UnsafeFileError):
        open_dictionary(path)


def test_a_header_that_differs_from_the_directory_is_refused(tmp_path: Path) -> None:
    """Two tools would read two files: one goes by the directory, the other by the headers."""
    data = bytearray(LORA.read_bytes())
    at = bytes(data).find(b"archive/data/1")
    data[at + len("archive/data/")] = ord("2")
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match="another header"):
        reading(tmp_path / "x.pth")


def test_flags_of_encryption_are_refused(tmp_path: Path) -> None:
    data = bytearray(LORA.read_bytes())
    at = bytes(data).find(b"PK\x01\x02")
    data[at + 8] |= 1
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(UnsafeFileError, match="encrypted"):
        open_dictionary(tmp_path / "x.pth")


def test_something_before_the_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"#!/bin/sh\n" + LORA.read_bytes())
    with pytest.raises(CheckpointError):
        open_dictionary(tmp_path / "x.pth")


def test_what_is_no_torch_file_says_so(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    with tarfile.open(tmp_path / "old.pth", "w") as archive:
        archive.add(tmp_path / "legacy.pth", "pickle")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("hello")
    torch.save([1], tmp_path / "list.pth")
    for name in ("legacy", "old", "empty", "text", "list", "missing"):
        with quiet(), pytest.raises(CheckpointError) as refused:
            open_dictionary(tmp_path / f"{name}.pth")
        assert f"{name}.pth" in str(refused.value) and refused.value.hint


def test_a_member_that_is_missing_is_named_when_it_is_read(tmp_path: Path) -> None:
    def without(new: zipfile.ZipFile, name: str, data: bytes) -> None:
        if not name.endswith("data/0"):
            new.writestr(name, data)

    file = open_dictionary(rezipped(LORA, tmp_path / "x.pth", without))
    with pytest.raises(CheckpointError, match="data/0 is missing"):
        for tensor in file.content["state_dict"].values():
            read_tensor(tensor)


def test_weights_are_read_one_by_one() -> None:
    """A folder is opened without its numbers; reading a weight reads the pieces of that weight only."""
    folder = DeepSpeedFolder(DEEPSPEED / "zero2/step_3.pth")
    checked = [set(file._checked) for file in folder.optimizers]
    assert all(names <= {"data.pkl", "byteorder"} for names in checked)
    read_weight(folder.weights["down.weight"])
    read = set().union(*(file._checked for file in folder.optimizers)) - {"data.pkl", "byteorder"}
    assert 1 <= len(read) <= 2
