"""Sums and equations from a model's text, worked out by sympy in a process of its own that the kernel stops in time.

The text is never evaluated: Python's parser reads it, and only the nodes and names listed here become sympy objects.
Run as a program it answers the one JSON request on its input. It imports nothing of the studio, so it starts quickly.
"""

import ast
import json
import re
import resource
import sys
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import sympy

MAX_CHARACTERS = 1000
MAX_DEPTH = 40
MAX_EXPONENT = 10_000
MAX_BITS = 20_000  # of a whole number, some 6,000 digits
MAX_FACTORIAL = 1000
MAX_EQUATIONS = 6
MAX_SECONDS = 5
MAX_MEMORY_BYTES = 1 << 30
SHOWN_DIGITS = 10
MAX_SHOWN_DIGITS = 60  # of a whole number, before it is rounded

SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "**", "√": "sqrt", "π": "pi"})
NUMBER = re.compile(r"(?<![\w.])(\d+\.?\d*|\.\d+)(?![eE][+-]?\d)\s*(?=[A-Za-z(])")
PERCENT = re.compile(r"(\d)\s*%(?!\s*[\w(.])")
CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "E": sympy.E}
FIRST_UNKNOWNS = ("x", "y", "z")
UNKNOWN = re.compile(r"[A-Za-z][A-Za-z_]{0,15}\d{0,3}")
# How sympy gives up; NotImplementedError is what it raises for equations that it has no method for.
UNSOLVED = (ArithmeticError, ValueError, TypeError, NotImplementedError, RecursionError, MemoryError)


class NoSum(Exception):
    """The text is nothing that is worked out here; the message says why."""


def calculate(text: str, decimals: int | None = None) -> str:
    """The values of expressions with ; between them. `decimals` rounds each to so many places, as MOSS writes them."""
    values = [_Reader().read(part) for part in _parts(text, ";")]
    for value in values:
        if not value.is_number or value.is_finite is False or value.has(sympy.zoo, sympy.nan):
            raise NoSum("the result is no finite number")
    return "; ".join(_shown(value, decimals) for value in values)


def solve(text: str) -> str:
    """The solutions of equations with ; or , between them, one set of values after the other."""
    reader = _Reader(unknowns=True)
    equations = [_equation(reader, part) for part in _parts(text, ";,\n")]
    if len(equations) > MAX_EQUATIONS:
        raise NoSum(f"there are {len(equations)} equations; {MAX_EQUATIONS} are allowed")
    if not reader.symbols:
        raise NoSum("there is no unknown in it")
    if not (said := [equation for equation in equations if equation != 0]):
        return "true for every value"
    unknowns = sorted(reader.symbols.values(), key=lambda each: (each.name not in FIRST_UNKNOWNS, each.name))
    unknowns = unknowns[: len(said)]  # the others stay letters
    # A list of one is solved by other methods than the equation itself, which know less.
    found = sympy.solve(said[0] if len(said) == 1 else said, unknowns, dict=True)
    return "; ".join(dict.fromkeys(_solution(each) for each in found)) or "no solution"


def _parts(text: str, separators: str) -> list[str]:
    """Pieces between separators that stand in no brackets."""
    text = unicodedata.normalize("NFKC", text).translate(SIGNS).strip().rstrip("=?").strip()
    if len(text) > MAX_CHARACTERS:
        raise NoSum(f"it has {len(text)} characters; {MAX_CHARACTERS} are allowed")
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter in separators and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if not (parts := [part.strip() for part in parts if part.strip()]):
        raise NoSum("it is empty")
    return parts


def _equation(reader: "_Reader", text: str) -> Any:
    left, *right = text.replace("==", "=").split("=")
    if len(right) > 1:
        raise NoSum("an equation has one =")
    return reader.read(left) - (reader.read(right[0]) if right else 0)


class _Reader:
    """Text to sympy objects. With `unknowns`, names that mean nothing else become symbols."""

    def __init__(self, unknowns: bool = False) -> None:
        self.symbols: dict[str, sympy.Symbol] = {}
        self._unknowns = unknowns

    def read(self, text: str) -> Any:
        text = PERCENT.sub(r"\1/100", text)
        text = re.sub(r"\)\s*(?=[A-Za-z0-9(])", ")*", NUMBER.sub(r"\1*", text))
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise NoSum("it cannot be read as arithmetic") from None
        return self._value(tree.body, MAX_DEPTH)

    def _value(self, node: ast.expr, depth: int) -> Any:
        if depth == 0:
            raise NoSum("it is nested too deeply")
        match node:
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                return _number(value)
            case ast.Name(id=name):
                return self._name(name)
            case ast.UnaryOp(op=ast.UAdd() | ast.USub() as sign, operand=operand):
                value = self._value(operand, depth - 1)
                return -value if isinstance(sign, ast.USub) else value
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in OPERATORS:
                return OPERATORS[type(operator)](self._value(left, depth - 1), self._value(right, depth - 1))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
                return _call(name, [self._value(each, depth - 1) for each in args])
        raise NoSum(f"{_quoted(node)} is not allowed; there are numbers, + - * / ** %, and {', '.join(FUNCTIONS)}")

    def _name(self, name: str) -> Any:
        if name in CONSTANTS:
            return CONSTANTS[name]
        if not self._unknowns or not UNKNOWN.fullmatch(name):
            raise NoSum(f"{name[:20]!r} has no value")
        return self.symbols.setdefault(name, sympy.Symbol(name))


def _number(value: int | float) -> Any:
    if isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise NoSum("a number is too large")
        return sympy.Integer(value)
    if value in (float("inf"), float("-inf")):
        raise NoSum("a number is too large")
    exact = Fraction(repr(value))
    return sympy.Rational(exact.numerator, exact.denominator)


def _bits(value: Any) -> int:
    """Size of a rational number in bits; 0 of anything else, which stays a formula."""
    return max(int(value.p).bit_length(), int(value.q).bit_length()) if value.is_Rational else 0


def _times(left: Any, right: Any) -> Any:
    if _bits(left) + _bits(right) > MAX_BITS:
        raise NoSum("a number is too large")
    return left * right


def _divide(left: Any, right: Any) -> Any:
    if right.is_zero:
        raise NoSum("it divides by zero")
    return left / right


def _power(base: Any, exponent: Any) -> Any:
    if exponent.is_number:
        size = abs(exponent)
        if not (size <= MAX_EXPONENT) or _bits(base) * size > MAX_BITS or (base.free_symbols and size > 50):
            raise NoSum("a power is too large")
        if base.is_zero and exponent.is_negative:
            raise NoSum("it divides by zero")
    return base**exponent


def _modulo(left: Any, right: Any) -> Any:
    if right.is_zero:
        raise NoSum("it divides by zero")
    return sympy.Mod(left, right)


def _factorial(value: Any) -> Any:
    if not value.is_Integer or not 0 <= value <= MAX_FACTORIAL:
        raise NoSum(f"a factorial is that of a whole number up to {MAX_FACTORIAL}")
    return sympy.factorial(value)


def _log(value: Any, base: Any = sympy.E) -> Any:
    if value.is_zero or base in (0, 1):
        raise NoSum("it takes a logarithm that there is not")
    return sympy.log(value, base)


def _integers(function: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*values: Any) -> Any:
        if not all(value.is_Integer for value in values):
            raise NoSum("it wants whole numbers")
        return function(list(values))

    return checked


def _round(value: Any, places: Any = sympy.S.Zero) -> Any:
    if not value.is_number or not places.is_Integer or abs(places) > SHOWN_DIGITS:
        raise NoSum("it cannot be rounded so")
    shift = sympy.Integer(10) ** places
    return sympy.floor(value * shift + sympy.Rational(1, 2)) / shift


OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda left, right: left + right,
    ast.Sub: lambda left, right: left - right,
    ast.Mult: _times,
    ast.Div: _divide,
    ast.FloorDiv: lambda left, right: sympy.floor(_divide(left, right)),
    ast.Mod: _modulo,
    ast.Pow: _power,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sqrt": sympy.sqrt, "cbrt": lambda value: sympy.real_root(value, 3), "abs": sympy.Abs,
    "exp": lambda value: _power(sympy.E, value), "log": _log, "ln": lambda value: _log(value),
    "log10": lambda value: _log(value, sympy.Integer(10)), "log2": lambda value: _log(value, sympy.Integer(2)),
    "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "asin": sympy.asin, "acos": sympy.acos, "atan": sympy.atan,
    "floor": sympy.floor, "ceil": sympy.ceiling, "round": _round, "factorial": _factorial, "min": sympy.Min,
    "max": sympy.Max, "gcd": _integers(sympy.gcd_list), "lcm": _integers(sympy.lcm_list),
}  # fmt: skip


def _call(name: str, values: Sequence[Any]) -> Any:
    try:
        return FUNCTIONS[name](*values)
    except TypeError:
        raise NoSum(f"{name} was given {len(values)} numbers, or ones that it does not take") from None


def _shown(value: Any, decimals: int | None = None) -> str:
    """A number as a person writes it: whole ones in full, others rounded."""
    if decimals is not None:
        return f"{_round(value, sympy.Integer(decimals)).evalf(MAX_SHOWN_DIGITS):.{decimals}f}"
    if value.is_Integer and _bits(value) < 3 * MAX_SHOWN_DIGITS:
        return str(value)
    return _trimmed(str(value.evalf(SHOWN_DIGITS)))


def _trimmed(number: str) -> str:
    """2.500000000 as 2.5, in each part of a complex number."""
    return re.sub(r"\.(\d*?)0*(?=\D|$)", lambda found: f".{found[1]}" if found[1] else "", number)


def _solution(values: dict[Any, Any]) -> str:
    return ", ".join(f"{symbol} = {_exact(value)}" for symbol, value in values.items())


def _exact(value: Any) -> str:
    if value.is_Integer or not value.is_number:
        return str(value)
    rounded, exact = _shown(value), str(value)
    is_plain = len(exact) <= 40 and not value.has(sympy.CRootOf) and exact.replace("I", "1*I") != rounded
    return f"{exact} ≈ {rounded}" if is_plain else rounded


def _quoted(node: ast.expr) -> str:
    return repr(ast.unparse(node)[:40])


def main() -> None:
    """One JSON request, one JSON answer. The kernel ends this process when its time or memory is over."""
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
    if sys.platform == "linux":  # elsewhere the kernel does not enforce RLIMIT_AS
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    request = json.loads(sys.stdin.read())
    work = {"calculate": calculate, "solve": solve}[request.pop("tool")]
    try:
        answer = {"result": work(**request)}
    except NoSum as error:
        answer = {"error": str(error)}
    except UNSOLVED as error:
        answer = {"error": f"sympy cannot work it out ({type(error).__name__})"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
