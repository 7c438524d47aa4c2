"""The tools that `train.py` measures the studio beside, each in a virtual environment of its own.

    python benchmarks/peers.py [--folder FOLDER]

Their pins exclude each other. An environment therefore borrows what it can (torch, NumPy, pyarrow) from the one that
runs this script, through a line in a .pth file, and gets its own copies of what its tool pins, without their
dependencies. Takes about a minute and 300 MB; what is there already is left alone.
"""

import argparse
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from studio.paths import models_root  # noqa: E402


@dataclass(frozen=True)
class Peer:
    """A tool, the packages that it needs in versions of its own, and what must import when they are there.

    `stubs` are packages that the tool imports without need and whose builds do not load beside torch for the CPU.
    """

    name: str
    packages: tuple[str, ...]
    check: str
    stubs: tuple[str, ...] = ()


PEERS = (
    Peer("transformers", (), "from peft import LoraConfig; from transformers import Trainer"),
    Peer("trl", ("trl==1.16.0",), "from trl import SFTTrainer"),
    Peer(
        "llamafactory",
        (
            "llamafactory==0.9.5", "transformers==5.6.0", "tokenizers==0.22.2", "huggingface_hub==1.33.0",
            "peft==0.18.1", "trl==0.24.0", "datasets==4.0.0", "accelerate==1.11.0", "fsspec==2025.3.0", "dill==0.3.8",
            "multiprocess==0.70.16", "omegaconf==2.4.0", "antlr4-python3-runtime==4.9.3", "fire==0.7.1",
            "termcolor==3.3.0", "tiktoken==0.14.0", "sentencepiece==0.2.3",
        ),
        "from llamafactory.train.tuner import run_exp",
        stubs=("torchaudio",),
    ),
)  # fmt: skip
DONE = ".retune-peer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=default_folder())
    options = parser.parse_args()
    for peer in PEERS:
        build(options.folder, peer)
        print(f"{peer.name}: {python_of(options.folder, peer.name)}", flush=True)


def default_folder() -> Path:
    return models_root().parent / "peers"


def python_of(folder: Path, name: str) -> Path:
    """The interpreter of a peer's environment."""
    return folder / name / "bin" / "python"


def is_built(folder: Path, name: str) -> bool:
    return (folder / name / DONE).is_file()


def build(folder: Path, peer: Peer) -> None:
    """Make a peer's environment and try its imports. Raises CalledProcessError when something is not to be had."""
    root, python = folder / peer.name, python_of(folder, peer.name)
    recipe = "\n".join([*peer.packages, *peer.stubs])
    if is_built(folder, peer.name) and (root / DONE).read_text(encoding="utf-8") == recipe:
        return
    venv.create(root, clear=True, symlinks=True, with_pip=False)
    own = root / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (own / "borrowed.pth").write_text(f"{_site_packages()}\n", encoding="utf-8")
    for stub in peer.stubs:
        (own / stub).mkdir()
        (own / stub / "__init__.py").write_text("", encoding="utf-8")
    if peer.packages:
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, *peer.packages], check=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DISABLE_VERSION_CHECK": "1"}
    subprocess.run([python, "-c", peer.check], check=True, env=environment)
    (root / DONE).write_text(recipe, encoding="utf-8")


def _site_packages() -> Path:
    """Where torch and its kin are, which need not be this environment's own folder."""
    found = find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent.parent


if __name__ == "__main__":
    main()
