"""Turns of conversations as records spell them: messages, sharegpt, alpaca's history, tools, and which are learned.

A turn becomes a message `{"role", "content", ...}` as transformers gives it to templates. Where its record says whether
it is learned (`train` true or false, `weight` 1 or 0, as in axolotl and in OpenAI's fine-tuning), it keeps that as
`train`; `split_flags` takes it off.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from llm_jax.base.errors import UserError

Message = Mapping[str, Any]
Messages = tuple[Message, ...]
Tools = tuple[Mapping[str, Any], ...]

# As LLaMA-Factory and its data sets name them; `function_call` is the assistant's too, and is read apart.
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
CALL = "function_call"
UNREAD_IN_MESSAGE = ("function_call", "reasoning_content", "thinking")
FLAGS = ("train", "weight")
EMPTY = (None, "", [], {}, "[]", "{}")


def read_messages(value: Any, name: str, where: str) -> Messages:
    """A list of `{"role", "content"}`. Raises UserError, beginning with `where`, for anything else."""
    return _each(value, name, where, "messages", read_message)


def read_message(turn: Any, name: str, where: str) -> Message:
    """A message, without its null fields (as transformers takes them) and its parts of text joined."""
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise UserError(f"{where}: `{name}` has to be an object with `role` and `content`")
    _refuse_unread(turn, name, where)
    role, content = turn["role"], turn.get("content")
    if role == "function":
        raise UserError(f"{where}: `{name}.role` is 'function': write what a tool gave as role 'tool'")
    if isinstance(content, list):  # OpenAI's list of parts
        kinds = {part.get("type") if isinstance(part, dict) else None for part in content}
        if kinds - {"text"} or not all(isinstance(part.get("text"), str) for part in content):
            raise UserError(f"{where}: `{name}` has parts that are not text")
        content = "".join(part["text"] for part in content)
    message = {key: field for key, field in turn.items() if field is not None and key not in FLAGS}
    calls = _calls(turn, name, where)
    if isinstance(content, str):
        message["content"] = content
    elif content is not None or not calls:
        raise UserError(f"{where}: `{name}` has no `content`")
    return _flagged(message, turn, name, where)


def read_sharegpt(value: Any, name: str, where: str) -> Messages:
    """A list of `{"from", "value"}` as messages. Raises UserError, beginning with `where`, for anything else."""
    return _each(value, name, where, "turns", read_sharegpt_turn)


def read_sharegpt_turn(turn: Any, name: str, where: str) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise UserError(f"{where}: `{name}` has to be an object with `from` and `value`")
    _refuse_unread(turn, name, where)
    speaker = str(turn.get("from"))
    if speaker == CALL:
        message = {"role": "assistant", "tool_calls": _sharegpt_calls(turn["value"], name, where)}
    elif speaker in SHAREGPT_ROLES:
        message = {"role": SHAREGPT_ROLES[speaker], "content": turn["value"]}
    else:
        known = ", ".join(("human", "gpt", "system", CALL))
        raise UserError(f"{where}: `{name}` is from {turn.get('from')!r}, not {known} or observation")
    return _flagged(message, turn, name, where)


def read_tools(value: Any, where: str, wrap: bool = False) -> Tools:
    """A record's `tools`: a list of JSON schemas, or that as a JSON text; nothing for what is empty.

    Args:
      value: the field.
      where: for messages.
      wrap: puts bare `{"name", "parameters"}` under `{"type": "function", "function": ...}`, as templates expect them
        and LLaMA-Factory does.

    Raises:
      UserError: it is neither.
    """
    if value in EMPTY:
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UserError(f"{where}: `tools` is a text that is not JSON") from None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UserError(f"{where}: `tools` has to be a list of objects, or one as a JSON text")
    return tuple({"type": "function", "function": tool} if wrap and "type" not in tool else tool for tool in value)


def split_flags(messages: Messages) -> tuple[Messages, tuple[bool, ...]]:
    """Messages without their flags, and for each of the assistant's whether it is learned; none where all are."""
    learned = tuple(m.get("train", True) for m in messages if m["role"] == "assistant")
    bare = tuple({key: field for key, field in m.items() if key != "train"} for m in messages)
    return bare, () if all(learned) else learned


def refuse_flags(messages: Messages, name: str, where: str, learned: bool) -> Messages:
    """Messages without flags, for a place where all or none are learned. Raises UserError for a flag that says else."""
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("train", learned) != learned:
            every = "every one there is learned" if learned else "none there is learned"
            raise UserError(f"{where}: `{name}[{index}]` says otherwise, but {every}: write all turns as `messages`")
    return split_flags(messages)[0]


def _each(value: Any, name: str, where: str, what: str, read: Callable[[Any, str, str], Message]) -> Messages:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: `{name}` has to be a list of {what}, and not empty")
    return tuple(read(turn, f"{name}[{i}]", where) for i, turn in enumerate(value))


def _refuse_unread(turn: Mapping[str, Any], name: str, where: str) -> None:
    for key in UNREAD_IN_MESSAGE:
        if turn.get(key) not in EMPTY:
            raise UserError(f"{where}: `{name}.{key}` is not supported, and would be lost")


def _flagged(message: dict[str, Any], turn: Mapping[str, Any], name: str, where: str) -> Message:
    """The message with `train` where the turn has a flag."""
    said = {key: turn[key] for key in FLAGS if turn.get(key) is not None}
    for key, value in said.items():
        if value not in (0, 1):  # False and True are these too
            raise UserError(f"{where}: `{name}.{key}` is {value!r}; a turn is learned (1, true) or not (0, false)")
        if value and message["role"] != "assistant":
            raise UserError(f"{where}: `{name}.{key}` is {value!r}, but only the assistant's turns are learned")
    if len({bool(value) for value in said.values()}) > 1:
        raise UserError(f"{where}: `{name}`: `train` and `weight` contradict each other")
    if said and message["role"] == "assistant":
        message["train"] = all(said.values())
    return message


def _calls(turn: Mapping[str, Any], name: str, where: str) -> bool:
    """Whether a message calls tools."""
    calls = turn.get("tool_calls")
    if calls in EMPTY:
        return False
    if turn["role"] != "assistant" or not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{where}: `{name}.tool_calls` has to be a list of objects in a turn of the assistant's")
    return True


def _sharegpt_calls(text: str, name: str, where: str) -> list[dict[str, Any]]:
    """The calls that a turn from `function_call` spells: `{"name", "arguments"}` in JSON, or a list of these."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: `{name}` is from {CALL}, and its `value` is not JSON") from None
    calls = []
    for call in value if isinstance(value, list) else [value]:
        arguments = call.get("arguments") if isinstance(call, dict) else None
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict) or not isinstance(call.get("name"), str):
            raise UserError(f"{where}: `{name}` is from {CALL}, and has to hold `name` and `arguments`, an object")
        calls.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
    if not calls:
        raise UserError(f"{where}: `{name}` is from {CALL}, and calls nothing")
    return calls
