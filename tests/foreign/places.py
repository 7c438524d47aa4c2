"""Where the files of others lie that tests read."""

import shutil
from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures"
XTUNER, DEEPSPEED = FIXTURES / "xtuner", FIXTURES / "deepspeed"
LORA, FULL, ZERO2 = (XTUNER / name / "iter_96.pth" for name in ("lora", "full", "zero2"))
TINY_LLAMA = XTUNER / "tiny-llama"
XTUNER_CONFIG = XTUNER / "tiny_llama_lora_personal_assistant_e3.py.txt"


def copied(source: Path, to: Path) -> Path:
    """A copy that a test may spoil."""
    to.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copytree(source, to) if source.is_dir() else shutil.copyfile(source, to))
