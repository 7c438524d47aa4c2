"""The Config page says what a config needs, and makes it fit when asked."""

import json

import pytest

from studio import forecast
from studio.config.yaml import load_text
from studio.store import jobs, open_db
from studio.store.jobs import Job
from tests.test_model_shapes import LLAMA_2_7B

PAGE = "pages/2_Config.py"


def texts(elements) -> str:
    return "\n".join(str(element.value) for element in elements)


@pytest.fixture
def page(open_page, project, tmp_path):
    """The Config page with a 7B base of which only the sizes are here."""
    folder = tmp_path / "seven"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_2_7B), encoding="utf-8")
    at = open_page(PAGE)
    base = next(box for box in at.text_input if box.key and box.key.endswith(".model.base"))
    return base.set_value(str(folder)).run()


def shown(at) -> str:
    return texts(at.markdown) + texts(at.caption) + "".join(bar.proto.text for bar in at.get("progress"))


def test_apply_makes_a_7b_fit_on_a_card_of_8_gb(page):
    page.selectbox(key="config.device").set_value("8").run()
    assert "It does not fit" in shown(page) and "qlora" in shown(page)
    page.button(key="config.apply").click().run()
    assert "It fits" in shown(page) and not page.exception
    page.segmented_control(key="config.view").set_value("yaml").run()
    config = load_text(page.text_area[0].value)
    assert (config.method, config.train.micro_batch_size) == ("qlora", 1) and config.train.gradient_checkpointing
    assert config.examples_per_step == 16
    assert "# Half of the rows" in page.text_area[0].value


def test_a_model_without_sizes_is_no_error_of_the_page(open_page, project):
    at = open_page(PAGE)
    base = next(box for box in at.text_input if box.key and box.key.endswith(".model.base"))
    base.set_value("some/model").run()
    assert "not on this machine" in texts(at.caption).replace("\\", "") and not at.exception


def test_a_deepspeed_file_that_is_not_there_is_no_error_of_the_page(page):
    page.segmented_control(key="config.view").set_value("yaml").run()
    text = page.text_area[0].value.replace("strategy: none", "strategy: deepspeed")
    page.text_area[0].set_value(text.replace("deepspeed: zero2", "deepspeed: gone.json")).run()
    assert not page.exception and "cannot be read as JSON" in shown(page)


def test_a_measured_step_gives_the_time(page, project):
    assert "not known yet" in shown(page)
    config = load_text(page.session_state["kept.luna.config.draft"].text)
    job = Job(kind="measure", args={"key": forecast._measure_key(config)})
    result = {"seconds_per_step": 2.0, "memory_bytes": 3 * 2**30, "tokens_per_second": 9.0}
    with open_db(project.folder) as db:
        jobs.add(db, job)
        jobs.move(db, job.id, "running")
        jobs.set_result(db, job.id, result)
        jobs.move(db, job.id, "finished")
    page.run()
    assert "2.00 s a step" in shown(page) and "2 min 0 s" in shown(page) and "3.0 GB" in shown(page)


def test_in_chinese(open_page, project):
    assert "内存" in shown(open_page(PAGE, lang="zh"))
