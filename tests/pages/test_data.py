"""The Data page: build, keep, upload, browse; empty, filled, wrong, Chinese."""

import errno
import json
import os

import openpyxl
import psutil
import pytest
import streamlit as st

from studio import caches, dataset_checks, datasets, jobs, models, row_life
from studio.data.formats import Conversation, Message
from studio.data.identity import Identity
from studio.store import jobs as store_jobs
from studio.store import open_db
from studio.store.jobs import Job
from studio.ui.data_check import tokens_here
from studio.ui.widgets import plain

PAGE = "pages/1_Data.py"
BUILD = "data.luna.build"


def texts(elements) -> str:
    return "\n".join(str(element.value) for element in elements)


def row(question: str, answer: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)))


@pytest.fixture
def open_tab(open_page, project):
    """open_tab("browse") runs the page with that tab chosen."""

    def open(tab: str, lang: str = ""):
        at = open_page(PAGE, lang=lang)
        at.segmented_control(key="data.tab").set_value(tab).run()
        assert not at.exception
        return at

    return open


def test_build_shows_nothing_before_name_and_maker(open_tab):
    at = open_tab("build")
    assert "Type a name and a maker" in texts(at.info)
    assert at.button(key="data.build.go").disabled


def test_build_previews_live_and_writes_the_rows(open_tab, project):
    at = open_tab("build")
    at.text_input(key=f"{BUILD}.name").input("Luna")
    at.text_input(key=f"{BUILD}.maker").input("Shane")
    at.number_input(key=f"{BUILD}.rows").set_value(30).run()
    preview = at.dataframe[0].value
    assert len(preview) == 12 and preview["answer"].str.contains("Luna|Shane").any()
    at.button(key="data.build.go").click().run()
    assert not at.exception and not at.error
    built = datasets.get(project, "identity")
    assert built.num_rows == 30 and built.num_probes > 20
    assert at.button(key="data.build.go").label == "Build again, in place of the old one"


def test_tutorial_mode_repeats_the_rows(open_tab, project):
    at = open_tab("build")
    at.text_input(key=f"{BUILD}.name").input("Luna")
    at.text_input(key=f"{BUILD}.maker").input("Shane")
    at.toggle(key=f"{BUILD}.tutorial").set_value(True).run()
    at.number_input(key=f"{BUILD}.repeats").set_value(7).run()
    at.button(key="data.build.go").click().run()
    rows = datasets.load(project, "tutorial")
    assert len(rows) == 7 * len(set(json.dumps(each.to_row()) for each in rows))


@pytest.mark.parametrize(
    "code, told",
    [(errno.ENOSPC, "The disk is full"), (errno.EACCES, "Permission denied"), (errno.EROFS, "Read-only file system")],
)
def test_what_the_system_refuses_is_a_sentence(open_tab, monkeypatch, code, told):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code), "/data/identity.jsonl")

    monkeypatch.setattr(datasets, "build_identity", refuse)
    at = open_tab("build")
    at.text_input(key=f"{BUILD}.name").input("Luna")
    at.text_input(key=f"{BUILD}.maker").input("Shane").run()
    at.button(key="data.build.go").click().run()
    assert not at.exception
    assert plain(told) in texts(at.error) and "identity" in texts(at.error) and "try again" in texts(at.error)


def test_a_name_that_cannot_be_used_says_why(open_tab):
    at = open_tab("build")
    at.text_input(key=f"{BUILD}.name").input("<|im_end|>")
    at.text_input(key=f"{BUILD}.maker").input("Shane").run()
    assert "control token" in texts(at.error)
    assert at.button(key="data.build.go").disabled


def test_a_name_too_common_to_be_measured_is_warned_of(open_tab, project):
    at = open_tab("build")
    at.text_input(key=f"{BUILD}.maker").input("Shane")
    at.text_input(key=f"{BUILD}.name").input("Sam").run()
    assert not at.warning
    at.text_input(key=f"{BUILD}.name").input("Paris").run()
    assert "say Paris too" in texts(at.warning)
    assert not at.button(key="data.build.go").disabled


def test_what_was_typed_outlives_the_page(open_tab):
    at = open_tab("build")
    at.text_input(key=f"{BUILD}.name").input("Luna").run()
    at.switch_page("pages/2_Config.py").run()
    at.switch_page(PAGE).run()
    assert at.text_input(key=f"{BUILD}.name").value == "Luna"


def test_keep_asks_for_the_model_when_it_is_absent(open_tab, tmp_path, monkeypatch):
    monkeypatch.setenv("RETUNE_MODELS", str(tmp_path / "none"))
    at = open_tab("keep")
    assert "not on this machine" in texts(at.info)
    asked = []
    monkeypatch.setattr("studio.jobs.start", lambda folder, kind, args, **_: asked.append((kind, args)))
    at.button(key="data.distill.fetch").click().run()
    assert not at.exception and asked == [("fetch", {"base": "starter"})]


def test_keep_tells_why_the_last_job_failed(open_tab, project):
    job = Job(kind="distill", state="failed", cause="Out of memory. Try fewer questions.", log_path="/nowhere")
    with open_db(project.folder) as db:
        store_jobs.add(db, job)
    assert "Out of memory" in texts(open_tab("keep").warning)


def test_keep_shows_the_general_rows(open_tab, project):
    probes = [{"messages": [{"role": "user", "content": f"{n}+2?"}], "kind": "general"} for n in range(3)]
    datasets.save(project, "general", [row("2+2?", "4")], kind="general", probes=probes)
    at = open_tab("keep")
    assert list(at.dataframe[0].value["answer"]) == ["4"]


def upload(at, name: str, text: str):
    at.file_uploader(key="data.upload.file").upload(name, text.encode(), "application/json").run()
    assert not at.exception
    return at


def test_upload_names_the_layout_and_imports(open_tab, project):
    lines = [json.dumps({"instruction": f"q{n}", "input": "", "output": f"a{n}"}) for n in range(3)]
    at = upload(open_tab("upload"), "My Data.jsonl", "\n".join(lines))
    assert "Alpaca" in texts(at.markdown)
    at.button(key="data.upload.go").click().run()
    assert not at.exception and not at.error
    assert [each.messages[-1].content for each in datasets.load(project, "my-data")] == ["a0", "a1", "a2"]


def test_upload_lists_bad_rows_and_keeps_the_good_ones_on_request(open_tab, project):
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    bad = {"messages": [{"role": "user", "content": "q"}]}
    at = upload(open_tab("upload"), "mixed.json", json.dumps([good, bad, good]))
    assert list(at.dataframe[0].value["row"]) == [2]
    assert at.button(key="data.upload.go").disabled
    at.checkbox(key="data.upload.keep").check().run()
    at.button(key="data.upload.go").click().run()
    assert datasets.get(project, "mixed").num_rows == 2


@pytest.fixture
def started(monkeypatch):
    """Jobs that would have been started; each is a live one that does nothing."""
    calls = []

    def start(folder, kind, args, **_):
        calls.append((kind, args))
        me = psutil.Process()
        job = store_jobs.Job(kind=kind, args=args, state="running", pid=me.pid, process_created=me.create_time())
        with open_db(folder) as db:
            store_jobs.add(db, job)
        return job

    monkeypatch.setattr("studio.jobs.start", start)
    return calls


def test_columns_are_picked_by_hand(open_tab, project):
    table = "Beipackzettel,Rat,Nr\nWas hilft?,Ruhe.,1\nUnd dann?,Schlaf.,2\n"
    at = open_tab("upload")
    at.file_uploader(key="data.upload.file").upload("rat.csv", table.encode(), "text/csv").run()
    assert not at.exception
    assert at.selectbox(key="data.upload.question").value is None and at.button(key="data.upload.go").disabled
    assert "shell" not in texts([*at.markdown, *at.caption, *at.warning])
    assert "All 2 rows" in texts(at.warning) and not at.dataframe
    at.selectbox(key="data.upload.question").set_value("Beipackzettel").run()
    assert at.button(key="data.upload.go").disabled
    at.selectbox(key="data.upload.answer").set_value("Rat").run()
    at.button(key="data.upload.go").click().run()
    assert not at.exception and not at.error
    assert [each.messages[0].content for each in datasets.load(project, "rat")] == ["Was hilft?", "Und dann?"]
    assert [each.messages[1].content for each in datasets.load(project, "rat")] == ["Ruhe.", "Schlaf."]


def test_a_path_on_this_machine_is_imported_in_a_job_when_large(open_tab, project, tmp_path, monkeypatch, started):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "a"}) + "\n")
    at = open_tab("upload")
    at.segmented_control(key="data.upload.place").set_value("path").run()
    at.text_input(key="data.upload.path").set_value(str(tmp_path / "nothing")).run()
    assert "There is no file or folder" in texts(at.error)
    monkeypatch.setattr("studio.datasets.AT_ONCE_BYTES", 1)
    at.text_input(key="data.upload.path").set_value(str(path)).run()
    at.button(key="data.upload.go").click().run()
    assert not at.exception and not at.error
    assert started[0][0] == "import" and started[0][1]["path"] == str(path) and started[0][1]["name"] == "chats"


def test_a_dataset_of_a_hub_is_fetched_in_a_job(open_tab, project, started):
    at = open_tab("upload")
    at.segmented_control(key="data.upload.place").set_value("hub").run()
    at.text_input(key="data.upload.id").set_value("owner/chats")
    [button for button in at.button if button.label == "Fetch and import"][0].click().run()
    assert not at.exception and not at.error
    assert started[0][0] == "import" and started[0][1]["hub"] == "hf:owner/chats" and started[0][1]["name"] == "chats"


@pytest.mark.parametrize("text", ["", "{not json", "\x1f\x8b binary", "[]"])
def test_upload_of_rubbish_is_an_error_and_nothing_is_stored(open_tab, project, text):
    at = upload(open_tab("upload"), "bad.json", text)
    assert at.error or at.button(key="data.upload.go").disabled
    assert not datasets.listed(project)


def test_browse_is_empty_at_first(open_tab):
    assert "No dataset yet" in texts(open_tab("browse").info)


def test_browse_shows_rows_by_page_and_finds_words(open_tab, project):
    datasets.save(project, "mine", [row(f"question {n}", f"answer {n}") for n in range(60)], kind="import")
    at = open_tab("browse")
    assert "60 rows found" in texts(at.caption)
    at.text_input(key="data.browse.find").input("ANSWER 59").run()
    assert "1 row found" in texts(at.caption)


def open_view(open_tab, view: str):
    at = open_tab("browse")
    at.segmented_control(key="data.browse.view").set_value(view).run()
    assert not at.exception
    return at


def test_lint_findings_name_their_rows_and_are_fixed(open_tab, project):
    rows = [row("a?", "Fine."), row("b?", ""), row("c?", "Fine, too."), row("a?", "Fine.")]
    datasets.save(project, "mine", rows, kind="import")
    at = open_view(open_tab, "check")
    found = {int(number) for frame in at.dataframe for number in frame.value["row"]}
    assert {1, 2} <= found and "1 error" in texts(at.error)
    at.button(key="data.check.fix.duplicate").click().run()
    assert not at.exception
    assert [each.messages[0].content for each in datasets.load(project, "mine")] == ["a?", "b?", "c?"]
    assert datasets.get(project, "mine").version == 2


def test_a_change_is_undone_and_an_old_version_brought_back(open_tab, project):
    datasets.save(project, "mine", [row("q", "one")], kind="import", made_by="imported from a.json")
    datasets.edit_row(project, "mine", 1, row("q", "two"), 1)
    at = open_tab("browse")
    told = texts(at.markdown).replace("\\", "")
    assert "imported from a.json" in told and "row 1 edited" in told
    at.button(key="data.browse.undo").click().run()
    assert datasets.load(project, "mine")[0].messages[1].content == "one"
    at.button(key="data.browse.restore.2").click().run()
    assert not at.exception and not at.error
    assert datasets.load(project, "mine")[0].messages[1].content == "two"


def test_the_report_counts_rows_turns_and_languages(open_tab, project):
    rows = [
        row("Who are you and what do you do?", "I am Luna, an assistant."),
        row("你是谁？请介绍一下你自己。", "我是露娜。"),
    ] * 2
    datasets.save(project, "mine", rows, kind="import")
    at = open_view(open_tab, "report")
    numbers = {metric.label: metric.value for metric in at.metric}
    assert numbers["Rows"] == "4" and numbers["Same row again"] == "2"
    assert set(at.dataframe[0].value["name"]) == {"English", "Chinese"}


@pytest.mark.skipif(not models.resolve("starter").present, reason="needs the starter model")
def test_where_a_row_is_trained(open_tab, project):
    datasets.save(project, "identity", [row(f"Who are you, {n}?", "I'm Luna.") for n in range(20)], kind="import")
    datasets.save(project, "general", [row(f"{n}+1?", str(n + 1)) for n in range(20)], kind="import")
    at = open_tab("browse")
    told = texts(at.markdown) + texts(at.info)
    assert "First trained in step" in told or "kept out of training" in told
    at.number_input(key="data.browse.longest").set_value(16).run()
    assert "tokens are cut off" in texts(at.warning)


@pytest.mark.skipif(not models.resolve("starter").present, reason="needs the starter model")
def test_stored_tokens_are_deleted_from_the_page(open_tab, project):
    for name in ("identity", "general"):
        datasets.save(project, name, [row(f"{name} {n}?", "Yes.") for n in range(12)], kind="import")
    open_tab("browse")  # where a row is trained was planned, on tokens that were stored
    assert len(caches.listed(project)) == 2
    at = open_view(open_tab, "report")
    at.button(key="data.caches.delete").click().run()
    assert not at.exception and not caches.listed(project)


@pytest.mark.parametrize("kind", ["text", "tool"])
def test_rows_that_are_no_plain_chat(open_tab, project, kind):
    text = Conversation((Message("assistant", "A document."),), {"kind": "text"})
    calls = '[{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}]'
    turns = [Message("user", "2+2?"), Message("assistant", "", tool_calls=calls), Message("tool", "4")]
    tool = Conversation((*turns, Message("assistant", "Four.")))
    datasets.save(project, "mine", [text if kind == "text" else tool], kind="import")
    at = open_tab("browse")
    assert not at.exception and ("A document." in texts(at.text) or "Four." in texts(at.text))


def test_hostile_cells_are_text(open_tab, project):
    datasets.save(project, "mine", [row("<img src=x onerror=alert(1)>", "![x](http://evil/x.png)")], kind="import")
    at = open_tab("browse")
    assert "![x](http://evil/x.png)" in texts(at.text)
    assert "evil" not in texts(at.markdown)


@pytest.mark.skipif(not models.resolve("starter").present, reason="needs the starter model")
def test_the_life_of_a_row_counts_trained_tokens(open_tab, project):
    datasets.save(project, "mine", [row("Who are you?", "I'm Luna.")], kind="import")
    at = open_tab("browse")
    life = row_life.of_dataset(project, "mine", 1, row_life.View(models.require(project.base), max_length=512))
    assert f"{len(life.tokens)} tokens, {life.num_trained_tokens} of them trained" in texts(at.markdown)


def test_a_dataset_whose_file_vanished_says_so(open_tab, project):
    datasets.build_identity(project, Identity("Luna", "Shane"), 5)
    project.path("data", "identity.jsonl").unlink()
    at = open_tab("browse")
    assert "The rows are gone" in texts(at.error)


def test_the_last_rows_cannot_be_deleted_from_the_table(open_tab, project, monkeypatch):
    datasets.save(project, "mine", [row("q", "a")], kind="import")
    edits = {"edited_rows": {}, "deleted_rows": [0]}
    monkeypatch.setattr(st, "data_editor", lambda frame, key, **_: st.session_state.update({key: edits}))
    at = open_tab("browse")
    assert "at least one row" in texts(at.warning)
    assert "data.browse.save" not in [button.key for button in at.button]


def test_a_dataset_without_rows_says_so_and_can_be_deleted(open_tab, project):
    datasets.save(project, "mine", [], kind="import")
    at = open_tab("browse")
    assert "mine" in texts(at.error)
    at.button(key="data.browse.delete.sure").click().run()
    assert not datasets.listed(project)


def test_a_large_dataset_is_checked_and_counted_by_jobs(open_tab, project, monkeypatch):
    monkeypatch.setattr(dataset_checks, "AT_ONCE_ROWS", 0)
    datasets.save(project, "mine", [row("q", "a ")], kind="import")
    for kind in ("check", "report"):
        at = open_view(open_tab, kind)
        assert "takes a while" in texts(at.info)
        at.button(key=f"data.{kind}.start").click().run()
        assert not at.exception
        job = dataset_checks.newest_job(project, kind, "mine", tokens_here(project))
        *_, ended = jobs.watch(project.folder, job.id)
        assert ended.state == "finished", ended.cause
        at = open_view(open_tab, kind)
        assert not at.exception and "takes a while" not in texts(at.info)
    tokens = tokens_here(project)
    assert dataset_checks.known_lint(project, "mine", tokens).counts == {"outer_space": {"warning": 1}}
    assert dataset_checks.known_report(project, "mine", tokens) == dataset_checks.report(project, "mine", tokens)


def test_a_name_that_rows_should_teach_is_remembered_and_checked(open_tab, project):
    datasets.save(project, "mine", [row("Who are you?", "I am ChatGPT.")], kind="import")
    at = open_view(open_tab, "check")
    assert "nothing is wrong" in texts(at.success)
    at.text_input(key="data.check.name.mine").set_value("Luna")
    at.button[[each.label for each in at.button].index("Remember and check")].click().run()
    assert not at.exception and "1 error" in texts(at.error)
    assert datasets.get(project, "mine").origin["teaches"] == {"name": "Luna", "maker": ""}


def test_the_life_of_a_row_begins_with_the_raw_row(open_tab, project, tmp_path):
    rows = [
        {"prompt": "Who?", "chosen": "Luna", "rejected": "<b>Nova</b>", "id": "x" * 5_000},
        {"text": "A document. " * 300},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    datasets.import_file(project, file)
    at = open_tab("browse")
    assert [each.label for each in at.expander][0] == plain("Raw row · rows.jsonl").replace(plain("·"), "·") + ", row 1"
    assert '"chosen": "Luna"' in at.code[0].value and "x… and 3,000 characters more" in at.code[0].value
    assert "<b>Nova</b>" in texts(at.text) and "Rejected: Answer" in texts(at.caption)
    at.number_input[0].set_value(2).run()
    assert not at.exception and '"text": "A document.' in at.code[0].value and "Text" in texts(at.caption)
    datasets.edit_row(project, "rows", 1, row("Who?", "Nova"), 1)
    at = open_tab("browse")
    assert "changed since it was imported" in at.expander[0].label


def test_encoding_and_sheet_are_chosen_before_the_rows_are_read(open_tab, project, tmp_path):
    big5 = tmp_path / "big5.csv"
    big5.write_bytes("問題,答案\n你是誰？,我是露娜。\n".encode("big5"))
    book = openpyxl.Workbook()
    book.active.append(["note"])
    book.active.append(["nothing here"])
    for cells in (["question", "answer"], ["Who are you?", "Luna"]):
        (book["QA"] if "QA" in book.sheetnames else book.create_sheet("QA")).append(cells)
    book.save(tmp_path / "two.xlsx")
    for file, label, chosen, answer in (
        (big5, "Encoding", "big5", "我是露娜。"),
        (tmp_path / "two.xlsx", "Sheet", "QA", "Luna"),
    ):
        at = open_tab("upload")
        at.segmented_control(key="data.upload.place").set_value("path").run()
        at.text_input(key="data.upload.path").set_value(str(file)).run()
        at.selectbox[[each.label for each in at.selectbox].index(label)].set_value(chosen).run()
        assert not at.exception
        at.button(key="data.upload.go").click().run()
        [kept] = datasets.load(project, file.stem)
        assert kept.messages[1].content == answer


def test_long_cells_are_shown_in_part_and_not_edited(open_tab, project, monkeypatch):
    datasets.save(project, "mine", [row("q", "long " * 10_000)], kind="import")
    edits = {"edited_rows": {0: {"answer": "short"}}, "deleted_rows": []}
    frames = []

    def editor(frame, key, **_):
        frames.append(frame)
        st.session_state.update({key: edits})

    monkeypatch.setattr(st, "data_editor", editor)
    at = open_tab("browse")
    assert len(frames[0]["answer"][0]) == 2_000 and "cannot be edited here" in texts(at.warning)
    assert "characters more" in texts(at.text)


def test_deleting_a_dataset(open_tab, project):
    datasets.save(project, "mine", [row("q", "a")], kind="import")
    at = open_tab("browse")
    at.button(key="data.browse.delete.sure").click().run()
    assert not at.exception and not datasets.listed(project)


def test_in_chinese(open_tab):
    at = open_tab("build", lang="zh")
    assert at.title[0].value.endswith("数据")
    assert at.text_input(key=f"{BUILD}.name").label == "助手的名字"
