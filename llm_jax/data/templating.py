"""Chat templates as text: Jinja in a sandbox, and which characters of the result the assistant wrote."""

import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.base.errors import UserError
from llm_jax.data.sandbox import BEGIN, END, compile_template, run_template
from llm_jax.storage.pointers import refuse_pointer
from llm_jax.storage.remote import to_path

Message = Mapping[str, Any]
Span = tuple[int, int]
# Roles under which templates expect what a tool gave.
TOOL_ROLES = ("tool", "ipython")

# Templates that are known to show an answer.
_SHOWING: set[str] = set()


def load_template(name: str) -> str:
    """The text of a built-in template (`chatml`, `chatml_tools`, `plain`) or of a Jinja file.

    Raises:
      UserError: it is neither, or is not a template.
    """
    builtin = importlib.resources.files("llm_jax.data") / "templates" / f"{name}.jinja"
    if "/" not in name and builtin.is_file():
        text = builtin.read_text()
    elif (file := to_path(name, f"data.chat_template={name}")).is_file():
        content = file.read_bytes()
        refuse_pointer(file, content)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"data.chat_template: {name} is not UTF-8 (byte {error.start})") from None
    else:
        raise UserError(
            f"data.chat_template: {name!r} is neither a built-in template (chatml, chatml_tools, plain) nor a file"
        )
    compile_template(text)
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
    marked = run_template(
        template, messages=[dict(m) for m in messages], add_generation_prompt=add_generation_prompt, **given
    )
    text, spans = "", []
    for piece in marked.split(BEGIN):
        inside, mark, after = piece.partition(END)
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
    _refuse_hiding(template, messages, variables, text, tools)
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


def _refuse_hiding(
    template: str,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    text: str,
    tools: Sequence[Mapping[str, Any]],
) -> None:
    """Raises UserError where another last answer gives the same text. Asked once per template."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if template in _SHOWING or last is None or not isinstance(messages[last].get("content"), str):
        return
    other = {**messages[last], "content": f"{messages[last]['content']} otherwise"}
    if render_marked(template, [*messages[:last], other, *messages[last + 1 :]], variables, tools=tools)[0] == text:
        raise UserError("chat template: it leaves out the assistant's answer (an all-zero loss mask)")
    _SHOWING.add(template)


def _turn_length(turn: str, specials: Sequence[str]) -> int:
    bare = turn.rstrip()
    return len(bare) if any(bare.endswith(special) for special in specials) else len(turn)
