"""What libraries read from the environment when they are loaded: set before torch is imported, unless a person has.
And what they say then that nobody can act on: left unsaid."""

import logging
import os

# oneDNN compiles a kernel for each shape of a product in bfloat16 and keeps 1024 of them, half a megabyte each; torch
# keeps as many again. Rows have many lengths: in a run of the starter these grew to 0.7 GB. A step uses 60 to 140.
KEPT_KERNELS = "256"
SETTINGS = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": KEPT_KERNELS,
    "LRU_CACHE_CAPACITY": KEPT_KERNELS,  # torch's own
    "TOKENIZERS_PARALLELISM": "true",  # said out loud, it does not warn when a process is forked
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


# It misses a faster kernel for answers in 4 bits, which it would fetch from the hub: an error, it seems, in every log.
SILENT = "bitsandbytes.backends.cpu.ops"


def prepare() -> None:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.getLogger(SILENT).setLevel(logging.ERROR)
