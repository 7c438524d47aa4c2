"""The pickle inside a torch file, read without Python's unpickler: plain values come out, and nothing in it can run.

A small machine for the opcodes that torch's and DeepSpeed's savers write. Whatever a pickle names must stand in an
exact list (`NAMES`); a name on the stack is a word (`Named`), never the object itself, so there is nothing to call, to
set attributes on, or to import. Classes of mmengine and DeepSpeed become `StandIn`s. Stricter than torch's
`weights_only`: fewer names, no state set on anything but stand-ins, and limits on size, work and nesting.
"""

import math
import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from studio.errors import CheckpointError, UnsafeFileError

MAX_PICKLE_BYTES = 256 * 2**20
MAX_OPERATIONS = 5_000_000
MAX_NODES = 5_000_000
MAX_NUMBER_KEYS = 100_000  # a checkpoint counts parameters with them
WHOLE_HASH = 2**61 - 1  # Python's hash of a whole number is the rest of a division by it
COPIED_ITEM_BYTES = 64  # a value in a dictionary or set takes about so many
MAX_DEPTH = 100
MAX_DIMENSIONS = 16

# Bytes of one element, by torch's name of the number format.
ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "bool": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
STAND_INS = {
    "mmengine.logging.history_buffer HistoryBuffer",
    "deepspeed.runtime.fp16.loss_scaler LossScaler",
    "deepspeed.runtime.fp16.loss_scaler DynamicLossScaler",
    "deepspeed.utils.tensor_fragment fragment_address",
}
HISTORY = "mmengine.logging.history_buffer HistoryBuffer"
HISTORY_METHODS = ("min", "max", "current", "mean")
PLAIN_DTYPE = re.compile(r"[biuf][1248]")
UNPACK = {
    "b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q",
    "f2": "e", "f4": "f", "f8": "d",
}  # fmt: skip


@dataclass(frozen=True)
class Named:
    """A name of the list, as a word."""

    name: str


@dataclass
class StandIn:
    """An object whose class is not here: its class's name and its attributes."""

    name: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass
class Dtype:
    """numpy's number format: kind and bytes (`f8`), and byte order."""

    code: str
    order: str = "<"


@dataclass
class NumberArray:
    """A numpy array of numbers, as its bytes."""

    dtype: Dtype = field(default_factory=lambda: Dtype("f8"))
    shape: tuple[int, ...] = ()
    data: bytes = b""

    def values(self) -> list[int | float]:
        """The numbers in the order in which they lie."""
        code = UNPACK[self.dtype.code]
        return [value for (value,) in struct.iter_unpack(self.dtype.order + code, self.data)]


@dataclass(frozen=True)
class Storage:
    """A run of numbers that lies in a member of the file; tensors are views of it. `file` is who can read it."""

    file: Any = field(repr=False)
    key: str
    dtype: str
    num_bytes: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that was not read yet. `shape`, `stride` and `offset` count elements of `dtype`."""

    storage: Storage
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * ITEM_BYTES[self.dtype]

    @property
    def is_contiguous(self) -> bool:
        """Its elements lie one after the other, last dimension first."""
        steps = [(length, step) for length, step in zip(self.shape, self.stride, strict=True) if length != 1]
        last = not steps or steps[-1][1] == 1
        return last and all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(steps))


def read_pickle(data: bytes, file: Any, what: str) -> Any:
    """The value in a pickle: plain containers, numbers, text, `StandIn`, `NumberArray` and `StoredTensor`.

    `file` becomes the `file` of every storage; `what` names the file in messages. Raises UnsafeFileError for anything
    off the list, CheckpointError for a damaged or oversized pickle.
    """
    require_readable_size(len(data), what)
    machine = _Machine(file, what)
    try:
        value = machine.run(data)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, struct.error) as error:
        raise CheckpointError(f"{what} is damaged: its data.pkl cannot be read ({error}).", NEXT_MOVE) from error
    _require_plain(value, what)
    return value


def require_readable_size(num_bytes: int, what: str) -> None:
    """Raises CheckpointError for a pickle that is larger than any checkpoint needs."""
    if num_bytes > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{what} has a data.pkl of {num_bytes} bytes.", f"Allowed: {MAX_PICKLE_BYTES}.")


NEXT_MOVE = "Use another checkpoint of this run, or copy the file again from where it came."


class _Machine:
    """Stack and memo of one pickle; a mark puts the stack aside and begins a new one."""

    def __init__(self, file: Any, what: str) -> None:
        self.file, self.what = file, what
        self.stack: list[Any] = []
        self.aside: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0
        self.number_keys = 0

    def run(self, data: bytes) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count > MAX_OPERATIONS:
                raise CheckpointError(f"{self.what} needs more than {MAX_OPERATIONS} steps to read.", NEXT_MOVE)
            if opcode.name == "STOP":
                (value,) = self.stack
                if self.aside:
                    raise ValueError("a mark is left")
                return value
            self.step(opcode.name, argument)
        raise ValueError("it has no end")

    def step(self, name: str, argument: Any) -> None:
        if name in PUSHES:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name]())
        elif name in ACTIONS:
            ACTIONS[name](self, argument)
        else:
            raise self.refusal(f"the opcode {name}")

    def refusal(self, reason: str) -> UnsafeFileError:
        return UnsafeFileError(
            f"{self.what} holds more than weights and plain values ({reason}), so opening it could run code; "
            "it was not opened.",
            "Take weights from a source that saves tensors only, such as safetensors.",
        )

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def copying(self, values: Any) -> Any:
        """The values, which are to be copied: a pickle of a few bytes can ask for a large copy again and again."""
        self.copied += len(values) * (1 if isinstance(values, str) else COPIED_ITEM_BYTES)
        if self.copied > MAX_PICKLE_BYTES:
            raise CheckpointError(f"{self.what} unfolds to more than {MAX_PICKLE_BYTES} bytes.", NEXT_MOVE)
        return values

    def pairs(self, pairs: Any) -> dict[Any, Any]:
        return {self.key(key): value for key, value in pairs}

    def key(self, value: Any) -> Any:
        """Text, bytes, None, and numbers whose hashes differ: a dictionary of keys with one hash takes quadratic time.

        Hashes of text and bytes cannot be foretold; those of whole numbers can, and those of tuples be made alike.
        """
        if value is None or isinstance(value, str | bytes):
            return value
        if not isinstance(value, int | float) or abs(value) >= WHOLE_HASH:
            raise ValueError(f"a {type(value).__name__} is used as a key")
        self.number_keys += 1
        if self.number_keys > MAX_NUMBER_KEYS:
            raise CheckpointError(f"{self.what} has more than {MAX_NUMBER_KEYS} numbers as keys.", NEXT_MOVE)
        return value

    def group(self) -> list[Any]:
        """What was pushed since the last mark."""
        values, self.stack = self.stack, self.aside.pop()
        return values

    def mark(self, _: Any) -> None:
        self.aside.append(self.stack)
        self.stack = []

    def remember(self, argument: Any) -> None:
        self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]

    def recall(self, argument: Any) -> None:
        self.stack.append(self.memo[argument])

    def pop(self, _: Any) -> None:
        self.stack.pop()

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError("a tuple has no values")
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(values)

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise self.refusal(f"values appended to {type(target).__name__}")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise self.refusal(f"items set on {type(target).__name__}")
        target.update(self.pairs(zip(values[::2], values[1::2], strict=True)))

    def add(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, set):
            raise self.refusal(f"members added to {type(target).__name__}")
        target.update(map(self.key, values))

    def stack_name(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(f"{module} {name}" if isinstance(module, str) and isinstance(name, str) else "?")

    def name(self, argument: str) -> None:
        if argument not in NAMES:
            raise self.refusal(f"it calls for {argument.replace(' ', '.', 1)[:120]}")
        module, _, last = argument.partition(" ")
        is_format = module == "torch" and last in ITEM_BYTES
        self.stack.append(last if is_format else Named(argument))

    def reduce(self, _: Any) -> None:
        arguments, named = self.stack.pop(), self.stack.pop()
        if not isinstance(named, Named) or not isinstance(arguments, tuple):
            raise self.refusal(f"a call of {type(named).__name__}")
        make = CALLS.get(named.name)
        if make is None:
            raise self.refusal(f"a call of {named.name.replace(' ', '.')}")
        self.stack.append(make(self, *arguments))

    def new_object(self, _: Any) -> None:
        arguments, named = self.stack.pop(), self.stack.pop()
        if not isinstance(named, Named) or named.name not in STAND_INS or arguments != ():
            raise self.refusal("an object of a class that is not on the list")
        self.stack.append(StandIn(named.name.rpartition(" ")[2]))

    def build(self, _: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, StandIn) and isinstance(state, dict):
            target.state.update(self.copying(state))
        elif isinstance(target, NumberArray):
            _fill_array(target, *state)
        elif isinstance(target, Dtype):
            if state[1] not in ORDERS:
                raise ValueError("numbers have no byte order")
            target.order = ">" if state[1] == ">" else "<"
        elif not isinstance(target, dict):  # attributes of an ordered dict, such as state_dict's _metadata, are dropped
            raise self.refusal(f"a state set on {type(target).__name__}")

    def storage(self, _: Any) -> None:
        kind, named, key, location, count = self.stack.pop()
        if kind != "storage" or not isinstance(named, Named) or not isinstance(key, str) or not isinstance(count, int):
            raise ValueError("a storage is not described as torch does")
        last = named.name.rpartition(" ")[2]
        dtype = "uint8" if named.name == "torch.storage UntypedStorage" else STORAGES[last]
        if not isinstance(location, str) or count < 0:
            raise ValueError("a storage has no size")
        self.stack.append(Storage(self.file, key, dtype, count * ITEM_BYTES[dtype]))

    def tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
        return _tensor(storage, storage.dtype if isinstance(storage, Storage) else "", offset, shape, stride)

    def tensor_of_format(
        self, storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
    ) -> StoredTensor:
        return _tensor(storage, dtype, offset, shape, stride)

    def parameter(self, tensor: Any, *_: Any) -> StoredTensor:
        if not isinstance(tensor, StoredTensor):
            raise ValueError("a parameter is no tensor")
        return tensor

    def typed(self, make: Any, kind: Any, arguments: Any, *_: Any) -> StoredTensor:
        """A tensor that carries attributes, as DeepSpeed's do; the attributes are dropped."""
        name = make.name if isinstance(make, Named) else ""
        if name not in TENSOR_CALLS or kind not in TENSOR_TYPES or not isinstance(arguments, tuple):
            raise self.refusal("a tensor of another class")
        return CALLS[name](self, *arguments)

    def size(self, lengths: Any = ()) -> tuple[int, ...]:
        return _lengths(lengths)

    def ordered(self, pairs: Any = ()) -> dict[Any, Any]:
        return self.pairs(self.copying(pairs))

    def config_dict(self, values: Any = ()) -> dict[Any, Any]:
        return self.ordered(list(values.items()) if isinstance(values, dict) else values or ())

    def members(self, values: Any = ()) -> set[Any]:
        return {self.key(value) for value in self.copying(values)}

    def encode(self, text: Any, encoding: Any = "latin1") -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise self.refusal(f"bytes encoded as {_word(encoding)}")
        return self.copying(text).encode("latin1")

    def device(self, *words: Any) -> str:
        return ":".join(str(word)[:20] for word in words[:2] if isinstance(word, str | int))

    def stage(self, number: Any) -> int:
        return _integer(number)

    def attribute(self, owner: Any, name: Any) -> str:
        """mmengine stores its statistics as methods of HistoryBuffer; nothing else may be looked up."""
        if owner != Named(HISTORY) or name not in HISTORY_METHODS:
            raise self.refusal("it looks up an attribute")
        return f"HistoryBuffer.{name}"

    def dtype(self, code: Any, *_: Any) -> Dtype:
        if not isinstance(code, str) or not PLAIN_DTYPE.fullmatch(code) or code not in UNPACK:
            raise self.refusal(f"a numpy array of {_word(code)}")
        return Dtype(code)

    def empty_array(self, *_: Any) -> NumberArray:
        return NumberArray()

    def array(self, data: Any, dtype: Any, shape: Any, *_: Any) -> NumberArray:
        found = NumberArray()
        _fill_array(found, 1, shape, dtype, False, data)
        return found

    def scalar(self, dtype: Any, data: Any) -> int | float:
        found = NumberArray()
        _fill_array(found, 1, (), dtype, False, data)
        return found.values()[0]


ORDERS = ("<", "|", "=", ">")
PUSHES = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set,
}  # fmt: skip
ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, version: None,
    "FRAME": lambda machine, length: None,
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "MEMOIZE": _Machine.remember,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "TUPLE": lambda machine, _: machine.push(tuple(machine.group())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.group()),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.group()),
    "ADDITEMS": lambda machine, _: machine.add(machine.group()),
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stack_name,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new_object,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.storage,
}
CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _Machine.ordered,
    "mmengine.config.config ConfigDict": _Machine.config_dict,
    "deepspeed.runtime.zero.config ZeroStageEnum": _Machine.stage,
    "torch Size": _Machine.size,
    "torch device": _Machine.device,
    "torch._utils _rebuild_tensor_v2": _Machine.tensor,
    "torch._utils _rebuild_tensor_v3": _Machine.tensor_of_format,
    "torch._utils _rebuild_parameter": _Machine.parameter,
    "torch._tensor _rebuild_from_type_v2": _Machine.typed,
    "_codecs encode": _Machine.encode,
    "__builtin__ getattr": _Machine.attribute,
    "builtins getattr": _Machine.attribute,
    "__builtin__ set": _Machine.members,
    "builtins set": _Machine.members,
    "numpy dtype": _Machine.dtype,
    "numpy.core.multiarray _reconstruct": _Machine.empty_array,
    "numpy._core.multiarray _reconstruct": _Machine.empty_array,
    "numpy.core.multiarray scalar": _Machine.scalar,
    "numpy._core.multiarray scalar": _Machine.scalar,
    "numpy.core.numeric _frombuffer": _Machine.array,
    "numpy._core.numeric _frombuffer": _Machine.array,
}
TENSOR_CALLS = tuple(name for name in CALLS if name.startswith("torch._utils _rebuild_"))
TENSOR_TYPES = (Named("torch Tensor"), Named("torch.nn.parameter Parameter"))
NAMES = frozenset(
    {*CALLS, *STAND_INS, *(kind.name for kind in TENSOR_TYPES), "numpy ndarray", "torch.storage UntypedStorage"}
    | {f"torch {name}" for name in (*STORAGES, *ITEM_BYTES)}
)


def _tensor(storage: Any, dtype: Any, offset: Any, shape: Any, stride: Any) -> StoredTensor:
    """A view that stays inside its storage, and is no larger than it."""
    lengths, steps = _lengths(shape), _lengths(stride)
    is_known = isinstance(storage, Storage) and isinstance(dtype, str) and dtype in ITEM_BYTES
    if not is_known or len(lengths) != len(steps):
        raise ValueError("a tensor is not described as torch does")
    tensor = StoredTensor(storage, dtype, lengths, steps, _integer(offset))
    last = tensor.offset + sum((length - 1) * step for length, step in zip(lengths, steps, strict=True))
    room = storage.num_bytes // ITEM_BYTES[dtype]
    if tensor.num_elements and (last >= room or tensor.num_elements > room):
        raise ValueError(f"a tensor of shape {lengths} lies outside its storage")
    return tensor


def _fill_array(array: NumberArray, _: Any, shape: Any, dtype: Any, is_fortran: Any, data: Any) -> None:
    lengths = _lengths(shape)
    if not isinstance(dtype, Dtype) or not isinstance(data, bytes) or (is_fortran and len(lengths) > 1):
        raise ValueError("an array is not one of plain numbers")
    if math.prod(lengths) * int(dtype.code[1]) != len(data):
        raise ValueError("an array does not have the size it says")
    array.dtype, array.shape, array.data = dtype, lengths, data


def _lengths(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > MAX_DIMENSIONS:
        raise ValueError("a shape is no list of lengths")
    return tuple(_integer(value) for value in values)


def _integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError("a length is no number")
    return value


def _word(value: Any) -> str:
    """Text, shortened; of anything else its kind, for what is nested may be endless when it is spelt out."""
    return value[:40] if isinstance(value, str) else type(value).__name__


def _require_plain(value: Any, what: str) -> None:
    """No cycles, no deep nests, no value that grows without end when it is walked, no bare name left.

    Works without recursion. A container that is shared counts as often as a walk would meet it.
    """
    sizes: dict[int, int] = {}
    path: set[int] = set()
    stack: list[tuple[Any, bool]] = [(value, False)]
    while stack:
        node, is_done = stack.pop()
        if id(node) in sizes:  # shared: gone through once, or a few bytes of pickle would cost hours
            continue
        children = _children(node, what)
        if is_done:
            path.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes.get(id(child), 1) for child in children)
            if sizes[id(node)] > MAX_NODES:
                raise CheckpointError(f"{what} unfolds to more than {MAX_NODES} values.", NEXT_MOVE)
        elif children:
            if id(node) in path or len(path) >= MAX_DEPTH:
                raise CheckpointError(f"{what} is nested in itself, or more than {MAX_DEPTH} deep.", NEXT_MOVE)
            path.add(id(node))
            stack.append((node, True))
            stack.extend((child, False) for child in children)


def _children(node: Any, what: str) -> list[Any]:
    if isinstance(node, dict):
        return list(node.values())
    if isinstance(node, list | tuple):
        return list(node)
    if isinstance(node, StandIn):
        return list(node.state.values())
    if isinstance(node, Named | Storage | Dtype):
        raise CheckpointError(f"{what} is damaged: it holds a bare {type(node).__name__}.", NEXT_MOVE)
    return []
