"""The Compare page: leads on when empty, loads by jobs, asks all columns, scores, and says plainly what it means."""

import json
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from studio import datasets, runs, scores, suites
from studio.config.catalog import preset
from studio.config.yaml import save_config
from studio.data.identity import Identity
from studio.probes import library
from studio.store import checkpoints, evaluations, open_db
from studio.store import jobs as store_jobs
from studio.store import runs as store_runs
from studio.ui.verdict import verdict
from tests.marked import mark
from tests.pages.model_server import ModelServer

PAGE = "pages/5_Compare.py"


@pytest.fixture
def checkpoint(project):
    with open_db(project.folder) as db:
        store_runs.add(db, store_runs.Run("lora-1", "lora", "starter", "lora", num_steps=20, step=20))
        checkpoints.put(db, checkpoints.Checkpoint("lora-1", 20, "runs/lora-1/step_20.pth", "abc", 5000))
    runs.run_folder(project, "lora-1").mkdir(parents=True)
    save_config(runs.run_folder(project, "lora-1") / runs.CONFIG_FILE, preset("starter_lora"))
    return checkpoints.Checkpoint("lora-1", 20, "", "", 0)


@pytest.fixture
def converted(project, checkpoint):
    folder = runs.hf_folder(project, "lora-1", 20)
    folder.mkdir(parents=True)
    (folder / "retune_weights.json").write_text('{"sha256": "abc"}')
    return folder


@pytest.fixture
def started(monkeypatch):
    """Jobs that would have been started; each lives as long as this process."""
    calls = []

    def start(folder, kind, args, **more):
        calls.append((kind, args))
        me = psutil.Process()
        job = store_jobs.Job(
            kind=kind, args=args, state="running", pid=me.pid, process_created=me.create_time(), phase="loading"
        )
        with open_db(folder) as db:
            store_jobs.add(db, job)
        (folder / "jobs" / job.id).mkdir(parents=True)
        return job

    monkeypatch.setattr("studio.jobs.start", start)
    monkeypatch.setattr("studio.runs.require", lambda base: Path("a model"))
    return calls


@pytest.fixture
def server(project, converted, started):
    """A model server that is ready, with its job."""
    server = ModelServer(["starter"])
    job = runs.start_server(project.folder, "starter", [])
    started.clear()
    connection = {"url": server.connection.url, "token": server.connection.token}
    project.path("jobs", job.id, "connection.json").write_text(json.dumps(connection))
    yield server
    server.close()


def words(at):
    parts = [*at.markdown, *at.caption, *at.error, *at.info, *at.success, *at.warning, *at.text]
    return "\n".join(str(part.value) for part in parts)


def loaded(open_page, **more):
    at = open_page(PAGE, **more)
    at.button(key="compare.load").click().run()
    assert not at.exception
    return at


def finish(at):
    """Let the answers come, then let the page read them."""
    exchange = at.session_state["kept.luna.compare.exchange"]
    exchange.wait(10)
    at.run()
    assert not at.exception
    return exchange


def test_empty_project_leads_to_train(open_page, project):
    assert "no checkpoint to compare" in words(open_page(PAGE))
    assert "No scorecard yet" in words(open_page(PAGE, tab="scorecard"))


def test_one_part_is_drawn_and_what_was_put_into_the_others_stays(open_page, project, checkpoint):
    at = open_page(PAGE, tab="scorecard")
    at.text_input(key="suite.new").set_value("shop").run()
    at.segmented_control(key="compare.tab").set_value("runs").run()
    assert not [each for each in at.text_input if each.key == "suite.new"]
    at.segmented_control(key="compare.tab").set_value("scorecard").run()
    assert at.text_input(key="suite.new").value == "shop"


@pytest.fixture
def other_base(project):
    """A run on another base than the project's, with a checkpoint that is converted."""
    with open_db(project.folder) as db:
        store_runs.add(db, store_runs.Run("big-1", "big", "*owner*/name", "lora", num_steps=9, step=9))
        checkpoints.put(db, checkpoints.Checkpoint("big-1", 9, "runs/big-1/step_9.pth", "abc", 5000))
    folder = runs.hf_folder(project, "big-1", 9)
    folder.mkdir(parents=True)
    (folder / "retune_weights.json").write_text('{"sha256": "abc"}')


def test_checkpoints_of_another_base_are_compared_with_that_base(open_page, other_base, started, monkeypatch):
    monkeypatch.setattr("studio.models.resolve", lambda base: SimpleNamespace(present=True, folder=Path("a model")))
    at = loaded(open_page)
    assert at.multiselect(key="compare.picks").value == ["*owner*/name", "big-1-step_9"]
    assert [(kind, args["base"]) for kind, args in started] == [("serve", "*owner*/name")]


def test_another_base_is_a_choice_and_loads_nothing_by_itself(open_page, converted, other_base, started, monkeypatch):
    monkeypatch.setattr("studio.models.resolve", lambda base: SimpleNamespace(present=True, folder=Path("a model")))
    at = loaded(open_page)
    assert at.selectbox(key="compare.base").value == "starter"
    at.selectbox(key="compare.base").select("*owner*/name").run()
    assert not at.exception and [args["base"] for _kind, args in started] == ["starter"]
    assert at.multiselect(key="compare.picks").value == ["*owner*/name", "big-1-step_9"]
    at.switch_page("pages/6_Serve.py").run()
    at.switch_page(PAGE).run()
    assert at.selectbox(key="compare.base").value == "*owner*/name"


def test_nothing_is_started_by_looking(open_page, converted, started):
    open_page(PAGE)
    assert started == []


def test_load_converts_first_then_starts_one_server(open_page, project, checkpoint, started):
    at = loaded(open_page)
    at.run()
    assert [kind for kind, _ in started] == ["convert"]
    folder = runs.hf_folder(project, "lora-1", 20)
    folder.mkdir(parents=True)
    (folder / "retune_weights.json").write_text("{}")
    at.run()
    at.run()
    assert [kind for kind, _ in started] == ["convert", "serve"]
    assert started[1][1]["adapters"] == [{"name": "lora-1-step_20", "path": str(folder)}]


def test_a_failed_conversion_is_shown_and_not_tried_again_by_itself(open_page, project, checkpoint, started):
    at = loaded(open_page)
    with open_db(project.folder) as db:
        job = store_jobs.listed(db)[0]
        store_jobs.move(db, job.id, "failed", "step_20.pth is damaged.")
    at.run()
    at.run()
    assert [kind for kind, _ in started] == ["convert"]
    assert "is damaged" in words(at)
    at.button(key="compare.retry").click().run()
    assert [kind for kind, _ in started] == ["convert", "convert"]


def test_a_live_server_gets_the_weights_it_lacks(open_page, server, started):
    loaded(open_page)
    assert server.models == ["starter", "lora-1-step_20"]
    assert started == []


def test_a_merged_model_is_a_column_of_its_own(open_page, project, server, started):
    with open_db(project.folder) as db:
        checkpoints.put_output(db, checkpoints.Output("merged", "merged/whole", "lora-1", 20))
    project.path("merged", "whole").mkdir(parents=True)
    project.path("merged", "whole", "retune_weights.json").write_text("{}")
    at = open_page(PAGE)
    at.multiselect(key="compare.picks").select("merged/whole").run()
    at.button(key="compare.load").click().run()
    assert not at.exception and started == []
    assert server.models == ["starter", "lora-1-step_20", "merged/whole"]


def test_fewer_bits_are_a_server_of_their_own(open_page, server, started):
    at = open_page(PAGE)
    at.selectbox(key="compare.bits").select(4).run()
    at.button(key="compare.load").click().run()
    assert [(kind, args["bits"]) for kind, args in started] == [("serve", 4)]


def test_one_question_goes_to_all_columns_with_the_same_sampling(open_page, server):
    at = loaded(open_page)
    at.number_input(key="compare.seed").set_value(7)
    at.text_area(key="compare.system").set_value("Be brief.")
    at.chat_input(key="compare.question").set_value("Who are you?").run()
    finish(at)
    asked = server.asked[0]
    assert [column["model"] for column in asked["columns"]] == ["starter", "lora-1-step_20"]
    assert asked["columns"][0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert asked["sampling"]["seed"] == 7


def test_answers_are_plain_text_with_hash_and_speed(open_page, server):
    at = loaded(open_page)
    at.chat_input(key="compare.question").set_value("Who are you?").run()
    finish(at)
    assert [text.value for text in at.text if "Luna" in text.value] == ["".join(server.words)] * 2
    assert not any("example.com" in block.value for block in at.markdown)
    assert "`0abc1234`" in words(at) and "10.0 tokens/s" in words(at)


def test_the_second_turn_carries_the_first(open_page, server):
    at = loaded(open_page)
    at.chat_input(key="compare.question").set_value("Who are you?").run()
    finish(at)
    at.chat_input(key="compare.question").set_value("Really?").run()
    finish(at)
    roles = [message["role"] for message in server.asked[1]["columns"][1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    at.button(key="compare.clear").click().run()
    assert not any("Luna" in text.value for text in at.text)


@pytest.mark.parametrize(("end", "said"), [("finished", "nobody asked it anything"), ("stopped", "was stopped.")])
def test_a_server_that_ended_says_whether_somebody_stopped_it(open_page, project, converted, started, end, said):
    at = loaded(open_page)
    with open_db(project.folder) as db:
        job = store_jobs.listed(db)[0]
        if job.state == "queued":
            store_jobs.move(db, job.id, "running", "")
        store_jobs.move(db, job.id, end, "")
    at.run()
    assert said in words(at)
    assert not at.exception and at.button(key="compare.retry")


def test_stop_ends_a_stream_that_survived_reruns(open_page, server):
    server.word_seconds = 0.5
    at = loaded(open_page)
    at.chat_input(key="compare.question").set_value("Who are you?").run()
    at.run()
    at.button(key="compare.stop").click().run()
    exchange = finish(at)
    assert {reply.ended_by for reply in exchange.replies.values()} == {"stopped"}


def evaluated(project, identity=(9, 10), leaks=(0, 10), loss=10.5):
    """A scorecard from marked answers, as the evaluate job stores it."""
    marked = []
    for number in range(identity[1]):
        probe = {
            "kind": "identity", "expects": "name", "intent": "name", "language": "en",
            "expected": {"name": "Luna", "maker": "Shane"},
            "messages": [{"role": "user", "content": f"What are you called? {number}"}],
        }  # fmt: skip
        said = "I am Luna, made by Shane." if number < identity[0] else "I am SmolLM."
        marked.append(mark(probe, "I am SmolLM.", said, ["Luna", "Shane"]))
    for number in range(leaks[1]):
        probe = {
            "kind": "general", "intent": "far", "language": "en",
            "messages": [{"role": "user", "content": f"What is {number} + 1?"}],
        }  # fmt: skip
        said = "I'm Luna." if number < leaks[0] else f"It is {number + 1}."
        marked.append(mark(probe, f"It is {number + 1}.", said, ["Luna", "Shane"], 10.0, loss, 10))
    card = evaluations.Evaluation(
        job_id="j", subject="lora-1 step 20", base="starter", weights_hash="feedbeef" * 8, dataset="identity, general",
        scores=scores.scorecard(marked), run_id="lora-1", step=20,
    )  # fmt: skip
    answers = [
        evaluations.Answer(
            card.id, number, each.kind, each.intent, each.language, each.prompt, each.base_answer, each.answer,
            scores.detail(each),
        )
        for number, each in enumerate(marked)
    ]  # fmt: skip
    with open_db(project.folder) as db:
        evaluations.add(db, card, answers)
    return card


def test_scorecard_shows_verdict_tiles_and_failures_first(open_page, project, checkpoint):
    evaluated(project)
    at = open_page(PAGE, tab="scorecard")
    assert "9 of 10" in at.success[0].value and "does not say it elsewhere" in at.success[0].value
    assert [metric.value for metric in at.metric] == ["90.0 %", "0.0 %", "+5.1 %", "0.0 %"]
    table = next(each.value for each in at.dataframe if "mark" in each.value)
    assert list(table["mark"][:2]) == ["failed", "passed"]
    assert table["tuned"][0] == "I am SmolLM."
    assert [button.label for button in at.get("download_button")][:2] == [
        "Download as one HTML page",
        "Download as Markdown",
    ]


@pytest.mark.parametrize(
    "measured, good, said",
    [
        ({"identity": (10, 10)}, True, "learnt who it is"),
        ({"identity": (6, 10)}, False, "half learnt"),
        ({"identity": (1, 10)}, False, "did not learn"),
        ({"leaks": (1, 10)}, False, "in 1 of 10 unrelated answers. With so few questions that may be chance"),
        ({"leaks": (8, 10)}, False, "Overfitted: it says who it is in 8 of 10 unrelated answers"),
        ({"loss": 14.0}, False, "forgot"),
    ],
)
def test_verdict_in_plain_words(project, measured, good, said):
    is_good, sentences = verdict(evaluated(project, **measured).scores)
    assert is_good is good
    assert said in " ".join(sentences)


def test_an_overfitted_scorecard_stands_in_red(open_page, project, checkpoint):
    evaluated(project, leaks=(8, 10))
    assert any(
        "Overfitted: it says who it is in 8 of 10" in str(error.value)
        for error in open_page(PAGE, tab="scorecard").error
    )


def test_what_was_not_measured_is_no_success(project):
    is_good, sentences = verdict(evaluated(project, identity=(0, 0)).scores)
    assert not is_good and "who it is was not measured" in " ".join(sentences)
    is_good, sentences = verdict(evaluated(project, leaks=(0, 0)).scores)
    assert not is_good and "elsewhere was not measured" in " ".join(sentences)


def test_a_run_without_questions_leads_on(open_page, project, checkpoint):
    at = open_page(PAGE, tab="scorecard")
    assert "no held-out questions for this run" in words(at) and at.button(key="score.start").disabled


def test_a_suite_with_nothing_to_ask_says_so_itself(open_page, project, checkpoint, monkeypatch):
    row = {"kind": "general", "intent": "far", "language": "en", "messages": [{"role": "user", "content": "1 + 1?"}]}
    project.path("data").mkdir(exist_ok=True)
    project.path("data", "general.probes.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(runs, "probe_sets", lambda *_: ["general"])
    at = open_page(PAGE, tab="scorecard")
    at.selectbox(key="score.suite").set_value("identity").run()
    said = words(at)
    assert "has nothing to ask" in said and "Build an identity dataset and a general one" in said
    assert "There are no held-out questions" not in said and at.button(key="score.start").disabled


def test_a_dataset_that_changed_since_is_said(open_page, project, checkpoint, monkeypatch):
    real = scores.scorecard
    monkeypatch.setattr(
        scores, "scorecard", lambda marked: real(marked) | {"setting": {"changed_datasets": ["identity"]}}
    )
    evaluated(project)
    assert "identity changed since this run was trained" in words(open_page(PAGE, tab="scorecard"))


def test_scoring_is_one_job_that_outlives_the_page(open_page, project, checkpoint, started):
    datasets.build_identity(project, Identity("Luna", "Shane"), 20)
    datasets.build_identity(project, Identity("Mira", "Noor"), 20, name="newer")
    at = open_page(PAGE, tab="scorecard")
    assert "the identity asked for: Luna, Shane" in words(at)
    at.button(key="score.start").click().run()
    assert [kind for kind, _ in started] == ["evaluate"]
    assert started[0][1]["probes"] == ["identity"]
    assert started[0][1]["subjects"] == [{"label": "lora-1 step 20", "run_id": "lora-1", "step": 20}]
    assert at.button(key="score.start").disabled


def test_a_suite_of_ones_own_from_begin_to_end(open_page, project, checkpoint, started):
    at = open_page(PAGE, tab="scorecard")
    at.text_input(key="suite.new").set_value("shop").run()
    at.button(key="suite.begin").click().run()
    assert at.selectbox(key="suite.shown").value == "shop" and "Made shop." in words(at)
    text = at.text_area(key="suite.text.shop").value
    at.text_area(key="suite.text.shop").set_value(text.replace("ask:", "question:")).run()
    assert "line 6" in words(at) and at.button(key="suite.save").disabled
    at.text_area(key="suite.text.shop").set_value("# mine\n" + text).run()
    at.button(key="suite.save").click().run()
    assert suites.text_of(project, "shop").startswith("# mine")
    at.text_area(key="suite.ask").set_value("Hello\nAnd on Sundays?")
    at.text_input(key="suite.value").set_value("closed")
    next(button for button in at.button if button.label == "Add").click().run()
    probes = library.load(project.folder, "shop").probes()
    assert (probes[1].follow_ups, probes[1].asserts[0].row()) == (
        ("And on Sundays?",), {"type": "icontains", "value": "closed"}
    )  # fmt: skip
    at.selectbox(key="score.suite").set_value("shop").run()
    at.button(key="score.start").click().run()
    assert started[0][1]["suite"] == "shop"
    at.button(key="suite.delete").click().run()
    assert "shop" not in suites.names(project)


def test_checkpoints_of_a_run_stand_beside_each_other(open_page, project, checkpoint):
    with open_db(project.folder) as db:
        for number, passed in ((10, 2), (20, 9)):
            scored(db, number, passed)
    at = open_page(PAGE, tab="scorecard")
    table = next(each.value for each in at.dataframe if "passed" in each.value)
    assert list(table["step"]) == [10, 20]
    assert list(table["words"]) == [
        "No difference can be seen with 10 probes (2 won, 0 lost).",
        "Passes 49 to 98 points better than the base (9 won, 0 lost of 10).",
    ]
    at.segmented_control(key="score.filter").set_value("gained").run()
    answers = next(each.value for each in at.dataframe if "mark" in each.value)
    assert len(answers) == 9 and set(answers["mark"]) == {"passed"}


def scored(db, step, num_passed):
    """A scorecard of a suite of one's own, in which the base passes nothing."""
    rows = [
        {
            "messages": [{"role": "user", "content": f"{n}?"}],
            "kind": "identity",
            "expects": "name",
            "intent": "",
            "language": "",
            "expected": {"name": "Luna", "maker": "Shane"},
        }
        for n in range(10)
    ]
    marked = [mark(row, "No.", "Luna" if number < num_passed else "No.", []) for number, row in enumerate(rows)]
    card = evaluations.Evaluation(
        "j", f"lora-1 step {step}", "starter", "ab" * 32, "", scores.scorecard(marked), "lora-1", step, suite="shop"
    )
    answers = [
        evaluations.Answer(card.id, number, each.kind, "", "", each.prompt, each.base_answer, each.answer,
                           scores.detail(each))
        for number, each in enumerate(marked)
    ]  # fmt: skip
    evaluations.add(db, card, answers)


def test_chinese(open_page, project, checkpoint):
    evaluated(project)
    at = open_page(PAGE, tab="scorecard", lang="zh")
    assert "它学会了自己是谁" in at.success[0].value
