"""Catalogues: every word has a Chinese form, compiled ones are current, placeholders survive, sessions do not mix."""

import re
import subprocess
import sys

import pytest
from streamlit.testing.v1 import AppTest

from studio.config.schema import RunConfig
from studio.ui import i18n
from studio.ui.locales import __main__ as locales

PLACEHOLDER = re.compile(r"\{[^}]*\}")


@pytest.fixture(scope="module")
def words():
    return locales.collect()


@pytest.mark.parametrize("language", locales.TRANSLATED)
def test_every_word_is_translated(words, language):
    assert locales.untranslated(locales.updated(language, words)) == []


@pytest.mark.parametrize("language", locales.TRANSLATED)
def test_the_files_are_up_to_date(words, language):
    po, mo = locales.files_of(locales.updated(language, words))
    path = locales.po_path(language)
    assert path.read_bytes() == po, "run `make locales`"
    assert path.with_suffix(".mo").read_bytes() == mo, "run `make locales`"


@pytest.mark.parametrize("language", locales.TRANSLATED)
def test_placeholders_are_the_same(words, language):
    for message in locales.updated(language, words):
        if not message.id:
            continue
        singular = message.id[0] if isinstance(message.id, tuple) else message.id
        forms = message.string if isinstance(message.string, tuple) else (message.string,)
        for form in filter(None, forms):
            assert sorted(PLACEHOLDER.findall(singular)) == sorted(PLACEHOLDER.findall(form)), singular


def test_the_schema_is_in_the_catalogue(words):
    for name, field in RunConfig.model_fields.items():
        assert locales.label_of(name) in words
        assert not field.description or field.description in words
    assert "Peak learning rate." in words


def test_words_inside_f_strings_are_found():
    source = "x = f\"**{_('inside')}** {ngettext('one', 'many', n)}\"; N_(\"plain\"); _(name); other(\"no\")"
    assert set(locales.marked_words(source)) == {"inside", ("one", "many"), "plain"}


def test_what_jobs_report_is_in_the_catalogue(words):
    source = 'job.phase("saving"); job.phase(f"{x}", 3, "rows"); job.phase("asking", total=2, unit="prompts")'
    assert set(locales.phase_words(source)) == {"saving", "rows", "asking", "prompts"}
    assert "waiting in line" in words


def test_the_shell_takes_its_language_from_the_environment_and_loads_no_streamlit():
    code = (
        "import sys; from studio.ui.i18n import _, ngettext; "
        "print(_('Train'), ngettext('{number} row', '{number} rows', 2)); assert 'streamlit' not in sys.modules"
    )
    for language, expected in (("zh_CN.UTF-8", "训练 {number} 行"), ("fr", "Train {number} rows")):
        environment = {"RETUNE_LANGUAGE": language, "PATH": "/usr/bin", "PYTHONUTF8": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_two_sessions_speak_two_languages():
    def script():
        import streamlit as st

        from studio.ui.i18n import _

        st.text(_("Train"))

    english, chinese = AppTest.from_function(script), AppTest.from_function(script)
    chinese.query_params["lang"] = "zh"
    for _round in range(2):
        assert english.run().text[0].value == "Train"
        assert chinese.run().text[0].value == "训练"


def test_a_language_that_we_do_not_have_is_english():
    assert [i18n._nearest(tag) for tag in ("zh-TW", "zh_CN", "de-DE", "", None)] == ["zh", "zh", "en", "en", "en"]
