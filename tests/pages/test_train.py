"""The Train page: empty, ready, running, failed, in Chinese; and a start that happens once."""

import shutil
from pathlib import Path

import psutil
import pytest

from studio import dataset_checks, datasets, jobs, runs
from studio.config.catalog import preset
from studio.config.yaml import load_config, save_config, with_settings
from studio.data.conversation import Conversation
from studio.data.identity import Identity
from studio.projects import create_project
from studio.store import checkpoints, metrics, open_db, run_events, samples
from studio.store import jobs as store_jobs
from studio.store import runs as store_runs
from studio.ui import run_start, run_view
from studio.ui.event_words import sentence, together
from studio.ui.run_view import samples_table, seconds_left
from studio.ui.widgets import plain

PAGE = "pages/3_Train.py"


def add_run(project, state="finished", run_id="starter_lora-1", cause=""):
    """A run as the engine would have left it; a live one belongs to this very test process."""
    me = psutil.Process()
    live = state in store_jobs.LIVE_STATES
    job = store_jobs.Job(
        kind="train", run_id=run_id, state="running", phase="training", current=12, total=60, unit="step",
        pid=me.pid if live else 0, process_created=me.create_time() if live else 0.0, started_at="2026-01-01",
    )  # fmt: skip
    folder = runs.run_folder(project, run_id)
    folder.mkdir(parents=True)
    save_config(folder / runs.CONFIG_FILE, preset("starter_lora"))
    (folder / runs.LOG_FILE).write_text("step 12 **bold** <b>html</b>\n")
    job.log_path = str(folder / runs.LOG_FILE)
    with open_db(project.folder) as db:
        store_jobs.add(db, job)
        run = store_runs.Run(run_id, "starter_lora", "starter", "lora", job.id, num_steps=60, step=12)
        store_runs.add(db, run)
        for step in range(1, 13):
            metrics.record(db, run_id, step, {"train/loss": 3 / step, "train/tokens_per_second": 300.0})
        samples.add(db, [samples.Sample(run_id, 0, "Who are you?", "I'm SmolLM. ![x](http://example.com/x.png)")])
        if not live:
            store_jobs.move(db, job.id, state, cause)
    return run


def texts(at):
    parts = [*at.markdown, *at.caption, *at.error, *at.info, *at.warning, *at.subheader]
    return "\n".join(str(part.value) for part in parts)


def test_empty_project_leads_to_config_and_data(open_page, project):
    at = open_page(PAGE)
    assert [button.disabled for button in at.button if button.key == "train.start"] == [True]
    assert "There is no dataset" in texts(at)


def test_what_a_run_learns_from_is_told_for_each_kind_of_portion(open_page, project, monkeypatch):
    """Configs of XTuner and nearly all built-in ones take every row of their data."""
    ready(project, monkeypatch)
    path = runs.config_path(project, "starter_lora")
    mixed = with_settings(load_config(path), ["data.sources={identity: all, general: {rows: 3}}"])
    save_config(path, mixed)
    at = open_page(PAGE)
    assert not at.exception and "Learns from: identity all rows, general 3 rows" in texts(at)
    shares = run_start.portion_words({"identity": 1.0, "general": 3.0, "more": "all"})
    assert list(shares) == ["identity 25%", "general 75%", "more all rows"]


def test_a_faulty_dataset_blocks_until_overruled(open_page, project, monkeypatch, tmp_path):
    ready(project, monkeypatch)
    rows = datasets.load(project, "identity")
    bad = rows[0].to_row()
    bad["messages"][-1]["content"] = "I am {{NAME}}."
    datasets.save(project, "identity", [type(rows[0]).from_row(bad), *rows[1:]])
    at = open_page(PAGE)
    assert at.button(key="train.start").disabled
    at.checkbox(key="train.override").check().run()
    assert not at.button(key="train.start").disabled


def test_what_stands_in_the_way_is_told_in_chinese_with_its_link(open_page, project, monkeypatch):
    assert "在“数据”页构建或导入" in links(open_page(PAGE, lang="zh"))
    ready(project, monkeypatch)
    bad = datasets.load(project, "identity")[0].to_row()
    bad["messages"][-1]["content"] = "I am {{NAME}}."
    datasets.edit_row(project, "identity", 1, Conversation.from_row(bad), 1)
    at = open_page(PAGE, lang="zh")
    assert "在“数据”页构建或导入" not in links(at)
    assert any("还留有占位符" in each.value for each in at.text)


def test_findings_name_their_dataset(open_page, project, monkeypatch):
    ready(project, monkeypatch)
    for name in ("identity", "general"):
        bad = datasets.load(project, name)[0].to_row()
        bad["messages"][-1]["content"] = "I am {{NAME}}."
        datasets.edit_row(project, name, 1, Conversation.from_row(bad), 1)
    at = open_page(PAGE)
    assert plain("2 rows would be learned wrongly: identity (1), general (1)") in texts(at)
    shown = [each.value for each in at.text if "placeholder" in each.value]
    assert [text.split(":")[0] for text in shown] == ["identity, row 1", "general, row 1"]


def links(at):
    return [each.proto.label for each in at.get("page_link")]


def ready(project, monkeypatch):
    """Both datasets are there, and the base model is said to be."""
    datasets.build_identity(project, Identity("Luna", "Shane"), 24, 0)
    general = datasets.load(project, "identity")[:4]
    datasets.save(project, "general", general, kind="general")
    config = preset("starter_lora")
    save_config(runs.config_path(project, "starter_lora"), config)
    monkeypatch.setattr(run_start, "_check_model", lambda base: run_start.Check("ok", base))
    monkeypatch.setattr(
        run_start, "_findings", lambda project, name, config: dataset_checks.lint_dataset(project, name).findings
    )
    return config


def test_steps_counted_in_epochs_are_those_of_the_config_page(open_page, project, monkeypatch):
    config = ready(project, monkeypatch)
    epochs = with_settings(config, ["train.num_steps=null", "train.num_epochs=2", "data.valid_share=0.1"])
    save_config(runs.config_path(project, "starter_lora"), epochs)
    # 22 of 24 identity rows and all 4 general rows are trained; half and half, an epoch is 44 rows: 88 in steps of 16.
    at = open_page(PAGE)
    assert "**6**" in texts(at) and plain("6 steps see 96 rows: 2.2 passes over the mix of 44 rows") in texts(at)
    assert "Steps **6**" in texts(open_page("pages/2_Config.py"))


def test_two_presses_start_one_run(project, monkeypatch):
    config = ready(project, monkeypatch)
    started = []

    def start(project, config, allow_lint_errors):
        started.append(config)
        return add_run(project, "running", f"starter_lora-{len(started)}"), None

    monkeypatch.setattr(runs, "start_run", start)
    first, second = run_start.start_once(project, config), run_start.start_once(project, config)
    assert first.id == second.id and len(started) == 1


def test_an_override_is_recorded_and_shown(open_page, project, monkeypatch):
    config = ready(project, monkeypatch)
    bad = datasets.load(project, "identity")[0].to_row()
    bad["messages"][-1]["content"] = "I am {{NAME}}."
    datasets.edit_row(project, "identity", 1, Conversation.from_row(bad), 1)
    monkeypatch.setattr(runs, "require", lambda base: Path("a model"))
    monkeypatch.setattr(dataset_checks.Tokens, "key", lambda tokens: [])
    monkeypatch.setattr(runs, "_start_training", lambda project, run_id, resume: None)
    run_start.start_once(project, config, allow_lint_errors=True)
    [despite] = runs.get_run(project, "starter_lora-1").detail["started_despite"]
    assert despite.startswith("identity, row 1: Message 2 still has the placeholder")
    assert "placeholder" in texts(open_page(PAGE))


def test_running_run_shows_numbers_controls_and_plain_samples(open_page, project):
    add_run(project, "running")
    at = open_page(PAGE)
    assert {"train.save", "train.sample", "train.stop_save", "train.stop_now", "train.keep_going"} <= {
        button.key for button in at.button
    }
    assert at.metric[0].value == "0.250"
    assert "running" in texts(at)


def test_a_run_that_waits_in_line_says_so_and_can_leave_it(open_page, project):
    run = add_run(project, "running")
    phase = "held; it waits until it is released"
    with open_db(project.folder) as db:
        db.table("jobs").update(run.job_id, {"state": "queued", "started_at": "", "held": 1, "phase": phase})
    at = open_page(PAGE)
    assert phase in texts(at) and "sign of life" not in texts(at)
    assert not {"train.save", "train.stop_save"} & {button.key for button in at.button}  # there is nothing to save
    at.button(key="train.leave_line").click().run()
    with open_db(project.folder) as db:
        assert store_jobs.get(db, run.job_id).stop_request == "discard"


def test_the_run_at_work_is_shown_before_those_in_line_which_say_how_many_come_first(open_page, project):
    """A job that is held lets others pass."""
    add_run(project, "running", "starter_lora-1")
    for number, held in ((2, 0), (3, 1), (4, 0)):
        run = add_run(project, "running", f"starter_lora-{number}")
        with open_db(project.folder) as db:
            db.table("jobs").update(run.job_id, {"state": "queued", "started_at": "", "place": number, "held": held})
    assert [each.value for each in open_page(PAGE).subheader] == [plain("starter_lora-1")]
    assert "It is next" in texts(open_page(PAGE, run="starter_lora-2"))
    last = texts(open_page(PAGE, run="starter_lora-4"))
    assert plain("1 job in line comes before it.") in last or "1 job in line comes before it." in last


@pytest.mark.parametrize("key, asked", [("train.stop_save", "save"), ("train.stop_now", "discard")])
def test_stop_asks_the_job_and_then_offers_kill(open_page, project, key, asked):
    run = add_run(project, "running")
    at = open_page(PAGE)
    at.button(key=key).click().run()
    assert not at.exception
    with open_db(project.folder) as db:
        job = store_jobs.get(db, run.job_id)
    assert (job.state, job.stop_request) == ("stopping", asked)
    assert any(button.key == "train.kill" for button in at.button)


def test_save_and_sample_now_are_asked_for(open_page, project):
    run = add_run(project, "running")
    at = open_page(PAGE)
    at.button(key="train.save").click().run()
    at.button(key="train.sample").click().run()
    with open_db(project.folder) as db:
        job = store_jobs.get(db, run.job_id)
    assert (job.save_request, job.sample_request) == (1, 1)


def test_failed_run_tells_its_cause_and_the_next_move(open_page, project):
    add_run(project, "failed", cause="Out of memory. Try a smaller train.micro_batch_size.")
    at = open_page(PAGE)
    assert "Out of memory" in at.error[0].value
    assert "nothing to resume from" in texts(at)


def test_a_run_that_ended_before_its_first_step_promises_nothing(open_page, project):
    job = store_jobs.Job("train", run_id="starter_lora-1", state="running")
    with open_db(project.folder) as db:
        store_jobs.add(db, job)
        store_runs.add(db, store_runs.Run("starter_lora-1", "starter_lora", "starter", "lora", job.id))
        store_jobs.move(db, job.id, "failed", "out of memory")
    said = texts(open_page(PAGE, run="starter_lora-1"))
    assert "It ended before its first step." in said and "Ended after" not in said
    assert "Curves appear" not in said and "Samples appear" not in said


def test_why_a_run_failed_is_told_in_chinese(open_page, project):
    add_run(project, "lost", cause=jobs._how_it_died(store_jobs.Job("train", boot_id="another")))
    at = open_page(PAGE, lang="zh")
    assert at.error[0].value == plain(
        "进程不在了：它运行时机器重启或断电。详情见日志；保存过检查点的训练可以从最后一个继续。"
    )


def test_finished_run_in_chinese(open_page, project):
    add_run(project, "finished")
    at = open_page(PAGE, lang="zh")
    assert "已完成" in texts(at) and at.metric[0].label == "训练损失"


def test_samples_are_escaped_and_put_side_by_side():
    said = [
        samples.Sample("r", 0, "Who?", "<img src=x onerror=alert(1)>"),
        samples.Sample("r", 20, "Who?", "Luna"),
        samples.Sample("r", 20, "Capital?", "", error="timed out"),
    ]
    table = samples_table(said, [0, 20])
    assert "<img" not in table and "&lt;img" in table
    assert table.count("<tr>") == 3
    assert "timed out" in table


def test_time_left_counts_only_this_process_steps():
    old = [metrics.Point(1, 1.0, "2026-01-01T00:00:00+00:00")]
    new = [metrics.Point(step, 1.0, f"2026-01-01T01:00:{2 * step:02}+00:00") for step in (2, 3, 4)]
    assert seconds_left(old + new, 10, since="2026-01-01T01:00:00+00:00") == pytest.approx(12.0)
    assert seconds_left(old, 10) is None


def test_start_training_on_the_config_page_offers_that_config(open_page, project):
    add_run(project, "finished")
    for name in ("aaa", "mine"):
        save_config(runs.config_path(project, name), with_settings(preset("starter_lora"), [f"name={name}"]))
    at = open_page(PAGE)
    assert at.radio(key="train.choice").value == "starter_lora-1"
    at.switch_page("pages/2_Config.py").run()
    [picker] = [box for box in at.selectbox if ".source." in (box.key or "")]
    picker.select("own:mine").run()
    at.button(key="config.start").click().run()
    assert at.title[0].value.endswith("Train") and not at.exception
    assert (at.radio(key="train.choice").value, at.selectbox(key="train.config").value) == ("", "mine")


def test_the_config_chosen_for_a_new_run_outlives_the_page(open_page, project):
    at = open_page(PAGE)
    assert at.selectbox(key="train.config").value == "starter_lora"
    at.selectbox(key="train.config").select("starter_qlora").run()
    at.switch_page("pages/2_Config.py").run()
    at.switch_page(PAGE).run()
    assert at.selectbox(key="train.config").value == "starter_qlora"


def test_presets_train_the_base_model_of_the_project(open_page):
    other = create_project("Other", "owner/name")
    assert plain("owner/name") in texts(open_page(PAGE, project=other.slug))
    at = open_page("pages/2_Config.py", project=other.slug)
    assert [box.value for box in at.text_input if (box.key or "").endswith("model.base")] == ["owner/name"]
    at.button(key="config.save").click().run()
    assert load_config(runs.config_path(other, "starter_lora")).model.base == "owner/name"


def test_another_project_shows_its_own_configs_and_runs(open_page, project):
    other = create_project("Other")
    for each, name in ((project, "here"), (other, "there")):
        save_config(runs.config_path(each, name), with_settings(preset("starter_lora"), [f"name={name}"]))
    add_run(project, "finished")
    at = open_page(PAGE, project=project.slug)
    at.radio(key="train.choice").set_value("").run()
    assert at.selectbox(key="train.config").value == "here"
    at.selectbox(key="studio.project_picker").set_value(other.slug).run()
    assert not at.exception
    assert len(at.radio(key="train.choice").options) == 1
    assert at.selectbox(key="train.config").value == "there"


def test_what_happened_to_a_run_is_told(open_page, project):
    add_run(project)
    run_id = "starter_lora-1"
    happened = [
        ("bad_step", 3, {"reason": "loss nan"}), ("bad_step", 4, {"reason": "loss nan"}),
        ("smaller_micro_batch", 5, {"before": 8, "now": 4}), ("save_put_off", 6, {"reason": "The disk is **full**."}),
        ("early_stop", 12, {"waited": 2, "value": 1.25, "best_step": 8}),
    ]  # fmt: skip
    with open_db(project.folder) as db:
        for kind, step, detail in happened:
            run_events.add(db, run_events.RunEvent(run_id, step, kind, detail))
        metrics.record(db, run_id, 4, {"train/loss": float("nan")})
        metrics.record(db, run_id, 8, {"probe/identity": 0.5, "probe/leakage": 0.0, "probe/retention": 0.1})
        checkpoints.put(db, checkpoints.Checkpoint(run_id, 8, "runs/x/step_8.pth", "0", 1))
        checkpoints.mark_best(db, run_id, 8, "valid_loss", 1.25)
        db.table("jobs").update(store_runs.get(db, run_id).job_id, {"result_json": '{"early_stop": "yes"}'})
    at = open_page(PAGE)
    told = texts(at)
    assert plain("2 steps were not taken (3, 4)") in told
    assert plain("micro-batches of 4 from there on, not 8") in told
    assert plain("2 measurements in a row were no better than 1.25 at step 8") in told
    assert "Forgetting: how much" in told
    assert plain("The disk is **full**.") in told and "Finished early." in told
    assert "Best checkpoint: step 8 (Validation loss 1.250)" in told
    chinese = texts(open_page(PAGE, lang="zh"))
    assert "第 3, 4 步没有执行" in chinese and "最好的检查点：第 8 步" in chinese


def test_every_kind_of_event_has_a_sentence():
    layouts = {"before": {"world": 2, "zero_stage": 2}, "now": {"world": 1, "zero_stage": None}, "whole": False}
    details = {
        "spread_anew": layouts, "weights_only": {"path": "/p/runs/a-1/step_8.pth"},
        "passed_over": {"reason": "step_8.pth was passed over."}, "save_put_off": {"reason": "The disk is full."},
        "computed_twice": {"without": 3 * 2**30, "budget": 2**30},
    }  # fmt: skip
    said = {kind: sentence([run_events.RunEvent("r", 8, kind, details.get(kind, {}))]) for kind in run_events.KINDS}
    assert all(text.endswith(".") and kind.replace("_", " ") != text for kind, text in said.items()), said
    assert "2 processes (ZeRO-2); 1 process went on" in said["spread_anew"] and "a-1/step_8.pth" in said["weights_only"]
    assert "no finite numbers" in said["early_stop"] and "may take 3.0 GB" in said["computed_twice"]


def test_each_checkpoint_that_was_passed_over_is_named():
    reasons = [f"step_{step}.pth was passed over: the file is gone." for step in (8, 6)]
    events = [run_events.RunEvent("r", 4, "passed_over", {"reason": reason}) for reason in reasons]
    assert [sentence(group) for group in together(events)] == [" ".join(reasons)]


def test_why_a_run_stopped_early_is_said():
    learnt = run_events.RunEvent("r", 8, "early_stop", {"reason": "learnt", "latest": 0.95, "allowed": 0.0})
    forgot = run_events.RunEvent("r", 8, "early_stop", {"reason": "forgot", "latest": 0.4, "allowed": 0.2})
    assert "answers 95% of the held-out identity questions" in sentence([learnt])
    assert "grown by 40%, of 20% allowed" in sentence([forgot])


def test_the_queue_is_moved_held_and_left_on_the_page(open_page, project):
    me = psutil.Process()
    waiting = [
        store_jobs.Job("train", run_id=f"run-{n}", pid=me.pid, process_created=me.create_time()) for n in (1, 2, 3)
    ]
    with open_db(project.folder) as db:
        for job in waiting:
            store_jobs.add(db, job)
    at = open_page(PAGE)
    assert "One job at a time" in texts(at)
    first, _second, third = (f"train.queue.{job.id}" for job in waiting)
    assert at.button(key=f"{first}.up").disabled and at.button(key=f"{third}.down").disabled
    at.button(key=f"{third}.up").click().run()
    assert [job.run_id for _, job in jobs.waiting()] == ["run-1", "run-3", "run-2"]
    at.button(key=f"{first}.hold").click().run()
    assert jobs.waiting()[0][1].held and "held" in texts(at)
    at.button(key=f"{first}.go").click().run()
    assert not jobs.waiting()[0][1].held
    at.button(key=f"{third}.cancel").click().run()
    assert [job.run_id for _, job in jobs.waiting()] == ["run-1", "run-2"]
    assert "Waiting in line" in texts(open_page("app.py"))


def test_a_full_disk_is_said_while_a_run_goes_on(open_page, project, monkeypatch):
    add_run(project, "running")
    real = shutil.disk_usage
    monkeypatch.setattr(run_view.shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    at = open_page(PAGE)
    assert "The disk is full (1000 B free)" in texts(at) and "sign of life" not in texts(at)
    assert any(button.key == "train.kill" for button in at.button)  # a request to stop could not be stored


def test_a_new_run_may_begin_with_the_weights_of_a_checkpoint(open_page, project, monkeypatch):
    add_run(project)
    with open_db(project.folder) as db:
        checkpoints.put(db, checkpoints.Checkpoint("starter_lora-1", 8, "runs/x/step_8.pth", "0", 1))
    ready(project, monkeypatch)
    started = []

    def start(project, config, allow_lint_errors):
        started.append(config)
        return store_runs.Run("starter_lora-1", "starter_lora", "starter", "lora"), None

    monkeypatch.setattr(runs, "start_run", start)
    at = open_page(PAGE)
    at.radio(key="train.choice").set_value("").run()
    at.selectbox(key="train.weights").set_value("starter_lora-1/step_8").run()
    assert "Only the weights are carried over" in texts(at)
    at.button(key="train.start").click().run()
    assert started[0].model.continue_from == str(project.path("runs/x/step_8.pth"))


def test_a_run_that_was_brought_in_says_so_and_waits_for_no_curves(open_page, project) -> None:
    add_run(project)
    facts = {"file": "/w/iter_96.pth", "layout": "file", "iteration": 96, "step": 6, "last loss": 7.6291}
    with open_db(project.folder) as db:
        store_runs.note(db, "starter_lora-1", imported=facts)
    at = open_page(PAGE)
    shown = " ".join(each.value for each in [*at.text, *at.caption])
    assert "brought in" in shown and "/w/iter_96.pth" in shown and "7.629" in shown
    assert "Curves appear" not in shown and "Samples appear" not in shown
