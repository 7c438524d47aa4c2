"""A run goes into one file and comes out again: the same losses and weights to the last bit, told in a table."""

import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from studio import datasets, runs, suites
from studio.bundles import comparing, reproducing
from studio.bundles.content import open_bundle
from studio.bundles.packing import pack
from studio.bundles.reproducing import make_plan, start
from studio.config.yaml import with_settings
from studio.errors import BundleError
from studio.paths import REPOSITORY
from studio.projects import Project, create_project, delete_project, list_projects
from studio.scores import scorecard
from studio.store import evaluations, metrics, open_db
from studio.store import runs as store_runs
from studio.store.evaluations import Evaluation
from tests.bundles.conftest import HOURS, RUN
from tests.cli.conftest import run as retune


def test_the_same_run_gives_the_same_bytes(tiny: Project, home: Path, tmp_path: Path) -> None:
    pack(tiny, RUN, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == (home / "tiny.zip").read_bytes()


def test_what_is_inside(home: Path, tiny: Project) -> None:
    with zipfile.ZipFile(home / "tiny.zip") as archive:
        names = set(archive.namelist())
        config, readme = archive.read("config.yaml").decode(), archive.read("README.md").decode()
        everything = b"".join(archive.read(name) for name in names)
    assert names == {
        "bundle.json", "config.yaml", "metrics.json", "README.md", "samples.jsonl", "answers.jsonl",
        "data/identity.jsonl", "data/identity.probes.jsonl", "suites/hours.yaml",
    }  # fmt: skip
    with open_bundle(home / "tiny.zip") as bundle:
        manifest = bundle.manifest
    assert manifest.run.step == 5 and len(manifest.run.learned_sha256) == 64 and manifest.has_rows
    assert {"torch", "device name", "threads", "template", "code"} <= manifest.circumstances.keys()
    assert [(card.suite, card.limit) for card in manifest.scorecards] == [("standard", 2), ("hours", 0)]
    assert [card.scores[0].name for card in manifest.scorecards] == ["identity", "passed of opening"]
    assert "base: tiny\n" in config and "The rows are inside" in readme and "torch==" in readme
    assert str(tiny.folder).encode() not in everything and str(home).encode() not in everything


def test_without_rows_nothing_of_them_is_inside(home: Path) -> None:
    with zipfile.ZipFile(home / "bare.zip") as archive:
        assert set(archive.namelist()) == {"bundle.json", "config.yaml", "metrics.json", "README.md"}
        assert b"Luna" not in b"".join(archive.read(name) for name in archive.namelist())


@pytest.mark.parametrize(("scored", "every", "minutes"), [(4, 2, 0), (5, 2, 2), (4, 0, 2)])
def test_checkpoints_of_the_time_do_not_push_out_those_to_be_scored(
    home: Path, scored: int, every: int, minutes: int
) -> None:
    """Where the run saved every few steps and one before the last was scored, the second run saves these alone."""
    with open_bundle(home / "tiny.zip") as bundle:
        plan = make_plan(bundle)
        card = bundle.manifest.scorecards[0].model_copy(update={"step": scored})
        manifest = bundle.manifest.model_copy(update={"scorecards": (card,)})
        config = with_settings(bundle.config, [f"record.save_every_steps={every}"])
        changed = replace(bundle, config=config, expected=replace(bundle.expected, manifest=manifest))
    assert reproducing._config_here(changed, plan).record.save_every_minutes == minutes


def test_bundle_and_reproduce_in_the_shell(home: Path, tiny: Project, tmp_path: Path) -> None:
    said = retune("bundle", RUN, "--project", "tiny", "--out", tmp_path / "run.zip")
    assert "The rows are inside: identity (12 rows)" in said
    before = {project.slug for project in list_projects()}
    told = retune("reproduce", tmp_path / "run.zip", "--dry-run")
    assert "Project: tiny-1 (new)" in told and "Rows of identity: from the bundle" in told
    assert {project.slug for project in list_projects()} == before

    said = retune("reproduce", tmp_path / "run.zip", "--project", "Once more")
    assert "those of the bundle" in said and "Reproduced to the last bit" in said
    assert "all 5 values equal to the last bit" in said
    [project] = [project for project in list_projects() if project.name == "Once more"]
    assert losses(project) == losses(tiny) and len(losses(project)) == 5
    found = comparing.compare(project, RUN)
    assert found and found.is_exact and {line.kind for line in found.lines} == {"steps", "numbers", "weights", "score"}
    assert {line.verdict for line in found.lines} == {"equal"}
    assert found.lines[-1].what == "hours: passed of opening at step 5" and suites.text_of(project, "hours") == HOURS
    delete_project(project.slug)


def losses(project: Project) -> list[float | None]:
    with open_db(project.folder) as db:
        return [point.value for point in metrics.series(db, RUN, "train/loss")]


def test_what_is_not_inside_is_asked_for_by_fingerprint(home: Path, tiny: Project, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(tiny.path("data", "identity.jsonl").read_bytes())
    with open_bundle(home / "bare.zip") as bundle:
        assert make_plan(bundle).rows == {"identity": "tiny"}  # found in another project
        assert make_plan(bundle, tiny).rows == {"identity": "this project"}
        given = make_plan(bundle, given={"data.identity": rows})
        assert given.rows == {"identity": str(rows)} and not given.missing
        rows.write_text(rows.read_text().replace("Luna", "Luno"))
        with pytest.raises(BundleError, match="not those of the run"):
            start(bundle, given, {"data.identity": rows}, name="Never")
        with pytest.raises(BundleError, match="asks for no 'data.other'"):
            make_plan(bundle, given={"data.other": rows})
    assert "never" not in {project.slug for project in list_projects()}


def test_elsewhere_what_is_missing_is_told(home: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETUNE_HOME", str(own_home))
    told = retune("reproduce", home / "bare.zip", "--dry-run")
    assert "the 12 rows of 'identity' with fingerprint" in told and "--with data.identity=PATH" in told
    assert "the base model 'tiny' with fingerprint" in told and "--with base=PATH" in told
    refused = retune("reproduce", home / "bare.zip", code=1)
    assert "cannot be reproduced yet" in refused
    assert list_projects() == []


def test_another_dataset_of_that_name_is_never_overwritten(home: Path, tiny: Project) -> None:
    other = create_project("Other")
    datasets.save(other, "identity", datasets.load(tiny, "identity")[:3], kind="import")
    with open_bundle(home / "tiny.zip") as bundle:
        plan = make_plan(bundle, other)
        assert "choose another project" in plan.missing["data.identity"]
        with pytest.raises(BundleError):
            start(bundle, plan)
    assert datasets.get(other, "identity").num_rows == 3
    delete_project(other.slug)


def test_another_suite_of_that_name_is_never_overwritten(home: Path, tiny: Project, tmp_path: Path) -> None:
    """Nor is a suite bundled that no longer asks what the scorecard says; its scorecard stands alone then."""
    other, edited = create_project("Other"), HOURS.replace("midnight", "noon")
    suites.save_text(other, "hours", edited)
    with open_bundle(home / "tiny.zip") as bundle:
        assert "suite.hours" not in make_plan(bundle, tiny).missing
        assert "choose another project" in make_plan(bundle, other).missing["suite.hours"]
    delete_project(other.slug)
    suites.save_text(tiny, "hours", edited)
    try:
        pack(tiny, RUN, tmp_path / "edited.zip")
    finally:
        suites.save_text(tiny, "hours", HOURS)
    with open_bundle(tmp_path / "edited.zip") as bundle:
        assert bundle.manifest.own_suites == {"hours"} and "suites/hours.yaml" not in bundle.manifest.files
        project, run, _ = start(bundle, make_plan(bundle), name="Alone")
    assert comparing.scorecards_due(project, run.id) == [comparing.Due(5, 2)]
    delete_project(project.slug)


def test_a_run_that_differs_says_how_far_and_why(home: Path, tiny: Project) -> None:
    """The second run is bent afterwards: one loss, one score outside the interval, another version of torch."""
    with open_bundle(home / "tiny.zip") as bundle:
        project, run, _ = start(bundle, make_plan(bundle), name="Bent")
        expected = bundle.expected
    first = expected.metrics["train/loss"][2][1]
    with open_db(project.folder) as db:
        metrics.record(db, run.id, 3, {"train/loss": first * 1.01})
        began = store_runs.get(db, run.id).detail["began"]
        began[0]["circumstances"]["torch"] = "1.0"
        store_runs.note(db, run.id, began=began)
        other_suite = Evaluation("job", "by hand", "tiny", "", "", scorecard([]), run.id, step=5, suite="format")
        evaluations.add(db, other_suite, [])
    found = comparing.compare(project, run.id)
    assert found and not found.is_exact
    line = next(line for line in found.lines if line.what == "train/loss")
    assert line.verdict == "apart" and "first unequal at step 3" in line.note and "(1.00%), at step 3" in line.note
    assert [each.what for each in found.differences] == ["torch"]
    assert any("The circumstances differ: torch" in each for each in found.sentences)
    assert comparing.scorecards_due(project, run.id) == [comparing.Due(5, 2), comparing.Due(5, 0, "hours")]
    assert next(line for line in found.lines if line.kind == "score").verdict == "missing"
    with open_db(project.folder) as db:
        db.table("metrics").delete_where("run_id = ?", [run.id])
        store_runs.update(db, run.id, step=4)
    found = comparing.compare(project, run.id)
    assert found and not any("losses" in each for each in found.sentences), "nothing is said of what is not there"
    delete_project(project.slug)


def test_a_deepspeed_file_that_the_run_did_not_read_stays_out(tiny: Project, tmp_path: Path) -> None:
    frozen = runs.run_folder(tiny, RUN) / runs.CONFIG_FILE
    text = frozen.read_text(encoding="utf-8")
    frozen.write_text(text.replace("deepspeed: zero2", "deepspeed: /home/someone/mine.json"), encoding="utf-8")
    assert frozen.read_text(encoding="utf-8") != text
    try:
        pack(tiny, RUN, tmp_path / "run.zip")
    finally:
        frozen.write_text(text, encoding="utf-8")
    with open_bundle(tmp_path / "run.zip") as bundle:
        assert bundle.config.distributed.deepspeed == "zero2" and not bundle.manifest.outside


def test_a_run_that_goes_on_is_not_bundled(tiny: Project, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="elsewhere"):
        with open_db(tiny.folder) as db:
            store_runs.add(db, store_runs.Run("far-1", "far", "starter", "lora", step=3, detail={"imported": {}}))
        pack(tiny, "far-1", tmp_path / "never.zip")
    assert not (tmp_path / "never.zip").exists()
    with open_db(tiny.folder) as db:
        store_runs.update(db, "far-1", archived_at="now")
    assert runs.get_run(tiny, RUN).state == "finished"


def test_the_readme_names_commands_that_there_are(home: Path) -> None:
    with open_bundle(home / "tiny.zip") as bundle:
        verbs = {command.split()[1] for command in bundle.manifest.commands}
    reference = (REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8")
    assert all(f"## retune {verb}" in reference for verb in verbs)
