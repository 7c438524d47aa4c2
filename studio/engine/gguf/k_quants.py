"""k-quants: which tensor of a file gets how many bits, and the rounding itself, by llama.cpp's own arithmetic.

The rounding is `ggml_quantize_chunk`, a C function that both Python packages of llama.cpp bring and neither offers to
Python; `gguf` can only undo it. Which tensors get more bits is llama.cpp's choice (src/llama-quant.cpp), as far as it
concerns the architectures that are written here; what it adds for models of 80 layers is left out.
"""

import ctypes
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from studio.errors import ModelError
from studio.machine import INSTALL_QUANTIZE

LIBRARIES = {"llama_cpp": "lib/*ggml-base.*", "xllamacpp": "xllamacpp.*"}
"""Package -> where in it the library with ggml lies."""
NO_IMPORTANCE = None
"""In place of weights by how much each column matters, which need texts to be measured on."""
K_QUANTS = (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_K, GGMLQuantizationType.Q6_K)
SMALLER_BLOCKS = {
    GGMLQuantizationType.Q4_K: GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_K: GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q6_K: GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.Q5_0: GGMLQuantizationType.F16,
    GGMLQuantizationType.Q8_0: GGMLQuantizationType.F16,
}
"""What is taken for rows that blocks (256 weights of a k-quant, else 32) do not divide. llama.cpp takes Q5_1 for Q5_K;
that makes the starter's weights, which were on a grid of 16 values once, 2 % too large, and failed the gate."""
LAYER = re.compile(r"blk\.(\d+)\.(attn_v|ffn_down)\.")


def kind_of(name: str, kind: GGMLQuantizationType, num_layers: int, is_tied: bool) -> GGMLQuantizationType:
    """How a matrix of a file is stored whose others are stored as `kind`: six bits where errors cost most.

    That is the output head (the embedding, where both are one: `is_tied`), and in some layers what attention reads and
    what the feed-forward part returns.
    """
    if kind not in K_QUANTS:
        return kind
    layer = LAYER.match(name)
    is_head = name == ("token_embd.weight" if is_tied else "output.weight")
    return GGMLQuantizationType.Q6_K if is_head or (layer and _gets_more(int(layer[1]), num_layers)) else kind


def _gets_more(layer: int, num_layers: int) -> bool:
    """The first eighth, the last, and every third between."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def fitting(kind: GGMLQuantizationType, num_columns: int) -> GGMLQuantizationType:
    """That kind, or one whose blocks divide the rows."""
    while num_columns % GGML_QUANT_SIZES[kind][0]:
        kind = SMALLER_BLOCKS[kind]
    return kind


def quantize(values: np.ndarray, kind: GGMLQuantizationType, threads: int = 1) -> np.ndarray:
    """Round rows of float32, (rows, columns), to a k-quant: bytes, (rows, bytes of a row).

    `threads`: how many parts of the rows are rounded at once. Raises ModelError where no library can.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    found = np.empty(quants.quant_shape_to_byte_shape(values.shape, kind), dtype=np.uint8)
    chunk = _chunk_function()

    def round_rows(rows: slice) -> None:
        part, target = values[rows], found[rows]
        chunk(int(kind), part.ctypes.data, target.ctypes.data, 0, *part.shape, NO_IMPORTANCE)

    borders = np.linspace(0, len(values), threads + 1).astype(int)
    parts = [slice(begin, end) for begin, end in zip(borders, borders[1:], strict=False) if end > begin]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(round_rows, parts))
    return found


@cache
def _chunk_function() -> Callable[..., int]:
    """`ggml_quantize_chunk(kind, values, target, first row, rows, columns, importance)`: bytes written."""
    for library in _libraries():
        try:
            found = ctypes.CDLL(str(library)).ggml_quantize_chunk
        except (OSError, AttributeError):  # of another machine, or without that function: the next one, or the error
            continue
        size, place = ctypes.c_int64, ctypes.c_void_p
        found.argtypes = (ctypes.c_int, place, place, size, size, size, place)
        found.restype = ctypes.c_size_t
        return found
    raise ModelError("No library of llama.cpp that can round to k-quants is here.", INSTALL_QUANTIZE)


def _libraries() -> list[Path]:
    found = {package: find_spec(package) for package in LIBRARIES}
    folders = {name: Path(spec.origin).parent for name, spec in found.items() if spec and spec.origin}
    return [path for name, folder in folders.items() for path in sorted(folder.glob(LIBRARIES[name]))]
