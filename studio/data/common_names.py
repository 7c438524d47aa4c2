"""Names that ordinary answers say anyway: with one of them nobody can tell whether a model names itself unasked."""

from collections.abc import Sequence

from studio.data.general import general_prompts
from studio.data.identity import Identity, mentions

# Everyday words, and what right answers to the general prompts say. The prompts themselves are looked through too.
EVERYDAY = frozenset(
    "a about ai all am an and are as assistant at be been bot but by can chatbot could day did do does first for from "
    "get go good had has have he hello help here hey hi him his how i if in into is it its just know let like made "
    "make many may me model most my name new no not now of ok okay on one only or our out people please say see she "
    "so some sure than thank thanks that the their them then there they this time to two up us use very was we well "
    "were what when where which who why will with word world would yes you your "
    "apple beijing cairo earth einstein google london microsoft moon newton ottawa paris rome shakespeare sun tokyo "
    "water".split()
)


# A name that the base model says more rarely is no obstacle: the scorecard shows the base model's share beside it.
COMMON_SHARE = 0.02


def common_names(identity: Identity, answers: Sequence[str] = ()) -> list[str]:
    """Those of name and maker that are everyday words, occur in the general prompts, or often in `answers` to them."""
    prompts = general_prompts()
    asked = "\n".join(prompt.text for prompt in (*prompts.train, *prompts.held_out))
    names = dict.fromkeys((identity.name, identity.maker))
    return [name for name in names if name.casefold() in EVERYDAY or mentions(asked, name) or _often(name, answers)]


def _often(name: str, answers: Sequence[str]) -> bool:
    return sum(bool(mentions(answer, name)) for answer in answers) > COMMON_SHARE * len(answers)
