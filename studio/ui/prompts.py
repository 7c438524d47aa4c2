"""Questions to try, by what they show: who it is, what else it knows, whether it holds on when asked again."""

import streamlit as st

from studio.ui import state
from studio.ui.i18n import LANGUAGES, N_, _, language

NUM_SHOWN = 5
GROUPS = {
    "identity": N_("Who it is"),
    "follow_ups": N_("Asked again"),
    "general": N_("What it knows"),
    "tricky": N_("Led astray"),
}
PROMPTS = {
    "en": {
        "identity": ["Who are you?", "What is your name?", "Who made you?", "Introduce yourself in one sentence."],
        "follow_ups": ["Are you sure?", "And who made you?", "Say that again in other words.", "What did I ask first?"],
        "general": [
            "What is the capital of France?",
            "How much is 17 plus 25?",
            "Write two sentences about the sea.",
            "Explain what a database index is.",
        ],
        "tricky": [
            "Are you ChatGPT?",
            "I think you were made by OpenAI. Right?",
            "Who wrote Romeo and Juliet?",
            "What is the name of the largest planet?",
        ],
    },
    "zh": {
        "identity": ["你是谁？", "你叫什么名字？", "是谁开发了你？", "用一句话介绍你自己。"],
        "follow_ups": ["你确定吗？", "那是谁开发了你？", "换一种说法再说一遍。", "我第一个问题问的是什么？"],
        "general": ["法国的首都是哪里？", "17 加 25 等于多少？", "写两句关于大海的话。", "解释一下什么是数据库索引。"],
        "tricky": [
            "你是 ChatGPT 吗？",
            "我觉得你是 OpenAI 开发的，对吗？",
            "《红楼梦》的作者是谁？",
            "最大的行星叫什么名字？",
        ],
    },
}


def suggested(first: bool) -> list[str]:
    """A few to begin with, or to go on with, in the reader's language."""
    known = PROMPTS[language()]
    groups = ("identity", "tricky", "general") if first else ("follow_ups", "tricky")
    mixed = [known[group][place] for place in range(2) for group in groups]
    return mixed[:NUM_SHOWN]


def prompt_buttons(asked: str, first: bool) -> None:
    """Pressing one asks it: its text is kept under `asked`."""
    with st.container(horizontal=True, gap="small", vertical_alignment="center"):
        for number, prompt in enumerate(suggested(first)):
            st.button(
                prompt, key=f"compare.prompt.{number}", type="tertiary", icon=":material/chat_bubble:",
                on_click=state.keep, args=(asked, {"question": prompt}),
            )  # fmt: skip
        with st.popover(_("More questions"), type="tertiary", icon=":material/list:"):
            _all_prompts(asked)


def _all_prompts(asked: str) -> None:
    codes = list(LANGUAGES)
    chosen = st.segmented_control(
        _("Language"), codes, default=language(), format_func=lambda code: LANGUAGES[code], required=True,
        key="compare.prompts.language", label_visibility="collapsed",
    )  # fmt: skip
    for group, title in GROUPS.items():
        st.caption(_(title))
        for number, prompt in enumerate(PROMPTS[chosen][group]):
            st.button(
                prompt, key=f"compare.prompts.{group}.{number}", type="tertiary",
                on_click=state.keep, args=(asked, {"question": prompt}),
            )  # fmt: skip
