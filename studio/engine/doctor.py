"""`python -m studio.engine.doctor`: what the training libraries can do on this machine, as one JSON object."""

import importlib
import importlib.util
import json
import os
import shutil
import sys
from importlib.metadata import version
from typing import Any

import torch

from studio.engine.devices import has_fast_bfloat16, pick_device


def report() -> dict[str, Any]:
    """Device, number formats, and for each optional library what it can do here or why it cannot."""
    return {
        "device": _device(),
        "bitsandbytes": _try(_bitsandbytes),
        "deepspeed": _try(_deepspeed),
        "flash_attn": _try(_flash_attn),
        "liger_kernel": _try(_liger_kernel),
    }


def _device() -> dict[str, Any]:
    device = pick_device()
    bfloat16 = has_fast_bfloat16(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory
        return {"kind": "cuda", "name": properties.name, "memory_bytes": memory, "bfloat16": bfloat16}
    capability = torch.backends.cpu.get_cpu_capability()
    return {"kind": "cpu", "name": capability, "cores": os.cpu_count(), "bfloat16": bfloat16}


def _try(check: Any) -> dict[str, Any]:
    try:
        return {"works": True, "says": check()}
    except RuntimeError as error:  # said by the check itself
        return {"works": False, "says": str(error)[:200]}
    except Exception as error:  # a broken optional library must be reported, whatever it raises
        return {"works": False, "says": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


def _bitsandbytes() -> str:
    """Quantise a small matrix to NF4 and back: what QLoRA rests on."""
    from bitsandbytes import functional

    weights = torch.randn(64, 64, device="cuda" if torch.cuda.is_available() else "cpu")
    packed, state = functional.quantize_4bit(weights, quant_type="nf4")
    error = (functional.dequantize_4bit(packed, state) - weights).abs().mean().item()
    if not error < 0.2:
        raise RuntimeError(f"NF4 round trip is off by {error:.2f}")
    optimizers = "8-bit optimizers" if torch.cuda.is_available() else "no 8-bit optimizers on a CPU"
    return f"QLoRA (NF4) works; {optimizers}"


def _deepspeed() -> str:
    _must_be_installed("deepspeed", "pip install --no-build-isolation deepspeed")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = importlib.import_module("deepspeed")
    from deepspeed.ops.op_builder import CPUAdamBuilder

    device = "NCCL between GPUs" if torch.cuda.is_available() else "gloo between processes of the CPU"
    compiles = shutil.which("g++") is not None and CPUAdamBuilder().is_compatible(verbose=False)
    offload = "its own operators compile" if compiles else "its own operators do not compile here (g++ is needed)"
    return f"version {deepspeed.__version__}; ZeRO 1 to 3 with {device}; {offload}"


def _flash_attn() -> str:
    if not torch.cuda.is_available():
        raise RuntimeError("needs a CUDA GPU; PyTorch's own attention (SDPA) is used")
    _must_be_installed("flash_attn", "pip install --no-build-isolation flash-attn")
    return f"version {importlib.import_module('flash_attn').__version__}"


def _liger_kernel() -> str:
    if not torch.cuda.is_available():
        raise RuntimeError("needs a CUDA GPU; the studio's and PyTorch's own code is used")
    _must_be_installed("liger_kernel", "pip install liger-kernel")
    return f"version {version('liger-kernel')}; a run takes what is right and faster here, and says so"


def _must_be_installed(name: str, how: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise RuntimeError(f"not installed; {how}")


if __name__ == "__main__":
    json.dump(report(), sys.stdout)
