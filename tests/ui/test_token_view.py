"""Tokens that together make one character are shown as one."""

from studio.row_life import Chip, TokenView, chips

BYTES = {1: b"a", 2: "我".encode()[:1], 3: "我".encode()[1:2], 4: "我".encode()[2:], 5: b"!"}


def decode(ids: list[int]) -> str:
    return b"".join(BYTES[each] for each in ids).decode("utf-8", errors="replace")


def tokens(ids: list[int], trained: bool = True) -> list[TokenView]:
    return [TokenView(decode([each]), each, trained) for each in ids]


def test_parts_of_a_character_are_joined():
    shown = chips(tokens([1, 2, 3, 4, 5]), decode)
    assert shown == [Chip("a", (1,), True), Chip("我", (2, 3, 4), True), Chip("!", (5,), True)]


def test_no_id_is_lost_when_the_last_character_is_cut():
    shown = chips(tokens([1, 2, 3], trained=False), decode)
    assert [each for chip in shown for each in chip.ids] == [1, 2, 3]
    assert not any(chip.trained for chip in shown)
