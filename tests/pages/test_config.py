"""The Config page: form and YAML are one object, problems are shown all at once, saving, starting, Chinese."""

import json

import pytest

from studio import datasets, model_code, runs
from studio.config.catalog.base_models import FAMILIES
from studio.config.schema import NOT_IN_FORM, RunConfig
from studio.config.yaml import load_config, load_text
from studio.data.formats import Conversation, Message
from studio.paths import REPOSITORY, sha256_of
from studio.store import jobs as store_jobs
from studio.store import open_db
from studio.ui.forms import SHOWN_FOR
from tests.engine.folders import make_base

PAGE = "pages/2_Config.py"


def texts(elements) -> str:
    return "\n".join(str(element.value) for element in elements)


@pytest.fixture
def opened(open_page, project):
    return open_page(PAGE)


def field(at, path: str):
    """The form's widget of a setting such as train.learning_rate."""
    for elements in (at.number_input, at.text_input, at.selectbox, at.toggle, at.text_area, at.multiselect):
        for element in elements:
            if element.key and element.key.startswith("config.form.") and element.key.endswith(f".{path}"):
                return element
    raise AssertionError(f"no widget for {path}")


def yaml_area(at):
    at.segmented_control(key="config.view").set_value("yaml").run()
    return at.text_area[0]


def to_form(at):
    return at.segmented_control(key="config.view").set_value("form").run()


def test_every_setting_of_the_schema_has_a_widget(opened):
    assert SHOWN_FOR.keys() == {"lora", "prompt"}
    for name, section in RunConfig.model_fields.items():
        if name in SHOWN_FOR:
            field(opened, "method").select(SHOWN_FOR[name][0]).run()
        for child, info in getattr(section.annotation, "model_fields", {}).items():
            if info.json_schema_extra == NOT_IN_FORM:  # written by hand, and kept as it is
                continue
            suffix = ".names" if child == "sources" else ""
            assert field(opened, f"{name}.{child}{suffix}") is not None


def test_starts_with_the_preset_and_says_what_it_lacks(opened):
    assert "starter_lora" in texts(opened.text_input) or field(opened, "name").value == "starter_lora"
    assert "There is no dataset" in texts(opened.error)
    assert "retune train configs/starter_lora.yaml --project luna" in texts(opened.code)


def test_an_edit_in_the_form_reaches_the_yaml_with_its_comments(opened):
    field(opened, "train.learning_rate").input("2e-4").run()
    text = yaml_area(opened).value
    assert load_text(text).train.learning_rate == 2e-4
    assert "# Half of the rows keep what the model already knows" in text


def test_an_edit_in_the_yaml_reaches_the_form(opened):
    area = yaml_area(opened)
    area.set_value(area.value.replace("num_steps: 60", "num_steps: 77")).run()
    to_form(opened)
    assert field(opened, "train.num_steps").value == 77
    assert "1232 examples in all" in texts(opened.markdown)


def test_all_problems_of_the_form_are_shown_at_once(opened):
    field(opened, "train.learning_rate").input("fast").run()
    field(opened, "lora.dropout").input("1.5").run()
    shown = texts(opened.error)
    assert "train\\.learning\\_rate" in shown and "lora\\.dropout" in shown
    assert opened.button(key="config.start").disabled and opened.button(key="config.save").disabled


@pytest.mark.parametrize("text", ["nan", "inf", "1e999"])
def test_what_is_no_finite_number_is_a_problem_and_the_page_comes_to_rest(opened, text):
    field(opened, "train.learning_rate").input(text).run()
    assert "train\\.learning\\_rate" in texts(opened.error)
    assert field(opened, "train.learning_rate").value == text


def test_five_mistakes_in_the_yaml_are_five_lines(opened):
    yaml_area(opened).set_value(
        "name: A B\nmethod: lorra\ntrain:\n  num_stepz: 3\n  learning_rate: 7\n  seed: -1\n"
    ).run()
    shown = texts(opened.error)
    for path in ("name", "method", "train\\.num\\_stepz", "train\\.learning\\_rate", "train\\.seed"):
        assert f"**{path}**" in shown
    to_form(opened)
    assert "The form comes back" in texts(opened.info)


def test_text_that_is_not_yaml(opened):
    yaml_area(opened).set_value("a: [1, 2").run()
    assert not opened.exception and "is not YAML" in texts(opened.error)


def test_the_difference_from_the_preset(opened):
    field(opened, "lora.rank").set_value(8).run()
    rows = opened.dataframe[0].value
    assert list(rows["path"]) == ["lora.rank"] and list(rows["here"]) == ["8"] and list(rows["there"]) == ["16"]


def test_full_method_hides_the_adapter(opened):
    field(opened, "method").select("full").run()
    with pytest.raises(AssertionError):
        field(opened, "lora.rank")


def test_saving_and_saving_as(opened, project):
    opened.button(key="config.save").click().run()
    assert runs.list_configs(project) == ["starter_lora"]
    opened.text_input(key="config.as.name").input("mine")
    opened.button(key="config.as.go").click().run()
    assert not opened.exception
    assert runs.list_configs(project) == ["mine", "starter_lora"]
    assert load_config(runs.config_path(project, "mine")).name == "mine"


@pytest.mark.parametrize("name", ["../../etc/passwd", "Äh", ""])
def test_a_name_that_is_no_file_name_is_refused(opened, project, name):
    opened.text_input(key="config.as.name").input(name)
    opened.button(key="config.as.go").click().run()
    assert opened.error and runs.list_configs(project) == []


def test_a_draft_outlives_the_page(opened):
    field(opened, "train.num_steps").set_value(33).run()
    opened.switch_page("pages/1_Data.py").run()
    opened.switch_page(PAGE).run()
    assert field(opened, "train.num_steps").value == 33


def test_a_broken_config_file_is_shown_not_raised(open_page, project):
    runs.config_path(project, "broken").write_text("name: [", encoding="utf-8")
    at = open_page(PAGE)
    assert "is not YAML" in texts(at.error)


def test_derived_numbers_with_the_data_there(open_page, project):
    rows = [Conversation((Message("user", f"q{n}"), Message("assistant", "a"))) for n in range(100)]
    datasets.save(project, "identity", rows, kind="import")
    datasets.save(project, "general", rows, kind="general")
    at = open_page(PAGE)
    shown = texts(at.markdown)
    assert "Rows in an epoch **190**" in shown and "5.1 passes" in shown
    assert not at.error


def test_start_saves_and_leads_to_train(opened, project):
    opened.button(key="config.start").click().run()
    assert runs.list_configs(project) == ["starter_lora"]
    assert opened.title[0].value.endswith("Train")


def test_in_chinese(open_page, project):
    at = open_page(PAGE, lang="zh")
    assert field(at, "train.learning_rate").label == "学习率"
    assert field(at, "train.learning_rate").help.startswith("学习率峰值")


def test_built_in_configs_are_listed_in_a_dialog(opened):
    opened.button(key="config.built_in.open").click().run()
    names = [list(frame.value["name"]) for frame in opened.dataframe if "name" in frame.value]
    assert len(names[0]) > 800 and "internlm2_1_8b_qlora_alpaca_e3" in names[0]
    assert opened.text_input(key="config.built_in.words") is not None
    assert opened.multiselect(key="config.built_in.families").options == sorted(FAMILIES)


def test_data_that_a_config_says_where_to_find_comes_with_a_button(opened, project, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 12, encoding="utf-8")
    recipe = f"{{mine: {{source: '{rows}', format: code_alpaca}}}}"
    area = yaml_area(opened)
    area.set_value(f"name: mine\ndata:\n  sources: {{mine: all}}\n  recipes: {recipe}\n").run()
    assert "is not in this project yet" in texts(opened.error)
    opened.button(key="config.data").click().run()
    with open_db(project.folder) as db:
        [job] = store_jobs.listed(db, kind="import")
    runs.wait(project.folder, job)
    assert datasets.get(project, "mine").num_rows == 12
    opened.run()
    assert "is not in this project yet" not in texts(opened.error)


@pytest.fixture
def with_code(tmp_path):
    """A folder of a kind that only its own code computes, and where a run of that code would leave a trace."""
    folder = make_base(tmp_path / "chatglm")
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "chatglm", "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    return folder


def open_with(at, base):
    field(at, "model.base").input(str(base)).run()
    return at


def in_dialog(at, act):
    """A browser keeps a dialog open; here its button is pressed once more with each thing done in it."""
    at.button(key="config.code").click()
    act().run()


def test_code_of_a_model_is_looked_at_consented_to_and_taken_back(opened, with_code, tmp_path):
    at = open_with(opened, with_code)
    assert "not run unless you consent" in texts(at.warning)
    at.button(key="config.code").click().run()
    listed = next(frame.value for frame in at.dataframe if "sha256" in frame.value)
    assert list(listed["file"]) == ["modeling.py"] and list(listed["sha256"]) == [sha256_of(with_code / "modeling.py")]
    assert "open(" in texts(at.code) and at.button(key="config.code.trust").disabled
    in_dialog(at, lambda: at.checkbox(key="config.code.read").check())
    in_dialog(at, lambda: at.button(key="config.code.trust").click())
    assert model_code.need(with_code) == "given" and "You consented" in texts(at.caption)
    (with_code / "more.py").write_text("x = 1\n")
    assert "changed since you consented" in texts(at.run().warning)
    (with_code / "more.py").unlink()
    at.run().button(key="config.code").click().run()
    in_dialog(at, lambda: at.button(key="config.code.revoke").click())
    assert model_code.need(with_code) == "wanted" and not (tmp_path / "ran").exists()


def test_code_that_is_not_in_the_folder_cannot_be_consented_to(opened, with_code):
    values = json.loads((with_code / "config.json").read_text())
    values["auto_map"] = {"AutoModelForCausalLM": "someone/else--modeling.Model"}
    (with_code / "config.json").write_text(json.dumps(values))
    at = open_with(opened, with_code)
    assert "from another place" in texts(at.warning)
    with pytest.raises(KeyError):
        at.button(key="config.code")


def test_a_python_config_of_xtuner_is_read_and_opened(opened, project):
    opened.button(key="config.import.open").click().run()
    path = REPOSITORY / "tests/config/fixtures/tutorial.py.txt"

    def in_import(act):
        opened.button(key="config.import.open").click()
        act().run()

    in_import(lambda: opened.text_input(key="config.import.path").input("/nowhere/config.py"))
    assert "cannot be read" in texts(opened.error)
    in_import(lambda: opened.text_input(key="config.import.path").input(str(path)))
    assert "/root/ft/model" in texts(opened.markdown) and not opened.exception
    in_import(lambda: opened.button(key="config.import.take").click())
    assert field(opened, "model.base").value == "/root/ft/model" and field(opened, "data.max_length").value == 1024
    assert runs.list_configs(project) == [] and "Not saved yet" in texts(opened.caption)


def test_gradient_checkpointing_is_left_to_memory_until_somebody_says_otherwise(opened):
    choice = field(opened, "train.gradient_checkpointing")
    assert choice.value == "auto" and list(choice.options) == ["auto", "on", "off"]
    choice.select(True).run()
    assert load_text(yaml_area(opened).value).train.gradient_checkpointing is True
    to_form(opened)
    assert field(opened, "train.gradient_checkpointing").value is True and not opened.exception
