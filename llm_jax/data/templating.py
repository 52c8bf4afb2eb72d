"""Chat templates as text: Jinja in a sandbox, and which characters of the result the assistant wrote."""

import datetime
import functools
import importlib.resources
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from llm_jax.base.errors import UserError
from llm_jax.storage.remote import to_path

Message = Mapping[str, Any]
Span = tuple[int, int]
# Roles under which templates expect what a tool gave.
TOOL_ROLES = ("tool", "ipython")

# Marks that no message can contain: they are drawn anew in each process and never reach the result.
_BEGIN, _END = (f"\x00{secrets.token_hex(8)}{side}\x00" for side in "be")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: what stands inside was written by the assistant."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        return f"{_BEGIN}{caller()}{_END}"


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    # The settings, globals and filters that transformers gives its templates, which they rely on.
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return env.from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(f"chat template: {error} (line {getattr(error, 'lineno', '?')})") from None


def load_template(name: str) -> str:
    """The text of a built-in template (`chatml`, `chatml_tools`, `plain`) or of a Jinja file.

    Raises:
      UserError: it is neither, or is not a template.
    """
    builtin = importlib.resources.files("llm_jax.data") / "templates" / f"{name}.jinja"
    if "/" not in name and builtin.is_file():
        text = builtin.read_text()
    elif (file := to_path(name, f"data.chat_template={name}")).is_file():
        text = file.read_text()
    else:
        raise UserError(
            f"data.chat_template: {name!r} is neither a built-in template (chatml, chatml_tools, plain) nor a file"
        )
    _compile(text)
    return text


def render_marked(
    template: str,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[str, list[Span]]:
    """Renders messages; also the character spans inside `{% generation %}`, none for templates without it.

    Args:
      template: Jinja text.
      messages: dicts with `role` and `content`.
      variables: further names the template may use, such as `bos_token` and `eos_token`.
      add_generation_prompt: whether to end with the opening of an assistant's turn.
      tools: JSON schemas of functions.

    Raises:
      UserError: the template refuses the messages or does what the sandbox forbids.
    """
    # As transformers: no tools are None, which templates ask for.
    given = {"tools": [dict(tool) for tool in tools] or None, "documents": None, **variables}
    try:
        marked = _compile(template).render(
            messages=[dict(m) for m in messages], add_generation_prompt=add_generation_prompt, **given
        )
    except (jinja2.TemplateError, TypeError, KeyError, OverflowError) as error:
        raise UserError(f"chat template: {error}") from None
    text, spans = "", []
    for piece in marked.split(_BEGIN):
        inside, mark, after = piece.partition(_END)
        if mark:
            spans.append((len(text), len(text) + len(inside)))
        text += inside + after
    return text, spans


def assistant_spans(
    template: str,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    specials: Sequence[str] = (),
    tools: Sequence[Mapping[str, Any]] = (),
    learned: Sequence[bool] = (),
) -> tuple[str, list[Span]]:
    """Renders a conversation; also the character spans that the assistant wrote, each turn's end token included.

    Spans come from `{% generation %}` or, for templates without it, from rendering each prefix of the conversation:
    a turn is what follows the prefix that opens it. Layout after a turn's end token (`specials`) is not in it.

    Args:
      template, messages, variables, tools: as for `render_marked`.
      specials: texts of special tokens.
      learned: which of the assistant's turns the spans are of; all where it is empty.

    Raises:
      UserError: as `refuse_lost`; the template has no `{% generation %}` and renders a prefix otherwise than the whole;
        its `{% generation %}` do not tell turns apart of which some are not learned; or no span holds anything.
    """
    refuse_lost(template, messages, variables, tools)
    text, spans = render_marked(template, messages, variables, tools=tools)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not spans:
        for index in turns:
            opened, _ = render_marked(template, messages[:index], variables, add_generation_prompt=True, tools=tools)
            closed, _ = render_marked(template, messages[: index + 1], variables, tools=tools)
            if not (text.startswith(closed) and closed.startswith(opened)):
                raise UserError(
                    f"chat template: it renders the first {index + 1} messages of a conversation otherwise than in"
                    " the whole, so the assistant's tokens cannot be told; mark them with {% generation %}"
                )
            spans.append((len(opened), len(opened) + _turn_length(closed[len(opened) :], specials)))
    if learned:
        if len(spans) != len(turns):
            raise UserError(
                f"chat template: it marks {len(spans)} stretches of {len(turns)} turns with {{% generation %}}, so"
                " turns that are not learned (`train`, `weight`) cannot be told from the others"
            )
        spans = [span for span, wanted in zip(spans, learned, strict=True) if wanted]
    if not any(end > start for start, end in spans):
        raise UserError("chat template: no token of this conversation is the assistant's (an all-zero loss mask)")
    return text, spans


def refuse_lost(
    template: str, messages: Sequence[Message], variables: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Raises UserError where a template leaves out tools, calls of tools, or what a tool gave: where without them it
    renders the very same."""
    calling = [index for index, message in enumerate(messages) if message.get("tool_calls")]
    answering = [index for index, message in enumerate(messages) if message["role"] in TOOL_ROLES]
    if not (tools or calling or answering):
        return
    whole, _ = render_marked(template, messages, variables, tools=tools)

    def lost(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> bool:
        try:
            return render_marked(template, messages, variables, tools=tools)[0] == whole
        except UserError:  # it cannot do without
            return False

    if tools and lost(messages, ()):
        raise UserError("chat template: it leaves out `tools`; chatml_tools shows them")
    for indices, name, without in ((calling, "`tool_calls`", {"tool_calls": []}), (answering, "text", {"content": ""})):
        for index in indices:
            changed = {**messages[index], **without}
            if changed != messages[index] and lost([*messages[:index], changed, *messages[index + 1 :]], tools):
                role = messages[index]["role"]
                raise UserError(f"chat template: it leaves out the {name} of a turn of role {role}")


def _turn_length(turn: str, specials: Sequence[str]) -> int:
    bare = turn.rstrip()
    return len(bare) if any(bare.endswith(special) for special in specials) else len(turn)
