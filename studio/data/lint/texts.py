"""What the lint looks for in a text, and what its fixes make of it."""

import re
from dataclasses import replace

from studio.data.conversation import Conversation, role_order_problem
from studio.data.languages import HAN

CONTROL_TOKEN = re.compile(r"<[|｜][^\s<>|｜]{1,40}[|｜]>|\[/?INST\]|<</?SYS>>")
LAST_CONTROL_TOKEN = re.compile(r"(?:<[|｜][^\s<>|｜]{1,40}[|｜]>|\[/?INST\]|</?s>|<eos>|<end_of_turn>)$")
LONGEST_CONTROL_TOKEN = 44
SENTENCE_END = re.compile(r"[.!?…](?=[\s\"”')\]]|$)[\"”')\]]*|[。！？；…][”’」』）]?")
# Words that no sentence ends with.
OPEN_WORDS = frozenset({"the", "an", "and", "or", "of", "because", "whose", "into", "their", "your", "my", "our"})
OPEN_ENDS = ",，、:：;([{（【《“"
FEWEST_SENTENCES = 2
FEWEST_WORDS_LEFT = 4
FEWEST_CHARACTERS_LEFT = 8
SHORTEST = 24
BLANK_LINES = re.compile(r"(?:[ \t]*[\r\n])*")
LOST = ("\N{REPLACEMENT CHARACTER}", "锟斤拷", "烫烫烫", "屯屯屯")
FEWEST_NON_ASCII = 6


def stripped(content: str) -> str:
    """Without blanks at the end and blank lines before; the first line keeps its indentation."""
    if content[:1].isspace():
        content = content[BLANK_LINES.match(content).end() :]  # type: ignore[union-attr]
    return content.rstrip()


def is_cut_short(content: str) -> bool:
    """Whether an answer ends in the middle of a sentence or a code block. Lists and short answers may end openly."""
    text = content.rstrip()
    if text.count("```") % 2:
        return True
    if len(text) < SHORTEST:
        return False
    if text[-1] in OPEN_ENDS:
        return True
    last_word = text[text.rfind(" ") + 1 :]
    return last_word in OPEN_WORDS or bool(whole_sentences(text))


def whole_sentences(content: str) -> str:
    """The text up to its last whole sentence, where its last paragraph is prose that breaks off; else ""."""
    text = content.rstrip()
    if not text or not (text[-1].isalnum() or text[-1] in OPEN_ENDS) or text.count("```") % 2:
        return ""
    start = text.rfind("\n") + 1
    ends = [match.end() for match in SENTENCE_END.finditer(text, start)]
    if len(ends) < FEWEST_SENTENCES:
        return ""
    left = text[ends[-1] :].strip()
    if any(mark in left for mark in ("http", "=", "|", "`", "/")):
        return ""
    words = len(left.split()) >= FEWEST_WORDS_LEFT or len(HAN.findall(left)) >= FEWEST_CHARACTERS_LEFT
    return text[: ends[-1]] if words else ""


def without_last_turn(conversation: Conversation) -> Conversation | None:
    """The longest beginning that ends with an answer and is in order; None when there is none but the whole."""
    if conversation.kind != "chat":
        return None
    for end in range(len(conversation.messages) - 1, 1, -1):
        messages = conversation.messages[:end]
        said = all(message.content.strip() or message.tool_calls for message in messages)
        if said and not role_order_problem(messages):
            return replace(conversation, messages=messages)
    return None


def repaired(text: str) -> str:
    """A text that was decoded wrongly, as it was meant; the text itself when nothing is wrong or to be repaired."""
    if text.isascii():
        return text
    import ftfy  # its tables cost a tenth of a second

    return _utf8_read_as_gbk(text) or ftfy.fix_encoding(text)


def _utf8_read_as_gbk(text: str) -> str:
    """浣犲ソ -> 你好. Short texts can be valid both ways, so they are left alone."""
    head = text[:200]
    if len(head) - len(head.encode("ascii", "ignore")) < FEWEST_NON_ASCII:
        return ""
    try:
        meant = text.encode("gb18030").decode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError):
        return ""
    return meant if HAN.search(meant) else ""


def is_lost(text: str) -> bool:
    """Whether characters were replaced when the text was decoded; no repair brings them back."""
    return not text.isascii() and any(mark in text for mark in LOST)


def without_control_end(content: str) -> str:
    """Without control tokens at the end of the text."""
    text = content.rstrip()
    while found := LAST_CONTROL_TOKEN.search(text, max(0, len(text) - LONGEST_CONTROL_TOKEN)):
        text = text[: found.start()].rstrip()
        content = text
    return content
