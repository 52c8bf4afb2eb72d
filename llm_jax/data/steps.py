"""An answer as its steps, and which of them say something false.

A step is a line, closed by its line breaks; in a text of one line it is a sentence, opened by the space before it.
Joined, the steps are the text again, to the character.
"""

import ast
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

PIECE = re.compile(r"[^\n]*\n|[^\n]+")
SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s)")
# GSM8K writes each calculation as `<<48/2=24>>`, before its result.
MARK = re.compile(r"<<([^<>]*)>>")
ARITHMETIC = re.compile(r"[\d\s.+\-*/%()]{1,200}")
STATED = re.compile(r"-?(?:\d+(?:\.(\d*))?|\.(\d+))")
_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: lambda a, b: a % b,
}


def split_steps(text: str) -> list[str]:
    """The steps of a text in order; `"".join` gives it back. None of a text without a word."""
    if not text.strip():
        return []
    pieces = PIECE.findall(text) if "\n" in text.strip() else SENTENCE_END.split(text)
    steps: list[str] = []
    for piece in pieces:
        if steps and (not piece.strip() or not steps[-1].strip()):
            steps[-1] += piece
        else:
            steps.append(piece)
    return steps


def marked_equations(step: str) -> list[tuple[str, str]]:
    """GSM8K's marks of a step, as (expression, result): `<<48/2=24>>` is ("48/2", "24"). One without an equals sign
    has an empty result."""
    found = []
    for inner in MARK.findall(step):
        left, _, right = inner.rpartition("=")
        found.append((left.strip(), right.strip()) if left else (right.strip(), ""))
    return found


def is_true(expression: str, result: str) -> bool | None:
    """Whether an expression has a stated value, as exact fractions; None where either cannot be read.

    What is stated may be rounded, or after a decimal point cut off: 2/3 is 0.67 and 0.66, 5/2 is 3 and not 2.
    """
    value, stated = evaluate(expression), evaluate(result)
    if value is None or stated is None:
        return None
    if value == stated:
        return True
    written = STATED.fullmatch(result)
    if written is None:
        return False
    decimals = len(written[1] or written[2] or "")
    unit = Fraction(1, 10**decimals)
    rounded = -unit / 2 < value - stated < unit / 2 or stated - value == unit / 2
    return rounded or (decimals > 0 and abs(value - stated) < unit)


def evaluate(expression: str) -> Fraction | None:
    """The value of sums, products, quotients and parentheses of numbers (`1,000`, `.5`, `20%`, `$3`); else None."""
    text = re.sub(r"(?<=\d),(?=\d{3})|\$", "", expression).strip()
    text = re.sub(r"(\d+(?:\.\d*)?|\.\d+)\s*%(?!\s*[\d(.])", r"(\1/100)", text)
    # `010` is a number to people, and an error to Python.
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text).replace("×", "*").replace("÷", "/")
    if not ARITHMETIC.fullmatch(text):
        return None
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(ast.unparse(node))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"not arithmetic: {ast.unparse(node)}")


def first_false_mark(steps: Sequence[str]) -> int | None:
    """The first step with a mark that is not true; None where all that can be read are true."""
    for number, step in enumerate(steps):
        if any(is_true(*equation) is False for equation in marked_equations(step)):
            return number
    return None


def shared_steps(one: Sequence[str], other: Sequence[str]) -> int:
    """How many steps two answers begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
