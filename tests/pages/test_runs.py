"""Compare, tab Runs: leads on when empty, recommends, shows overfitting in red, and only what differs."""

import pytest

from studio.store import open_db
from tests.scored import add_run, card, hits, store

PAGE = "pages/5_Compare.py"


@pytest.fixture
def two_runs(project):
    """lora-1, which learns and stays itself, and tutorial-1, which says its name to everything."""
    add_run(project, "lora-1", [], {"identity": 1, "general": 1})
    add_run(project, "tutorial-1", ["train.learning_rate=1e-3"], {"tutorial": 1, "general": 2})
    with open_db(project.folder) as db:
        store(db, card(10, hits(5, 40), hits(0, 40)), card(20, hits(39, 40), hits(0, 40)))
        store(db, card(20, hits(40, 40), hits(39, 40), loss=24.0, run_id="tutorial-1"))


def words(at):
    parts = [*at.markdown, *at.caption, *at.info, *at.error, *at.success, *at.warning]
    return "\n".join(str(part.value) for part in parts).replace("\\", "").replace("\u2060", "")


def in_red(at):
    """What is shown in red about overfitting; other tabs of the page have errors of their own."""
    shown = [str(error.value).replace("\\", "").replace("\u2060", "") for error in at.error]
    return [error for error in shown if "overfitted" in error]


def tables(at):
    return {tuple(frame.value.columns)[0]: frame.value for frame in at.dataframe}


def test_without_runs_it_leads_on(open_page, project):
    assert "No run yet. Two runs are compared" in words(open_page(PAGE, tab="runs"))


def test_one_is_recommended_and_tutorial_mode_stands_in_red(open_page, two_runs):
    at = open_page(PAGE, tab="runs")
    assert "lora-1 step 20 (identity 97.5 %, leakage 0.0 %) scores best" in words(at)
    [red] = in_red(at)
    assert "tutorial-1 is overfitted at step 20, its only scored checkpoint" in red
    assert "39 of 40 unrelated answers: 97.5 % (95 %: 87.1 % to 99.6 %)" in red and "Identity: 100.0 % (91.2" in red


def test_only_what_differs_is_listed(open_page, two_runs):
    found = tables(open_page(PAGE, tab="runs"))
    assert list(found["Setting"]["Setting"]) == ["train.learning_rate"]
    assert set(found["Setting"].iloc[0]) == {"train.learning_rate", "0.001", "0.0005"}
    assert sorted(found["Dataset"]["Dataset"]) == ["general", "identity", "tutorial"]
    assert list(found["Run"]["Step"]) == ["20", "20"]


def test_one_run_alone_is_advised_on(open_page, two_runs):
    at = open_page(PAGE, tab="runs")
    at.multiselect(key="runs.picks").set_value(["lora-1"]).run()
    assert not at.exception and not in_red(at) and "Setting" not in tables(at)
    at.segmented_control(key="runs.axis").set_value("tokens").run()
    assert not at.exception


def test_the_report_can_be_taken_along(open_page, two_runs):
    labels = [button.label for button in open_page(PAGE, tab="runs").get("download_button")]
    assert labels[-2:] == ["Download as one HTML page", "Download as Markdown"]


def test_chinese(open_page, two_runs):
    at = open_page(PAGE, tab="runs", lang="zh")
    assert "lora-1 第 20 步（身份 97.5 %，泄漏 0.0 %）得分最高" in words(at)
    assert "40 个无关回答中有 39 个说出了身份" in words(at)
