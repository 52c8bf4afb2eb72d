"""Jinja for chat templates from anywhere: no way out of the sandbox, and an end.

The settings, globals and filters are those that transformers gives its templates, which they rely on. What differs: an
attribute that the sandbox forbids is an error, not an empty string, and loops, calls of macros and products are counted
or limited, since a template that never ends would hold up a run before it says anything.
"""

import datetime
import functools
import json
import secrets
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from jinja2.exceptions import SecurityError

from llm_jax.base.errors import UserError

# Turns of all loops, and calls of macros, in one rendering; a thousand messages of two hundred parts have fewer.
MOST_TURNS = 250_000
MOST_CHARACTERS = 100_000_000

# Marks that no message can contain: they are drawn anew in each process and never reach the result.
BEGIN, END = (f"\x00{secrets.token_hex(8)}{side}\x00" for side in "be")

_COUNT = "_count_turns"


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: what stands inside was written by the assistant."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        return f"{BEGIN}{caller()}{END}"


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**"])

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} is unsafe")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right)]
        if operator == "**" and max(sizes) > 1000:
            raise SecurityError("a power of or to more than 1000")
        if any(hasattr(x, "__len__") for x in (left, right)) and sizes[0] * sizes[1] > MOST_CHARACTERS:
            raise SecurityError(f"a text or list repeated to more than {MOST_CHARACTERS} items")
        return super().call_binop(context, operator, left, right)


class _Turns:
    """What every loop and macro of a rendering calls."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1
        if self.count > MOST_TURNS:
            raise SecurityError(f"its loops and macros take more than {MOST_TURNS} turns")


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=64)
def compile_template(text: str) -> jinja2.Template:
    """The template. Raises UserError where the text is none."""
    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    env.filters["tojson"] = _tojson
    del env.globals["lipsum"]  # as much made-up text as is asked for
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        parsed = env.parse(text)
        for node in parsed.find_all((jinja2.nodes.For, jinja2.nodes.Macro, jinja2.nodes.CallBlock)):
            call = jinja2.nodes.Call(jinja2.nodes.Name(_COUNT, "load"), [], [], None, None)
            counting = jinja2.nodes.ExprStmt(call).set_lineno(node.lineno).set_environment(env)
            node.body.insert(0, counting)
        return env.from_string(parsed)
    except Exception as error:  # of Jinja, or of Python's compiler for what Jinja lets through
        line = getattr(error, "lineno", None) or "?"
        raise UserError(f"chat template: {_one_line(error)} (line {line})") from None


def run_template(text: str, **variables: Any) -> str:
    """The template's output. Raises UserError for whatever goes wrong in it, its never ending included."""
    try:
        return compile_template(text).render(**variables, **{_COUNT: _Turns()})
    except UserError:
        raise
    except Exception as error:  # any code may stand in a template
        raise UserError(f"chat template: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    said = " ".join(str(error).split())
    return said if isinstance(error, jinja2.TemplateError) and said else f"{type(error).__name__}: {said}"
