"""Pickles from strangers: what is on the list comes back as plain values, all else is refused, and nothing runs."""

import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy
import pytest
import torch

from studio.errors import CheckpointError, StudioError, UnsafeFileError
from studio.foreign import pickles
from studio.foreign.pickles import MAX_DEPTH, NumberArray, StandIn, StoredTensor, read_pickle
from studio.foreign.torch_file import TorchFile
from tests.foreign.canary import quiet

FLOATS = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def named(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def zipped(path: Path, data: bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", b"little")
        for name, content in members.items():
            archive.writestr(f"archive/data/{name.removeprefix('s')}", content)
    return path


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return named(module, name) + b"(" + b"".join(arguments) + b"tR"


TOUCH = text("touch canary")
TENSOR = named("torch._utils", "_rebuild_tensor_v2")
HISTORY = named("mmengine.logging.history_buffer", "HistoryBuffer")
HOSTILE = {
    "os.system": call("os", "system", TOUCH),
    "posix.system": call("posix", "system", TOUCH),
    "eval": call("builtins", "eval", text("open('canary','w')")),
    "exec of Python 2": call("__builtin__", "exec", text("open('canary','w')")),
    "import": call("builtins", "__import__", text("idlelib.pyshell")),
    "subprocess": call("subprocess", "Popen", text("touch canary")),
    "idlelib": call("idlelib.pyshell", "ModifiedInterpreter.runcommand", text("open('canary','w')")),
    "numpy's exec": call("numpy.testing._private.utils", "runstring", text("open('canary','w')"), b"}"),
    "torch._dynamo": call("torch._dynamo.guards", "GuardBuilder.get", text("__import__('os')")),
    "torch's nested load": call("torch.storage", "_load_from_bytes", b"C\x02\x80."),
    "torch.hub": call("torch.hub", "load", text("o/r"), text("m")),
    "pip": call("pip._internal", "main", b"]"),
    "operator": call("operator", "attrgetter", text("system")),
    "mmengine's Config": call("mmengine.config.config", "Config", text("x.py")),
    "a stacked name": b"\x8c\x02os\x8c\x06system\x93" + TOUCH + b"\x85R",
    "a dotted name of a known class": b"\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93)R",
    "a name with a blank": call("torch._utils", "_rebuild_tensor_v2 x"),
    "getattr of another object": call("__builtin__", "getattr", named("collections", "OrderedDict"), text("min")),
    "getattr of another name": call("__builtin__", "getattr", HISTORY, text("__init__")),
    "getattr twice": call("builtins", "getattr", call("builtins", "getattr", HISTORY, text("min")), text("max")),
    "an old instance": b"(" + TOUCH + b"ios\nsystem\n",
    "an old object": b"(" + named("os", "system") + TOUCH + b"o",
    "a registered extension": b"\x82\x01",
    "an object with keywords": HISTORY + b")}\x92",
    "an object with arguments": HISTORY + b"K\x01\x85\x81",
    "a tensor class made": named("torch", "FloatStorage") + b")\x81",
    "state on a function": TENSOR + b"}b",
    "state on a class": HISTORY + b"}" + text("__init__") + b"K\x01sb",
    "state on a tensor": TENSOR + b"(" + FLOATS + b"K\x00K\x04\x85K\x01\x85\x89tR}b",
    "another tensor class": call("torch._tensor", "_rebuild_from_type_v2", TENSOR, HISTORY, b")", b"}"),
    "a function in place of a tensor": call(
        "torch._tensor", "_rebuild_from_type_v2", named("torch", "Size"), named("torch", "Tensor"), b")", b"}"
    ),
    "a string called": text("system") + TOUCH + b"\x85R",
    "a stand-in called": HISTORY + b")\x81)R",
    "bytes of another codec": call("_codecs", "encode", text("x"), text("rot13")),
    "an array of objects": call("numpy", "dtype", text("O8"), b"\x89", b"\x88"),
    "items on a class": HISTORY + text("a") + b"K\x01s",
    "appended to a tuple": b"\x8c\x01a\x85K\x01a",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = zipped(tmp_path / "evil.pth", pickled(HOSTILE[name]), s0=bytes(16))
    with quiet(), pytest.raises(UnsafeFileError) as refused:
        TorchFile(path)
    assert "not opened" in str(refused.value)
    assert not Path("canary").exists()


def test_the_same_bombs_go_off_in_a_careless_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickled(HOSTILE["posix.system"]))  # unsafe on purpose: the control of the refusals above
    assert Path("canary").exists()


def nested(depth: int, opening: bytes = b"]", closing: bytes = b"a") -> bytes:
    return opening * depth + closing * (depth - 1)


DAMAGED = {
    "no end": b"\x80\x02}",
    "nothing": b"",
    "an empty stack": pickled(b"0"),
    "two values": pickled(b"}}"),
    "a mark left": pickled(b"(}"),
    "no mark": pickled(b"t"),
    "a memo that is not there": pickled(b"h\x05"),
    "a text that is cut short": b"\x80\x02X\xff\xff\x00\x00abc.",
    "a storage of text": pickled(text("x") + b"Q"),
    "a tensor outside its storage": pickled(
        TENSOR + b"(" + FLOATS + b"K\x01K\x04\x85K\x01\x85\x89tR"
    ),
    "a tensor larger than its storage": pickled(
        TENSOR + b"(" + FLOATS + b"K\x00J\x00\x00\x00\x40\x85K\x00\x85\x89tR"
    ),
    "a tensor of negative stride": pickled(
        TENSOR + b"(" + FLOATS + b"K\x03K\x04\x85J\xff\xff\xff\xff\x85\x89tR"
    ),
    "a list in itself": pickled(b"]q\x00h\x00a"),
    "a dictionary in itself": pickled(b"}q\x00K\x01h\x00s"),
    "a deep list": pickled(nested(MAX_DEPTH + 2)),
    "a very deep tuple": pickled(b")" + b"\x85" * 200_000),
    "a deep tuple as a key": pickled(b"})" + b"\x85" * 200_000 + b"K\x01s"),
    "a deep tuple as a key of mmengine's": pickled(
        call("mmengine.config.config", "ConfigDict", b"])" + b"\x85" * 200_000 + b"K\x01\x86a")
    ),
    "a deep tuple as a byte order": pickled(
        call("numpy", "dtype", text("f8")) + b"(K\x01)" + b"\x85" * 200_000 + b"tb"
    ),
    "a deep tuple as a number format": pickled(
        call("torch._utils", "_rebuild_tensor_v3", FLOATS, b"K\x00))NN)" + b"\x85" * 200_000)
    ),
    "a text that is copied again and again": pickled(
        text("x" * 2**20) + b"q\x00]" + (call("_codecs", "encode", b"h\x00") + b"a") * 300
    ),
    "a dictionary that is copied again and again": pickled(
        b"}q\x00(" + b"".join(b"J" + struct.pack("<i", key) + b"N" for key in range(40_000)) + b"u0]"
        + (call("mmengine.config.config", "ConfigDict", b"h\x00") + b"a") * 110
    ),
    "a list as a key": pickled(b"}]K\x01s"),
    "whole numbers that all have one hash": pickled(b"}(" + b"".join(
        b"\x8a\x09" + (n * (2**61 - 1)).to_bytes(9, "little") + b"N" for n in range(1, 50)
    ) + b"u"),
    "pairs, whose hashes can be made alike": pickled(b"}K\x01K\x02\x86Ns"),
    "more numbers as keys than there are parameters": pickled(
        b"}(" + b"".join(b"J" + struct.pack("<i", key) + b"N" for key in range(100_001)) + b"u"
    ),
    "a list that unfolds without end": pickled(b"]q\x00" + b"".join(
        b"]q" + bytes([n]) + b"(" + (b"h" + bytes([n - 1])) * 8 + b"e" for n in range(1, 30)
    )),
    "a bare class": pickled(HISTORY),
    "a bare dtype": pickled(call("numpy", "dtype", text("f8"), b"\x89", b"\x88")),
    "an array of another size": pickled(
        call("numpy.core.multiarray", "scalar", call("numpy", "dtype", text("f8"), b"\x89", b"\x88"), b"C\x03abc")
    ),
    "a shape of texts": pickled(call("torch", "Size", text("a") + b"\x85")),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_and_oversized_pickles_have_a_typed_error(name: str) -> None:
    with quiet(), pytest.raises(CheckpointError):
        read_pickle(DAMAGED[name], None, "x.pth")


def test_a_pickle_that_is_too_large_is_not_even_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size is looked at before its checksum, which is wrong here."""
    path = zipped(tmp_path / "large.pth", pickled(b"}" + text("x" * 2000) + b"Ns"))
    path.write_bytes(path.read_bytes().replace(b"xxx", b"xyx", 1))
    monkeypatch.setattr(pickles, "MAX_PICKLE_BYTES", 1000)
    with pytest.raises(CheckpointError, match="has a data.pkl of 20.. bytes"):
        TorchFile(path)


def test_an_empty_archive_has_a_typed_error(tmp_path: Path) -> None:
    path = tmp_path / "empty.pth"
    zipfile.ZipFile(path, "w").close()
    with pytest.raises(UnsafeFileError, match="not an archive as torch writes it"):
        TorchFile(path)


def test_plain_values_come_back_as_torch_reads_them(tmp_path: Path) -> None:
    shared = torch.arange(12.0)
    content = {
        "a": shared[2:6], "b": shared.view(3, 4).t(), "half": torch.ones(2, 3, dtype=torch.bfloat16), "none": None,
        "flags": (True, False), "big": 2**80, "minus": -7, "real": 1.5, "text": "über", 3: ["x", {"y": b"\x00\xff"}],
        "ordered": OrderedDict(z=1, a=2), "size": torch.Size([2, 3]), "dtype": torch.float16, "set": {1, 2},
        "device": torch.device("cpu"), "empty": torch.empty(0, 3), "scalar": torch.tensor(5), -7: 0, 2.5: 0,
    }  # fmt: skip
    torch.save(content, tmp_path / "x.pth")
    found = TorchFile(tmp_path / "x.pth").content
    tensors = {name for name, value in content.items() if isinstance(value, torch.Tensor)}
    assert {name for name, value in found.items() if isinstance(value, StoredTensor)} == tensors
    assert [found[name].shape for name in tensors] == [tuple(content[name].shape) for name in tensors]
    assert {name: str(found[name].dtype) for name in tensors} == {
        name: str(content[name].dtype).removeprefix("torch.") for name in tensors
    }
    plain = {name: value for name, value in content.items() if name not in tensors}
    plain |= {"size": (2, 3), "dtype": "float16", "device": "cpu"}
    assert {name: value for name, value in found.items() if name not in tensors} == plain
    assert found["a"].is_contiguous and not found["b"].is_contiguous


@pytest.mark.parametrize("protocol", [2, 4])
def test_numbers_of_numpy_come_back(protocol: int) -> None:
    content = {
        "row": numpy.arange(3, dtype=numpy.int64), "grid": numpy.ones((2, 2), dtype=numpy.float32),
        "one": numpy.float64(2.5), "two": numpy.int32(-4), "yes": numpy.bool_(True), "big": numpy.array([1], ">i4"),
    }  # fmt: skip
    found = read_pickle(pickle.dumps(content, protocol=protocol), None, "x")
    assert isinstance(found["row"], NumberArray) and found["grid"].shape == (2, 2)
    assert (found["row"].values(), found["grid"].values(), found["big"].values()) == ([0, 1, 2], [1.0] * 4, [1])
    assert (found["one"], found["two"], found["yes"]) == (2.5, -4, True)


def test_classes_that_are_not_here_become_their_attributes() -> None:
    body = named("deepspeed.runtime.fp16.loss_scaler", "LossScaler") + b")\x81}" + text("cur_scale") + b"K\x01sb"
    assert read_pickle(pickled(body), None, "x") == StandIn("LossScaler", {"cur_scale": 1})
    assert read_pickle(pickled(call("mmengine.config.config", "ConfigDict", b"}")), None, "x") == {}
    assert read_pickle(pickled(call("builtins", "getattr", HISTORY, text("mean"))), None, "x") == "HistoryBuffer.mean"


def test_random_bytes_end_in_a_value_or_a_typed_error() -> None:
    generator = numpy.random.default_rng(0)
    opcodes = b"().]}ate\x85\x86R\x81bK\x01q\x00h\x00cQsuN\x88\x89\x93\x94"
    with quiet():
        for _ in range(3000):
            body = bytes(generator.choice(list(opcodes), size=generator.integers(1, 30)))
            try:
                read_pickle(pickled(body), None, "x")
            except StudioError:
                pass


def test_nothing_here_can_unpickle() -> None:
    """The reader is a machine of its own: it has no way to Python's unpickler, nor to anything that imports."""
    import studio.foreign.pickles as module

    names = set(vars(module))
    assert "pickletools" in names and not {"pickle", "importlib", "torch", "numpy"} & names
