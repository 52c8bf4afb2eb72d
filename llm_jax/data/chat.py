"""Conversations as ids, with a mask over what the assistant wrote."""

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers as hf

from llm_jax.base.errors import UserError
from llm_jax.data.templating import Message, Span, assistant_spans, load_template, refuse_lost, render_marked
from llm_jax.data.tokenizers import TURN_START, Tokenizer

Tools = Sequence[Mapping[str, Any]]


def with_template(tokenizer: Tokenizer, name: str | None) -> Tokenizer:
    """The tokenizer with the template that `data.chat_template` names.

    Args:
      tokenizer: a tokenizer.
      name: built-in name or file; None keeps the tokenizer's own, or takes chatml where it has none.

    Raises:
      UserError: None was given, the tokenizer has no template, and chatml's tokens are not in its vocabulary.
    """
    if name is not None:
        return tokenizer.with_chat_template(load_template(name))
    if tokenizer.chat_template is not None:
        return tokenizer
    if tokenizer.backend.token_to_id(TURN_START) is None:
        raise UserError(
            "the tokenizer has no chat template and no chatml tokens: give --config.data.chat_template=plain or a file"
        )
    return tokenizer.with_chat_template(load_template("chatml"))


def render_text(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Tools = ()
) -> str:
    """The text a conversation is encoded from (special tokens written out).

    Raises:
      UserError: the tokenizer has no template, or it refuses the messages or leaves out tools, calls or their results.
    """
    template, variables = _template(tokenizer)
    refuse_lost(template, messages, variables, tools)
    return render_marked(template, messages, variables, add_generation_prompt, tools)[0]


def render_with_spans(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools = (), learned: Sequence[bool] = ()
) -> tuple[str, list[Span]]:
    """`assistant_spans` with the tokenizer's template and special tokens."""
    template, variables = _template(tokenizer)
    return assistant_spans(template, messages, variables, tokenizer.special_texts, tools, learned)


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    tools: Tools = (),
    learned: Sequence[bool] = (),
) -> tuple[list[int], list[int]]:
    """Ids of a conversation and a mask: 1 for what the assistant wrote, the end-of-turn token included.

    Args:
      tokenizer: with a chat template.
      messages: dicts with `role` and `content`.
      add_generation_prompt: for decoding: ends with the opening of the assistant's turn; the mask is then all zeros.
      tools: JSON schemas of functions, for the template.
      learned: which of the assistant's turns are in the mask; all where it is empty.

    Raises:
      UserError: there is no template, it refuses the messages or leaves out tools, calls or their results, or no token
        would be in the mask.
    """
    if add_generation_prompt:
        ids = tokenizer.encode(render_text(tokenizer, messages, add_generation_prompt=True, tools=tools))
        return ids, [0] * len(ids)
    text, spans = render_with_spans(tokenizer, messages, tools, learned)
    encoding = tokenizer.encode_batch([text])[0]
    return encoding.ids, span_mask(encoding, spans)


def span_mask(encoding: hf.Encoding, spans: Sequence[Span]) -> list[int]:
    """1 for each token that starts inside one of the (sorted) character spans."""
    mask, index = [], 0
    for start, _ in encoding.offsets:
        while index < len(spans) and spans[index][1] <= start:
            index += 1
        mask.append(int(index < len(spans) and spans[index][0] <= start))
    return mask


def _template(tokenizer: Tokenizer) -> tuple[str, dict[str, str | None]]:
    if tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template: give --config.data.chat_template")
    return tokenizer.chat_template, tokenizer.template_variables
