"""What a run is scored on: the identity that it was trained on, and no newer one."""

from collections.abc import Callable

import pytest

from studio import datasets, runs
from studio.config.catalog import preset
from studio.config.schema import RunConfig
from studio.config.yaml import save_config
from studio.data.formats import Conversation, Message
from studio.data.identity import Identity
from studio.errors import DataError
from studio.projects import Project
from studio.store import open_db
from studio.store import runs as store_runs

MakeRun = Callable[..., str]


@pytest.fixture
def make_run(project: Project) -> MakeRun:
    """`make_run("identity", "general")`: a run that was trained on these."""

    def make(*sources: str) -> str:
        values = preset("starter_lora").model_dump() | {"name": "lora"}
        values["data"]["sources"] = dict.fromkeys(sources, 1.0)
        config = RunConfig.model_validate(values)
        with open_db(project.folder) as db:
            run_id = store_runs.next_id(db, "lora")
            store_runs.add(db, store_runs.Run(run_id, "lora", "starter", "lora"))
        folder = runs.run_folder(project, run_id)
        folder.mkdir(parents=True)
        save_config(folder / runs.CONFIG_FILE, config)
        return run_id

    return make


def add_general(project: Project, name: str = "general") -> None:
    probe = {"messages": [{"role": "user", "content": "2+2?"}], "kind": "general"}
    row = Conversation((Message("user", "1+1?"), Message("assistant", "2")))
    datasets.save(project, name, [row], kind="general", probes=[probe])


def test_a_run_is_asked_for_the_identity_that_it_was_trained_on(project: Project, make_run: MakeRun) -> None:
    datasets.build_identity(project, Identity("Luna", "Shane"), 20, name="luna")
    add_general(project)
    run_id = make_run("luna", "general")
    datasets.build_identity(project, Identity("Mira", "Noor"), 20, name="mira")
    assert runs.probe_sets(project, run_id) == ["luna", "general"]
    assert runs.asked_identity(project, runs.probe_sets(project, run_id)) == ["Luna", "Shane"]
    assert runs.asked_identity(project, runs.probe_sets(project, make_run("mira"))) == ["Mira", "Noor"]


def test_general_questions_are_asked_in_any_case(project: Project, make_run: MakeRun) -> None:
    datasets.build_identity(project, Identity("Luna", "Shane"), 20)
    add_general(project)
    add_general(project, "other")
    assert runs.probe_sets(project, make_run("identity")) == ["identity", "general", "other"]
    assert runs.probe_sets(project, make_run("identity", "other")) == ["identity", "other"]
    assert runs.probe_sets(project, make_run("imported")) == ["general", "other"]
    assert runs.asked_identity(project, ["general"]) == []


def test_a_run_that_nothing_can_be_asked_of(project: Project, make_run: MakeRun) -> None:
    datasets.build_identity(project, Identity("Luna", "Shane"), 20)
    with pytest.raises(DataError, match="general"):
        runs.start_evaluate(project, make_run("imported"), 1)
