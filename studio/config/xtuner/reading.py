"""Reads a Python config without running it: literals, names, arithmetic, dict(type=…), imports as names.

XTuner's configs are programs. Here a program is only looked at: its syntax tree is walked by a small evaluator that
knows values and nothing else, in bounded time and memory. What it cannot read stands as Unread where a value would be,
with its line, and nothing is put in its place.
"""

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from studio.config.files import read_config
from studio.errors import ConfigError, Problem

MAX_BYTES = 200_000  # XTuner's own are below 20,000
MAX_NODES = 50_000
MAX_DEPTH = 60
MAX_ITEMS = 10_000  # of a list or text that arithmetic makes
MAX_BITS = 256  # of a whole number
MAX_MADE = 2_000_000  # characters and items that arithmetic makes in all
MAX_FILES = 20  # that inherit from each other
SCALARS = (int, float, str, bool, type(None))
TUPLES = (list, tuple)


@dataclass(frozen=True)
class Ref:
    """An imported thing by its dotted name: torch.optim.AdamW, xtuner.utils.PROMPT_TEMPLATE.default."""

    name: str


@dataclass(frozen=True)
class Unread:
    """In place of a value that could not be read: where it stands, and why."""

    line: int
    what: str
    file: str = ""

    def __str__(self) -> str:
        where = f"{self.file}, line {self.line}" if self.file else f"line {self.line}"
        return f"{where}: {self.what}"


@dataclass
class Reading:
    """The names that a config sets, and what could not be read of it, in order. `lines` tells where a name was set."""

    names: dict[str, Any] = field(default_factory=dict)
    unread: list[Unread] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)


class _Refused(Exception):
    """Why an expression has no value here."""


def read_file(path: Path) -> Reading:
    """Read a config and those beside it that it inherits from. Raises ConfigError for what is no such file."""
    return _read(path, ())


def read_text(text: str, source: str = "config.py") -> Reading:
    """Read a config that stands alone. Raises ConfigError."""
    return _Reader(_parse(text, source), source, None, ()).read()


def _read(path: Path, above: tuple[Path, ...]) -> Reading:
    resolved = path.resolve()
    if resolved in above:
        raise _problem(path.name, f"inherits from itself through {' and '.join(each.name for each in above)}")
    if len(above) >= MAX_FILES:
        raise _problem(path.name, f"inherits through more than {MAX_FILES} files")
    text = read_config(path, MAX_BYTES)
    return _Reader(_parse(text, path.name), path.name, resolved, (*above, resolved)).read()


def _parse(text: str, source: str) -> ast.Module:
    if len(text) > MAX_BYTES:
        raise _problem(source, f"is {len(text):,} characters long; no config is", f"at most {MAX_BYTES:,}")
    try:
        tree = ast.parse(text, source)
    except SyntaxError as error:
        place = f"line {error.lineno}: " if error.lineno else ""
        raise _problem(source, f"is no Python: {place}{error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise _problem(source, f"is no Python that can be read: {type(error).__name__}: {str(error)[:100]}") from None
    if sum(1 for _node in _walk(tree)) > MAX_NODES:
        raise _problem(source, f"has more than {MAX_NODES:,} parts; no config has")
    return tree


def _walk(tree: ast.AST) -> Any:
    """All nodes, given up one past the limit."""
    for number, node in enumerate(ast.walk(tree)):
        yield node
        if number > MAX_NODES:
            return


def _problem(source: str, message: str, allowed: str = "") -> ConfigError:
    return ConfigError([Problem("(file)", message, allowed)], source)


class _Reader:
    """Walks one file. `folder` is where relative imports of read_base look; None for text that stands alone."""

    def __init__(self, tree: ast.Module, source: str, path: Path | None, above: tuple[Path, ...]) -> None:
        self._tree, self._source, self._path, self._above = tree, source, path, above
        self._found = Reading()
        self._depth = self._made = 0

    def read(self) -> Reading:
        try:
            self._statements(self._tree.body)
        except RecursionError:
            raise _problem(self._source, "is nested too deeply") from None
        if "_base_" in self._found.names:
            self._inherit_by_name()
        return self._found

    # statements

    def _statements(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        known = {
            ast.Import: self._import, ast.ImportFrom: self._import_from, ast.Assign: self._assign,
            ast.AnnAssign: self._annotated, ast.AugAssign: self._augmented, ast.If: self._if, ast.With: self._with,
            ast.Expr: self._expression, ast.Pass: lambda node: None,
        }.get(type(node))  # fmt: skip
        if known is None:
            self._unread(node, _name_of(node))
            self._forget(node)
        else:
            known(node)  # type: ignore[operator]

    def _unread(self, node: ast.AST, what: str) -> Unread:
        found = Unread(getattr(node, "lineno", 0), what, self._source)
        self._found.unread.append(found)
        return found

    def _forget(self, node: ast.AST) -> None:
        """What a statement that is not read would set is not known after it."""
        for each in ast.walk(node):
            if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store | ast.Del):
                self._set(each.id, Unread(node.lineno, _name_of(node), self._source), node)
            elif isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                self._set(each.name, Unread(each.lineno, f"{each.name}, code of the config itself", self._source), node)

    def _set(self, name: str, value: Any, node: ast.AST) -> None:
        self._found.names[name] = value
        self._found.lines[name] = getattr(node, "lineno", 0)

    def _import(self, node: ast.Import) -> None:
        for alias in node.names:
            first = alias.name.partition(".")[0]
            self._set(alias.asname or first, Ref(alias.name if alias.asname else first), node)

    def _import_from(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            if alias.name == "*":
                self._unread(node, f"import * of {node.module or '.'}: which names that brings is not known")
            elif node.level:
                self._set(alias.asname or alias.name, self._unread(node, f"{alias.name} of a file beside it"), node)
            else:
                self._set(alias.asname or alias.name, Ref(f"{node.module}.{alias.name}"), node)

    def _with(self, node: ast.With) -> None:
        """`with read_base():` takes the names of configs beside this one; nothing else is entered."""
        call = node.items[0].context_expr if len(node.items) == 1 else None
        target = self._value(call.func) if isinstance(call, ast.Call) else None
        if not (isinstance(target, Ref) and target.name.endswith(".read_base")):
            self._unread(node, "a with block")
            return self._forget(node)
        for statement in node.body:
            if isinstance(statement, ast.ImportFrom) and statement.level and self._path:
                self._inherit(statement)
            else:
                self._unread(statement, "read_base of something that is no file beside this one")
        return None

    def _inherit(self, node: ast.ImportFrom) -> None:
        assert self._path
        folder = self._path.parent
        for _step in range(node.level - 1):
            folder = folder.parent
        path = folder.joinpath(*(node.module or "").split(".")).with_suffix(".py")
        base = self._base(path, node)
        if base is None:
            return
        for alias in node.names:
            if alias.name == "*":
                self._found.names |= {name: value for name, value in base.names.items() if not name.startswith("_")}
            elif alias.name in base.names:
                self._set(alias.asname or alias.name, base.names[alias.name], node)
            else:
                self._set(alias.asname or alias.name, self._unread(node, f"{path.name} has no {alias.name}"), node)

    def _base(self, path: Path, node: ast.AST) -> Reading | None:
        if not path.is_file():
            self._unread(node, f"{path.name}, which is not beside this config")
            return None
        base = _read(path, self._above)
        self._found.unread += base.unread
        return base

    def _inherit_by_name(self) -> None:
        """mmengine's older way: `_base_` names files, whose dicts this one's are merged into."""
        names = self._found.names.pop("_base_")
        line = ast.Pass(lineno=self._found.lines.get("_base_", 0))
        for name in names if isinstance(names, list | tuple) else [names]:
            if not isinstance(name, str) or "::" in name or not self._path:
                self._unread(line, "a _base_ that is no file beside this config")
            elif base := self._base(self._path.parent / name, line):
                self._found.names = _Merge().of(base.names, self._found.names)

    def _assign(self, node: ast.Assign) -> None:
        value = self._value(node.value)
        for target in node.targets:
            self._store(target, value, node)

    def _annotated(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._store(node.target, self._value(node.value), node)

    def _store(self, target: ast.expr, value: Any, node: ast.stmt) -> None:
        if isinstance(target, ast.Name):
            self._set(target.id, value, node)
        elif isinstance(target, ast.Tuple | ast.List) and isinstance(value, TUPLES) and len(value) == len(target.elts):
            for each, part in zip(target.elts, value, strict=True):
                self._store(each, part, node)
        elif isinstance(target, ast.Attribute | ast.Subscript):
            self._store_inside(target, value, node)
        else:
            self._unread(node, f"what is set at {_shown(target)}")
            self._forget(node)

    def _store_inside(self, target: ast.Attribute | ast.Subscript, value: Any, node: ast.stmt) -> None:
        """`model.lora = …`, `train_dataloader['dataset'] = …`: as mmengine's dicts take it."""
        container = self._value(target.value)
        key = target.attr if isinstance(target, ast.Attribute) else self._value(target.slice)
        if isinstance(container, dict) and isinstance(key, str):
            container[key] = value
        elif isinstance(container, list) and isinstance(key, int) and -len(container) <= key < len(container):
            container[key] = value
        else:
            self._unread(node, f"what is set at {_shown(target)}")

    def _augmented(self, node: ast.AugAssign) -> None:
        load = ast.copy_location(ast.BinOp(_loaded(node.target), node.op, node.value), node)
        self._store(node.target, self._value(load), node)

    def _if(self, node: ast.If) -> None:
        test = self._value(node.test)
        if isinstance(test, Unread | Ref):
            self._unread(node, f"which way `if {_shown(node.test)}` goes")
            return self._forget(node)
        return self._statements(node.body if test else node.orelse)

    def _expression(self, node: ast.Expr) -> None:
        """A text alone is a comment; `custom_hooks.append(…)` and `model.update(…)` change what was read."""
        if isinstance(node.value, ast.Constant):
            return
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and self._changed(call, call.func):
            return
        self._unread(node, f"{_shown(call)}, which would have to be run")

    def _changed(self, call: ast.Call, function: ast.Attribute) -> bool:
        container = self._value(function.value)
        arguments = [self._value(each) for each in call.args]
        if isinstance(container, list) and function.attr in ("append", "extend") and len(arguments) == 1:
            added = arguments[0] if function.attr == "extend" else [arguments[0]]
            if isinstance(added, TUPLES) and len(container) + len(added) <= MAX_ITEMS:
                container.extend(added)
                return True
        if isinstance(container, dict) and function.attr == "update" and len(arguments) <= 1:
            first = arguments[0] if arguments else {}
            if isinstance(first, dict):
                container.update(first, **{each.arg: self._value(each.value) for each in call.keywords if each.arg})
                return all(each.arg for each in call.keywords)
        return False

    # expressions

    def _value(self, node: ast.expr) -> Any:
        """The value of an expression, or Unread."""
        self._depth += 1
        try:
            if self._depth > MAX_DEPTH:
                raise _Refused("it is nested too deeply")
            evaluate = getattr(self, f"_{type(node).__name__.lower()}", None)
            if evaluate is None:
                raise _Refused("it would have to be run")
            return evaluate(node)
        except _Refused as error:
            return Unread(node.lineno, f"{_shown(node)}: {error}", self._source)
        except (ArithmeticError, TypeError, ValueError, LookupError) as error:
            return Unread(node.lineno, f"{_shown(node)}: {type(error).__name__}: {str(error)[:80]}", self._source)
        finally:
            self._depth -= 1

    def _bounded(self, value: Any) -> Any:
        """The value, when a config may hold one of its size; all that is made counts together."""
        if isinstance(value, complex):
            raise _Refused("no config holds such a value")
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise _Refused(f"the number is too large ({value.bit_length()} bits)")
        if isinstance(value, str | list | tuple | dict):
            self._made += len(value)
        if isinstance(value, list | tuple | dict) and len(value) > MAX_ITEMS or self._made > MAX_MADE:
            raise _Refused("the text or list is too long")
        return value

    def _known(self, node: ast.expr) -> Any:
        """As `_value`, for what must have one."""
        value = self._value(node)
        if isinstance(value, Unread):
            raise _Refused(value.what if len(value.what) < 120 else "a part of it cannot be read")
        return value

    def _constant(self, node: ast.Constant) -> Any:
        if isinstance(node.value, bytes | complex) or node.value is ...:
            raise _Refused("no config holds such a value")
        return self._bounded(node.value)

    def _name(self, node: ast.Name) -> Any:
        if node.id in self._found.names:
            return self._found.names[node.id]
        raise _Refused("the name is not set")

    def _attribute(self, node: ast.Attribute) -> Any:
        owner = self._known(node.value)
        if isinstance(owner, Ref):
            return Ref(f"{owner.name}.{node.attr}")
        if isinstance(owner, dict) and node.attr in owner:
            return owner[node.attr]
        raise _Refused(f"it has no {node.attr}")

    def _subscript(self, node: ast.Subscript) -> Any:
        owner, key = self._known(node.value), self._known(node.slice)
        if not isinstance(owner, dict | list | tuple) or not isinstance(key, str | int):
            raise _Refused("only dicts and lists are looked into")
        return owner[key]

    def _list(self, node: ast.List) -> Any:
        return self._elements(node.elts)

    def _tuple(self, node: ast.Tuple) -> Any:
        return tuple(self._elements(node.elts))

    def _elements(self, elements: list[ast.expr]) -> list[Any]:
        found: list[Any] = []
        for each in elements:
            if isinstance(each, ast.Starred):
                inner = self._known(each.value)
                if not isinstance(inner, TUPLES):
                    raise _Refused("only a list can be spread out here")
                found.extend(self._bounded(inner))
            else:
                found.append(self._value(each))
        return found

    def _dict(self, node: ast.Dict) -> Any:
        found: dict[Any, Any] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            self._entry(found, None if key is None else self._known(key), value)
        return found

    def _entry(self, found: dict[Any, Any], key: Any, value: ast.expr) -> None:
        """Put one entry into a dict; a key of None spreads another dict out."""
        if key is not None:
            if not isinstance(key, str | int | float | bool):
                raise _Refused("a key must be text or a number")
            found[key] = self._value(value)
            return
        inner = self._known(value)
        if not isinstance(inner, dict):
            raise _Refused("only a dict can be spread out here")
        found.update(self._bounded(inner))

    def _call(self, node: ast.Call) -> Any:
        name = node.func.id if isinstance(node.func, ast.Name) and node.func.id not in self._found.names else ""
        if name == "dict" and len(node.args) <= 1:
            first = self._known(node.args[0]) if node.args else {}
            found = dict(self._bounded(first)) if isinstance(first, dict) else {}
            for each in node.keywords:
                self._entry(found, each.arg, each.value)
            return found
        if name in FUNCTIONS and not node.keywords:
            arguments = [self._known(each) for each in node.args]
            if not all(_is_flat(each) for each in arguments):
                raise _Refused("it is not arithmetic on what can be read")
            return self._bounded(FUNCTIONS[name](*arguments))
        raise _Refused("a call, which would have to be run")

    def _binop(self, node: ast.BinOp) -> Any:
        left, right = self._known(node.left), self._known(node.right)
        operate = OPERATORS.get(type(node.op))
        if operate is None:
            raise _Refused("this arithmetic is not done here")
        return self._bounded(operate(left, right))

    def _unaryop(self, node: ast.UnaryOp) -> Any:
        value = self._known(node.operand)
        if isinstance(node.op, ast.Not):
            return not _plain(value)
        if not isinstance(value, int | float) or isinstance(node.op, ast.Invert):
            raise _Refused("this arithmetic is not done here")
        return -value if isinstance(node.op, ast.USub) else +value

    def _boolop(self, node: ast.BoolOp) -> Any:
        wants = isinstance(node.op, ast.Or)
        value: Any = None
        for each in node.values:
            value = _plain(self._known(each))
            if bool(value) == wants:
                return value
        return value

    def _compare(self, node: ast.Compare) -> Any:
        left = self._known(node.left)
        for kind, each in zip(node.ops, node.comparators, strict=True):
            right = self._known(each)
            compare = COMPARISONS.get(type(kind))
            if compare is None:
                raise _Refused("this comparison is not made here")
            if not (_is_flat(left) and _is_flat(right)):
                raise _Refused("only numbers, texts and names are compared")
            if not compare(left, right):
                return False
            left = right
        return True

    def _ifexp(self, node: ast.IfExp) -> Any:
        return self._value(node.body if _plain(self._known(node.test)) else node.orelse)

    def _joinedstr(self, node: ast.JoinedStr) -> Any:
        text = ""
        for part in node.values:
            simple = isinstance(part, ast.FormattedValue) and part.format_spec is None and part.conversion == -1
            value = self._known(part.value if simple else part)  # type: ignore[attr-defined]
            if not isinstance(value, str | int | float):
                raise _Refused("only texts and numbers are put into a text")
            text = self._bounded(text + str(value))
        return text


def require_finite(names: dict[str, Any], source: str) -> None:
    """No value in itself, and none that stands for more values or levels than a walk through it may meet.

    Raises ConfigError.
    """
    known: dict[int, tuple[int, int]] = {}

    def measured(value: Any, above: int) -> tuple[int, int]:
        """Values and levels in a value; what is shared counts each time, and is gone through once."""
        if not isinstance(value, dict | list | tuple):
            return 1, 0
        if id(value) not in known:
            if above > MAX_DEPTH:  # a value in itself gets here
                raise _problem(source, f"holds a value in itself, or more than {MAX_DEPTH} deep")
            inner = [measured(each, above + 1) for each in (value.values() if isinstance(value, dict) else value)]
            known[id(value)] = 1 + sum(count for count, _ in inner), 1 + max((level for _, level in inner), default=0)
        return known[id(value)]

    for value in names.values():
        count, levels = measured(value, 0)
        if count > MAX_MADE or levels > MAX_DEPTH:
            raise _problem(source, "stands for more values or levels than any config has")


def _is_flat(value: Any) -> bool:
    """Whether a value holds no others, or is a list of such: what is nested may stand for more than memory holds."""
    if isinstance(value, TUPLES):
        return all(isinstance(each, (*SCALARS, Ref)) for each in value)
    return isinstance(value, (*SCALARS, Ref))


def _plain(value: Any) -> Any:
    if isinstance(value, Ref):
        raise _Refused("whether an imported thing is true is not known")
    return value


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1 and exponent > 0:
        if base.bit_length() * exponent > 4 * MAX_BITS:
            raise _Refused("the number is too large")
    return _number(base) ** _number(exponent)


def _times(left: Any, right: Any) -> Any:
    for many, times in ((left, right), (right, left)):
        if isinstance(many, str | list | tuple):
            limit = MAX_BYTES if isinstance(many, str) else MAX_ITEMS
            if not isinstance(times, int) or len(many) * times > limit:
                raise _Refused("it repeats too much")
            return many * times
    return _number(left) * _number(right)


def _plus(left: Any, right: Any) -> Any:
    if type(left) is type(right) and isinstance(left, str | list | tuple):
        return left + right
    return _number(left) + _number(right)


def _number(value: Any) -> Any:
    if not isinstance(value, int | float):
        raise _Refused("it is no arithmetic on numbers")
    return value


def _numeric(operate: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda left, right: operate(_number(left), _number(right))


def _text(value: Any = "") -> str:
    """Of one value: a list of a text that is shared may be longer than memory."""
    if not isinstance(value, SCALARS):
        raise _Refused("only texts and numbers are made a text")
    return str(value)


def _rounded(value: Any, places: Any = None) -> Any:
    """Places bounded: Python works out ten to the power of as many as are asked for."""
    if places is not None and abs(_number(places)) > MAX_BITS:
        raise _Refused("it is rounded to too many places")
    return round(_number(value), places)


def _join(*parts: Any) -> str:
    return "/".join(str(part).rstrip("/") for part in parts)


OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: _plus, ast.Sub: _numeric(operator.sub), ast.Mult: _times, ast.Div: _numeric(operator.truediv),
    ast.FloorDiv: _numeric(operator.floordiv), ast.Mod: _numeric(operator.mod), ast.Pow: _power,
}  # fmt: skip
COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: _numeric(operator.lt), ast.LtE: _numeric(operator.le),
    ast.Gt: _numeric(operator.gt), ast.GtE: _numeric(operator.ge), ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda left, right: left in right, ast.NotIn: lambda left, right: left not in right,
}  # fmt: skip
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "int": int, "float": float, "str": _text, "bool": lambda value=False: bool(_plain(value)), "len": len, "min": min,
    "max": max, "round": _rounded, "abs": abs, "list": list, "tuple": tuple,
}  # fmt: skip


def _loaded(node: ast.expr) -> ast.expr:
    """The target of `+=` as an expression."""
    found = ast.parse(ast.unparse(node), mode="eval").body
    return ast.copy_location(found, node) if not isinstance(found, ast.Name) else ast.Name(found.id, lineno=node.lineno)


class _Merge:
    """mmengine's merge: dicts into dicts, all else replaces; `_delete_=True` replaces too.

    What is shared is gone through each time, so the work is counted.
    """

    def __init__(self) -> None:
        self._done = 0

    def of(self, base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        self._done += 1 + len(own)
        if self._done > MAX_ITEMS:
            raise _problem("_base_", "stands for more settings than any config has")
        result = dict(base)
        for key, value in own.items():
            before = result.get(key)
            if isinstance(before, dict) and isinstance(value, dict) and not value.get("_delete_"):
                result[key] = self.of(before, value)
            else:
                result[key] = {k: v for k, v in value.items() if k != "_delete_"} if isinstance(value, dict) else value
        return result


def _name_of(node: ast.AST) -> str:
    words = {
        ast.FunctionDef: "a function", ast.AsyncFunctionDef: "a function", ast.ClassDef: "a class", ast.For: "a loop",
        ast.While: "a loop", ast.Try: "a try block", ast.Delete: "a deletion", ast.Global: "a global statement",
    }  # fmt: skip
    return f"{words.get(type(node), 'a ' + type(node).__name__.lower())}, which would have to be run"


def _shown(node: ast.AST) -> str:
    """The source of an expression, shortened. Deep ones are not spelt out."""
    try:
        text = " ".join(ast.unparse(node).split())
    except (RecursionError, ValueError):
        return "an expression"
    return text if len(text) <= 60 else f"{text[:57]}…"
