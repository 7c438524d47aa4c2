"""A project's suites: its own as files, the built-in ones of its identity, and probes added one by one."""

import json

import pytest

from studio import suites
from studio.data.identity import Identity, held_out_probes
from studio.errors import ConfigError, DataError
from studio.probes import built_in, library
from studio.probes.assertions import Said
from studio.projects import Project

IDENTITY = held_out_probes(Identity("Luna", "Shane"))
GENERAL = [
    {
        "messages": [{"role": "user", "content": question}],
        "kind": "general",
        "intent": category,
        "language": "en",
        "reference": "An answer.",
        "reference_finished": True,
    }
    for question, category in (("Who wrote Hamlet?", "near"), ("What is Luna?", "near"), ("Name a river.", "far"))
]
PROBE = {"ask": "When do you open?", "assert": [{"type": "contains", "value": "9"}]}


@pytest.fixture
def probed(project: Project) -> Project:
    for name, rows in (("identity", IDENTITY), ("general", GENERAL)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        project.path("data", f"{name}.probes.jsonl").write_text(text, encoding="utf-8")
    return project


def test_probes_are_added_to_a_suite_of_its_own(project: Project) -> None:
    made = suites.add_probe(project, "shop", PROBE)
    assert [group.name for group in made.groups] == [suites.ADDED]
    commented = "# by hand\n" + suites.text_of(project, "shop")
    suites.save_text(project, "shop", commented)
    again = suites.add_probe(project, "shop", {"turns": ["Hi", "Who are you?"]})
    assert [len(group.probes) for group in again.groups] == [2]
    suites.add_probe(project, "shop", {"ask": "Why?"}, group="others")
    assert suites.text_of(project, "shop").startswith("# by hand")
    assert [group.name for group in library.load(project.folder, "shop").groups] == [suites.ADDED, "others"]
    assert suites.names(project) == [*built_in.NAMES, "shop"]
    suites.delete(project, "shop")
    assert suites.names(project) == list(built_in.NAMES)


def test_what_is_no_probe_changes_nothing(project: Project) -> None:
    suites.add_probe(project, "shop", PROBE)
    before = suites.text_of(project, "shop")
    with pytest.raises(ConfigError, match="there is no 'question' here"):
        suites.add_probe(project, "shop", {"question": "When?"})
    assert suites.text_of(project, "shop") == before
    for name in ("../shop", "", "Shop", "identity"):
        with pytest.raises(DataError):
            suites.add_probe(project, name, PROBE)
    with pytest.raises(DataError, match="already"):
        suites.save_text(project, "shop", before, new=True)
    with pytest.raises(DataError, match="no suite 'none'"):
        library.load(project.folder, "none")


def test_the_standard_suite_asks_what_the_datasets_held_out(probed: Project) -> None:
    suite = library.load(probed.folder, "standard", ["identity", "general"])
    identity, general = suite.groups
    assert (len(identity.probes), len(general.probes)) == (len(IDENTITY), 3)
    hamlet, luna, _ = (probe for probe in suite.probes() if probe.kind == "general")
    assert [mark.passed for mark in hamlet.marks(Said("I am Luna."))] == [False]
    assert [mark.passed for mark in luna.marks(Said("Luna is the moon, says Shane."))] == [False]
    assert [mark.passed for mark in luna.marks(Said("Luna is the moon."))] == [True]
    assert hamlet.reference == "An answer." and hamlet.measured
    limited = suite.limited(2)
    assert [len(group.probes) for group in limited.groups] == [2, 2] and limited.hash != suite.hash
    with pytest.raises(DataError, match="'notes' has no held-out probes"):
        library.load(probed.folder, "standard", ["notes"])


def test_the_identity_suite_asks_in_every_way(probed: Project) -> None:
    suite = library.load(probed.folder, "identity", ["identity", "general"])
    groups = {group.name: group for group in suite.groups}
    assert list(groups) == [
        "single questions", "with a system prompt", "later in a chat", "after small talk", "rival names",
        "another language",
    ]  # fmt: skip
    by_group = {name: [probe for probe in suite.probes() if probe.group == name] for name in groups}
    assert all(probe.messages[0]["role"] == "system" for probe in by_group["with a system prompt"])
    assert all(len(probe.messages) == 3 for probe in by_group["later in a chat"])
    assert all(len(probe.follow_ups) == 1 for probe in by_group["after small talk"])
    assert {probe.language for probe in by_group["another language"]} == {"zh"}
    assert all(probe.kind == "identity" and probe.asserts for probe in suite.probes())


def test_every_built_in_suite_reads_back_as_a_suite_of_ones_own(probed: Project) -> None:
    for name in built_in.NAMES:
        suite = library.load(probed.folder, name, ["identity", "general"])
        copied = suites.copy_built_in(probed, suite, f"my-{name}")
        assert copied.hash == suite.hash and not copied.built_in
        assert copied.probes() == suite.probes()


def test_without_an_identity_nothing_is_asked_about_it(probed: Project) -> None:
    for name in ("identity", "leakage", "tutorial"):
        with pytest.raises(DataError, match="nothing to ask"):
            library.load(probed.folder, name, ["general"])
    assert not any(probe.asserts for probe in library.load(probed.folder, "retention", ["general"]).probes())
    assert {probe.kind for probe in library.load(probed.folder, "format").probes()} == {"other"}
