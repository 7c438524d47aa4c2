"""Every error a person may see. A message says what is wrong, the value, and what is allowed; the hint says what to do.

StudioError
  + ConfigError        one or more settings of a config are wrong
  + DataError          a dataset, row, template or tokenizer cannot be used
  + ProjectError       a workspace is missing, or a path leaves it
  + StoreError         the project's database cannot be opened
    - StoreBusyError   it cannot be written just now: the disk is full, or another process holds it
  + ModelError         a base model is missing or incomplete
  + CheckpointError    a checkpoint is damaged or does not fit
    - UnsafeFileError  a file would run code when opened
  + BundleError        a bundle of a run is damaged, hostile, or lacks something
  + JobError           a job cannot be started, stopped or found
  + DiskFullError      not enough space, before or while writing
  + ServerError        the model server does not answer
    - ChatTooLongError a chat is longer than the model can read
    - ServerBusyError  more requests wait at the model server than may
  + ToolError          a tool that an agent called gave nothing
"""

import struct
import zipfile
import zlib
from dataclasses import dataclass

# What zipfile raises for an archive that it cannot read. NotImplementedError is its word for a way of packing that it
# does not know, RuntimeError for a member with a password, ValueError and struct.error for fields that make no sense.
UNREADABLE_ZIP = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError
)  # fmt: skip


class StudioError(Exception):
    """Base of all; `str()` is the message followed by the hint."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        separator = "" if self.message.endswith("\n") else " "
        return f"{self.message}{separator}{self.hint}".strip()


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a config: where, what, and what is allowed there."""

    path: str
    message: str
    allowed: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" + (f" (allowed: {self.allowed})" if self.allowed else "")


class ConfigError(StudioError):
    """All problems of a config at once."""

    def __init__(self, problems: list[Problem], source: str = "config") -> None:
        self.problems = problems
        lines = "\n".join(f"  - {problem}" for problem in problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source} has {count}:\n{lines}\n", "Correct them and try again; nothing was started.")


class DataError(StudioError):
    """A dataset, row, template or tokenizer cannot be used."""


class ProjectError(StudioError):
    """A workspace is missing, or a path leaves it."""


class StoreError(StudioError):
    """The project's database cannot be opened."""


class StoreBusyError(StoreError):
    """The database is sound, and cannot be written just now: the disk is full, or another process holds it for long."""


class ModelError(StudioError):
    """A base model is missing or incomplete."""


class CheckpointError(StudioError):
    """A checkpoint is damaged or does not fit."""


class UnsafeFileError(CheckpointError):
    """A file would run code when opened; it was not opened."""


class BundleError(StudioError):
    """A bundle of a run is damaged, hostile, or lacks something."""


class JobError(StudioError):
    """A job cannot be started, stopped or found."""


class DiskFullError(StudioError):
    """Not enough space on the disk, found before or while writing."""


class ServerError(StudioError):
    """The model server does not answer as it should."""


class ChatTooLongError(ServerError):
    """A chat leaves no room for an answer in what the model can read."""


class ServerBusyError(ServerError):
    """More requests wait at the model server than may."""


class ToolError(StudioError):
    """A tool that an agent called gave nothing; the model is told why."""
