"""The config as a form, made from the schema: a field's type picks the widget, its description is the help."""

import math
import re
import types
import typing
from typing import Any, Literal, get_args, get_origin

import streamlit as st
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from studio.config.schema import VIRTUAL_METHODS, RunConfig, Section
from studio.ui.i18n import _

WIDE = ("sources", "sample_prompts", "target_modules")
SPELT_OUT = {
    "lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA", "deepspeed": "DeepSpeed", "num": "number of", "max": "maximum",
    "grad": "gradient", "valid": "validation", "cuda": "CUDA",
}  # fmt: skip


SHOWN_FOR = {"lora": ("lora", "qlora"), "prompt": VIRTUAL_METHODS}  # sections that only some methods use


def label_of(name: str) -> str:
    """'num_steps' -> 'Number of steps'."""
    words = [SPELT_OUT.get(word, word) for word in name.split("_")]
    return " ".join([words[0][:1].upper() + words[0][1:], *words[1:]])


def config_form(values: dict[str, Any], datasets: list[str], key: str) -> dict[str, Any]:
    """Draw the form over `values` (a config as plain values) and return what it says now; nothing is checked here.

    `key` names the widgets: another key starts over from `values`.
    """
    result: dict[str, Any] = {}
    top = {name: field for name, field in RunConfig.model_fields.items() if not _is_section(field)}
    with st.container(border=True):
        result |= _fields(top, values, datasets, key)
    for name, field in RunConfig.model_fields.items():
        if _is_section(field):
            result[name] = _section(name, field.annotation, values.get(name, {}), datasets, f"{key}.{name}", result)
    return result


def _section(
    name: str, section: Any, values: dict[str, Any], datasets: list[str], key: str, above: dict[str, Any]
) -> dict[str, Any]:
    if name in SHOWN_FOR and above.get("method") not in SHOWN_FOR[name]:
        return values  # kept, and not shown: nothing of it is used
    plain_fields = {n: f for n, f in section.model_fields.items() if not _is_advanced(f)}
    advanced = {n: f for n, f in section.model_fields.items() if _is_advanced(f)}
    with st.container(border=True, gap="small"):
        st.markdown(f"**{_(label_of(name))}** — :gray[{_((section.__doc__ or '').strip())}]")
        result = _fields(plain_fields, values, datasets, key)
        if advanced:
            with st.expander(_("Advanced")):
                result |= _fields(advanced, values, datasets, key)
    return result


def _fields(fields: dict[str, FieldInfo], values: dict[str, Any], datasets: list[str], key: str) -> dict[str, Any]:
    """Narrow fields in rows of three, switches in a row below them, wide fields last."""
    result: dict[str, Any] = {
        name: values[name] for name, field in fields.items() if name in values and not _is_shown(field)
    }
    fields = {name: field for name, field in fields.items() if _is_shown(field)}
    switches = [name for name in fields if fields[name].annotation is bool]
    narrow = [name for name in fields if name not in WIDE and name not in switches]
    for first in range(0, len(narrow), 3):
        for column, name in zip(st.columns(3, vertical_alignment="bottom"), narrow[first : first + 3], strict=False):
            with column:
                result[name] = _widget(name, fields[name], values.get(name), f"{key}.{name}")
    for name in switches:
        result[name] = _widget(name, fields[name], values.get(name), f"{key}.{name}")
    for name in fields:
        if name == "sources":
            result[name] = _sources(fields[name], values.get(name) or {}, datasets, f"{key}.{name}")
        elif name in WIDE:
            result[name] = _widget(name, fields[name], values.get(name), f"{key}.{name}")
    return result


def _widget(name: str, field: FieldInfo, value: Any, key: str) -> Any:
    label, help_text = _(label_of(name)), _(field.description or "")
    kind, optional = _kind(field.annotation)
    if get_origin(kind) is Literal:
        options = get_args(kind)
        index = options.index(value) if value in options else 0
        shown = {"": _("the model's own"), True: "on", False: "off"}
        return st.selectbox(
            label, options, index=index, help=help_text, key=key, format_func=lambda option: shown.get(option, option)
        )
    if kind is bool:
        return st.toggle(label, value=bool(value), help=help_text, key=key)
    if kind in (int, float):
        return _number(label, kind, field, value, optional, help_text, key)
    if get_origin(kind) is tuple:
        text = st.text_area(f"{label} ({_('one a line')})", "\n".join(value or ()), help=help_text, key=key, height=90)
        return [line for line in text.splitlines() if line.strip()]
    return st.text_input(label, str(value or ""), help=help_text, key=key).strip()


def _number(label: str, kind: type, field: FieldInfo, value: Any, optional: bool, help_text: str, key: str) -> Any:
    """Whole numbers get steppers; others are typed as text, so that 5e-4 is understood. The schema judges both."""
    help_text = f"{help_text} {limits(field)}".strip()
    placeholder = _("empty") if optional else None
    low, high = _bound(field, Ge), _bound(field, Le)
    if kind is int and (value is None or (isinstance(value, int) and low <= value <= high)):
        return st.number_input(
            label, int(low), int(min(high, 2**53 - 1)), value, 1, help=help_text, key=key, placeholder=placeholder
        )
    shown = "" if value is None else repr(value) if isinstance(value, float) else str(value)
    text = st.text_input(label, shown, key=key, help=help_text, placeholder=placeholder).strip()
    if not text and optional:
        return None
    try:
        number = kind(text)
    except ValueError:
        return text  # the schema names what is wrong with it
    # Not a number is not equal to itself: as a value it would look changed on every run of the page.
    return number if math.isfinite(number) else text


def _bound(field: FieldInfo, rule: type) -> float:
    """The lowest (Ge) or highest (Le) value allowed; JavaScript's largest whole number where there is none."""
    name = {Ge: "ge", Le: "le"}[rule]
    found = [getattr(each, name) for each in field.metadata if isinstance(each, rule)]
    return found[0] if found else {Ge: 1 - 2**53, Le: 2**53 - 1}[rule]


def limits(field: FieldInfo) -> str:
    """'1 – 1024', '≥ 0', '> 0', from the field's own rules; '' when it has none."""
    signs = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
    found = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for cls, (sign, name) in signs.items()
        if isinstance(rule, cls)
    ]
    return f"({', '.join(found)})" if found else ""


def _sources(field: FieldInfo, value: dict[str, Any], datasets: list[str], key: str) -> dict[str, Any]:
    """One row for each chosen dataset, with its share or its number of rows."""
    options = list(dict.fromkeys([*datasets, *value]))
    chosen = st.multiselect(
        _(label_of("sources")), options, [name for name in value if name in options], key=f"{key}.names",
        help=_(field.description or ""), placeholder=_("Choose datasets"),
        format_func=lambda name: name if name in datasets else _("{name} (not in this project)").format(name=name),
    )  # fmt: skip
    result: dict[str, Any] = {}
    columns = st.columns(3)
    for number, name in enumerate(chosen):
        with columns[number % 3]:
            label = _("Share of {name}").format(name=name)
            result[name] = _portion(label, field, value.get(name, 0.5), f"{key}.share.{name}")
    return result


def _portion(label: str, field: FieldInfo, value: Any, key: str) -> Any:
    """A share such as 0.5, "2000 rows" for {"rows": 2000}, or "all"."""
    if isinstance(value, dict) and set(value) == {"rows"}:
        value = f"{value['rows']} rows"
    help_text = _("A share (0.5), rows in every epoch (2000 rows), or all.")
    entered = _number(label, float, field, value, False, help_text, key)
    counted = re.fullmatch(r"(\d+)\s*rows?", entered.strip()) if isinstance(entered, str) else None
    return {"rows": int(counted[1])} if counted else entered


def _kind(annotation: Any) -> tuple[Any, bool]:
    """The type without None and without annotations, and whether None is allowed."""
    if get_origin(annotation) in (types.UnionType, typing.Union):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        return parts[0], True
    if get_origin(annotation) is typing.Annotated:
        return get_args(annotation)[0], False
    return annotation, False


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _is_shown(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return not (isinstance(extra, dict) and extra.get("form") is False)


def _is_advanced(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("advanced"))
