"""An answer of a conversation, as given or repaired, becomes a row of a dataset, with its lint, or a probe."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from studio import chats, dataset_checks, datasets, suites
from studio.chats import Told
from studio.data.conversation import Conversation, messages_of
from studio.data.lint.check import lint
from studio.data.lint.findings import Finding
from studio.errors import DataError
from studio.probes.suite import Suite
from studio.projects import Project


@dataclass(frozen=True)
class KeptRow:
    """Row `row` (from 1) of a dataset that was just added, at the version it now has, and what is wrong with it."""

    dataset: str
    row: int
    version: int
    findings: tuple[Finding, ...]


def conversation_of(before: Sequence[Told], told: Told, model: str, answer: str) -> Conversation:
    """The conversation up to this turn as one column had it, ending in `answer`. Raises DataError for an empty one."""
    if not answer.strip():
        raise DataError("An empty answer teaches nothing.", "Write what should have been said.")
    turns = chats.messages(before, model, told.turn.system, told.turn.question)
    return Conversation(tuple(messages_of([*turns, {"role": "assistant", "content": answer.strip()}])))


def add_row(project: Project, name: str, conversation: Conversation, made_by: str) -> KeptRow:
    """Add a row at the end of a dataset, as a new version; of one that is not there yet it is the first.

    Raises DataError for a name that is none, or when the dataset was changed by someone else meanwhile.
    """
    there = next((dataset for dataset in datasets.listed(project) if dataset.name == name), None)
    if there is None:
        saved = datasets.save(project, name, [conversation], "import", {"file": "Compare"}, made_by=made_by)
    else:
        rows = chain(datasets.stream(project, name), [conversation])
        saved = datasets.save(project, name, rows, made_by=made_by, expected_version=there.version)
    return KeptRow(name, saved.num_rows, saved.version, _findings(project, name, saved.num_rows, conversation))


def add_probe(
    project: Project, suite: str, before: Sequence[Told], told: Told, model: str, says: str = "", says_not: str = ""
) -> Suite:
    """Ask this turn of every model from now on, as one column was asked it, as a probe of a suite of the project.

    `says` must stand in the answer, `says_not` must not; letters may be large or small. Raises DataError when neither
    is given.
    """
    asserts = [
        {"type": kind, "value": text.strip()}
        for kind, text in (("icontains", says), ("not-icontains", says_not))
        if text.strip()
    ]
    if not asserts:
        raise DataError("A probe needs something to look for.", "Write what the answer must say, or must not say.")
    messages = chats.messages(before, model, told.turn.system, told.turn.question)
    return suites.add_probe(project, suite, {"messages": messages, "assert": asserts})


def take_back(project: Project, kept: KeptRow) -> None:
    """Undo `add_row`. Raises DataError when the dataset has changed since."""
    if kept.version > 1:
        datasets.undo(project, kept.dataset, kept.version)
    else:
        datasets.delete(project, kept.dataset, kept.version)


def _findings(project: Project, name: str, row: int, conversation: Conversation) -> tuple[Finding, ...]:
    """What the lint says of this row: among all rows, or by itself where there are too many for a short wait."""
    if dataset_checks.is_large(datasets.get(project, name)):
        return tuple(lint([conversation]).findings)
    found = dataset_checks.lint_dataset(project, name).findings
    return tuple(each for each in found if row == each.row or row in each.others)
