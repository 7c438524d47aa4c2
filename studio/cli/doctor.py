"""`retune doctor`: can the studio work here, and with what."""

import json as jsonlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import typer

from studio import models
from studio.cli import show
from studio.cli.lazy import store
from studio.cli.options import JsonOption
from studio.paths import REPOSITORY, human_bytes, models_root, projects_root

SHOWN_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "streamlit", "sqlite-utils")
# Lowest versions without known code execution or memory corruption on files that are only loaded.
FLOORS = {"torch": (2, 10), "transformers": (5, 0), "streamlit": (1, 54), "starlette": (1, 1)}
LEAST_FREE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Finding:
    """`ok` False with `fatal` True means that the studio cannot work."""

    name: str
    ok: bool
    says: str
    fatal: bool = False


def doctor(json: JsonOption = False) -> None:
    """Check versions, device, libraries, disk and folders; exit code 1 with the cause when the studio cannot work.

    Example: retune doctor
    """
    findings = [_python(), *_packages(), *_engine(), _disk(), _projects(), _starter()]
    if json:
        show.as_json(findings)
    else:
        marks = {True: "ok", False: "-"}
        rows = [(("FAIL" if f.fatal and not f.ok else marks[f.ok]), f.name, f.says) for f in findings]
        show.table(["", "what", "here"], rows)
    broken = [finding for finding in findings if finding.fatal and not finding.ok]
    for finding in broken:
        show.fail(f"{finding.name}: {finding.says}")
    if broken:
        raise typer.Exit(1)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", sys.version_info >= (3, 11), f"{version} (3.11 or newer is needed)", fatal=True)


def _packages() -> list[Finding]:
    return [_package(name) for name in dict.fromkeys([*SHOWN_PACKAGES, *FLOORS])]


def _package(name: str) -> Finding:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, False, "not installed; run `make setup`", fatal=True)
    floor = FLOORS.get(name, ())
    found = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    enough = found >= floor
    return Finding(name, enough, version if enough else f"{version} is unsafe; upgrade it", fatal=True)


def _engine() -> list[Finding]:
    """What torch and its libraries say, asked in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "studio.engine.doctor"], cwd=REPOSITORY, capture_output=True, text=True, timeout=180
        )
        report = jsonlib.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        cause = locals().get("done")
        last = cause.stderr.strip().splitlines()[-1:] if cause else [str(error)]
        return [Finding("training engine", False, f"does not start: {''.join(last)[:300]}", fatal=True)]
    device = report.pop("device")
    formats = "bfloat16 and float32" if device["bfloat16"] else "float32"
    memory = f", {human_bytes(device['memory_bytes'])}" if "memory_bytes" in device else f", {os.cpu_count()} cores"
    findings = [Finding("device", True, f"{device['kind']} {device['name']}{memory}, {formats}")]
    return findings + [Finding(f"{name} here", item["works"], item["says"]) for name, item in report.items()]


def _disk() -> Finding:
    root = projects_root()
    existing = next(parent for parent in (root, *root.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    return Finding("free disk", free >= LEAST_FREE_BYTES, f"{human_bytes(free)} (2 GB or more is wanted)", fatal=True)


def _projects() -> Finding:
    root = projects_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".doctor-") as folder, store.open_db(Path(folder)):
            return Finding("projects", True, str(root), fatal=True)
    except Exception as error:  # whatever keeps a database from being made here is the finding
        return Finding("projects", False, f"{root} cannot hold a database: {error}", fatal=True)


def _starter() -> Finding:
    present = models.resolve("starter").present
    says = str(models_root() / "starter") if present else "not fetched; run `retune models fetch starter`"
    return Finding("starter model", present, says)
