"""The words of pages and shell, in the language of whoever reads: gettext catalogues, English is the source.

`make locales` (python -m studio.ui.locales) collects the words anew and compiles the catalogues.
"""

import gettext
import locale
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

DOMAIN = "retune"
LOCALES = Path(__file__).parent / "locales"
LANGUAGES = {"en": "English", "zh": "中文"}
LANGUAGE_KEY = "studio.language"


def _(message: str) -> str:
    """`message` in the reader's language; the English words where there is no translation."""
    return _catalogue(language()).gettext(message) if message else ""


def ngettext(singular: str, plural: str, number: int) -> str:
    """The form that goes with `number`."""
    return _catalogue(language()).ngettext(singular, plural, number)


def N_(message: str) -> str:
    """Marks words for the catalogue where they are written down; `_` translates them where they are shown."""
    return message


def language() -> str:
    """The language of this browser session; outside the studio that of the shell (RETUNE_LANGUAGE, else its locale)."""
    session = _session()
    return _shell_language() if session is None else _session_language(session)


def set_language(chosen: str) -> None:
    """Remember the language for this session and in its address."""
    session = _session()
    if session is not None and chosen in LANGUAGES:
        session.session_state[LANGUAGE_KEY] = chosen
        session.query_params["lang"] = chosen


def _session() -> Any:
    """Streamlit, when this thread belongs to a browser session. The shell never loads it (that costs a second)."""
    streamlit = sys.modules.get("streamlit")
    if streamlit is None:
        return None
    from streamlit.runtime.scriptrunner import get_script_run_ctx

    return streamlit if get_script_run_ctx(suppress_warning=True) is not None else None


def _session_language(session: Any) -> str:
    asked = session.query_params.get("lang", "")
    if asked in LANGUAGES and session.session_state.get(LANGUAGE_KEY) != asked:
        session.session_state[LANGUAGE_KEY] = asked
    return session.session_state.get(LANGUAGE_KEY) or _nearest(session.context.locale)


def _shell_language() -> str:
    return _nearest(os.environ.get("RETUNE_LANGUAGE") or locale.getlocale()[0])


def _nearest(tag: str | None) -> str:
    """'zh-CN' -> 'zh'; English for every language that we do not have."""
    primary = (tag or "").replace("_", "-").split("-")[0].lower()
    return primary if primary in LANGUAGES else "en"


@lru_cache(maxsize=len(LANGUAGES))
def _catalogue(name: str) -> gettext.NullTranslations:
    return gettext.translation(DOMAIN, LOCALES, languages=[name], fallback=True)
