"""Plain values to frozen dataclasses and back: every field is checked once, and an error names it in one line.

Field types understood: bool, int, float, str, NewTypes of them, Literal, `X | None`, `tuple[X, ...]`, `dict[str, X]`
and nested dataclasses ("groups").
"""

import ast
import copy
import dataclasses
import json
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NewType

from llm_jax.base.errors import UserError
from llm_jax.base.fields import default_of, field_names, field_types, group_in, plain, type_text, union_arms
from llm_jax.base.nearest import nearest

BOOLS = {"true": True, "True": True, "1": True, "false": False, "False": False, "0": False}


def bind[T](cls: type[T], values: Mapping[str, Any], *, where: str = "config") -> T:
    """An instance of the dataclass `cls` with `values` over its defaults.

    Raises UserError naming the dotted field, its value, and the expected type or, for an unknown field, the nearest
    valid name. `where` is what the dotted names start with.
    """
    return _bind(cls, values, where, [f"{where}.{name}" for name in field_names(cls)])


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[tuple[str, str]], cls: type) -> dict[str, Any]:
    """A copy of `values` with `(dotted name, text)` pairs set, each text read as its field's type in `cls`.

    `None` is spelled `None` or `none`; tuples and dicts are JSON or Python literals, a tuple of given names also `a,b`.
    Raises UserError as `bind` does.
    """
    result = copy.deepcopy(dict(values))
    for dotted, text in overrides:
        name = f"config.{dotted}"
        hint: Any = cls
        target = result
        *groups, last = dotted.split(".")
        for part in [*groups, last]:
            group = group_in(hint)
            if group is None or part not in field_types(group):
                raise _unknown(name, text, [f"config.{valid}" for valid in field_names(cls)])
            hint = field_types(group)[part]
        for part in groups:
            if not isinstance(target.get(part), dict):
                target[part] = {}
            target = target[part]
        if dataclasses.is_dataclass(hint):
            example = next(iter(field_types(typing.cast(type, hint))))
            raise UserError(f"{name}={text}: a group of fields; set one of them, as {name}.{example}")
        target[last] = plain(_convert(hint, _read(hint, text, name), name))
    return result


def typed(hint: Any, value: Any, name: str) -> Any:
    """`value` as the field type `hint` asks for (1 for a float is 1.0). Raises UserError naming `name`."""
    return _convert(hint, value, name)


def to_dict(obj: Any) -> dict[str, Any]:
    """A dataclass instance as nested plain dicts and lists, ready for JSON; `bind` reads it back."""
    return plain(obj)


def _bind[T](cls: type[T], values: Mapping[str, Any], name: str, valid: Sequence[str]) -> T:
    hints = field_types(cls)
    for key, value in values.items():
        if key not in hints:
            raise _unknown(f"{name}.{key}", value, valid)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name not in values and default_of(field) is dataclasses.MISSING:
            raise UserError(f"{name}.{field.name} is missing; it is {type_text(hints[field.name])}")
    return cls(**{key: _convert(hints[key], value, f"{name}.{key}", valid) for key, value in values.items()})


def _convert(hint: Any, value: Any, name: str, valid: Sequence[str] = ()) -> Any:
    """`value` as the type `hint` asks for; raises UserError if it isn't that."""
    if arms := union_arms(hint):
        if value is None and type(None) in arms:
            return None
        for arm in arms:
            try:
                return _convert(arm, value, name, valid)
            except UserError:
                # What is wrong inside a group says more than that the group is wrong.
                if dataclasses.is_dataclass(arm) and isinstance(value, Mapping):
                    raise
        raise _mismatch(name, value, hint)
    if dataclasses.is_dataclass(hint):
        cls = typing.cast(type, hint)
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise _mismatch(name, value, hint)
        # An item of a tuple has no dotted name in the whole config: its own fields are then the valid names.
        inside_whole = any(v.startswith(f"{name}.") for v in valid)
        return _bind(cls, value, name, valid if inside_whole else [f"{name}.{n}" for n in field_names(cls)])
    if isinstance(hint, NewType):
        return _convert(hint.__supertype__, value, name)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal and any(value == a and type(value) is type(a) for a in args):
        return value
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [args[0]] * len(value) if args[1:] == (...,) else list(args)
        if len(kinds) == len(value):
            return tuple(_convert(k, v, f"{name}[{i}]") for i, (k, v) in enumerate(zip(kinds, value)))
    if hint is Any:
        return value
    if origin is dict and isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {k: _convert(args[1], v, f"{name}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int | float) and type(value) is not bool and math.isfinite(value):
        return float(value)
    if hint in (bool, int, str) and type(value) is hint:
        return value
    raise _mismatch(name, value, hint)


def _read(hint: Any, text: str, name: str) -> Any:
    """The value that `text` on the command line means for a field of this type."""
    arms = union_arms(hint)
    if type(None) in arms and text in ("None", "none"):
        return None
    for arm in arms or (hint,):
        try:
            return _read_as(arm, text)
        except (ValueError, SyntaxError):
            continue
    raise _mismatch(name, text, hint)


def _read_as(hint: Any, text: str) -> Any:
    while isinstance(hint, NewType):
        hint = hint.__supertype__
    if hint is str:
        return text
    if hint is bool and text in BOOLS:
        return BOOLS[text]
    if hint in (int, float):
        return hint(text)
    if typing.get_origin(hint) is Literal:
        return next((choice for choice in typing.get_args(hint) if str(choice) == text), text)
    if typing.get_origin(hint) in (tuple, dict):
        if typing.get_origin(typing.get_args(hint)[0]) is Literal and not text.startswith(("[", "(")):
            return [part for part in text.split(",") if part]
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return ast.literal_eval(text)
    raise ValueError(text)


def _mismatch(name: str, value: Any, hint: Any) -> UserError:
    shown = value if isinstance(value, str) and value else repr(value)
    expected = "a group of fields" if dataclasses.is_dataclass(hint) else type_text(hint)
    choices = [a for arm in (union_arms(hint) or (hint,)) for a in typing.get_args(arm) if isinstance(a, str)]
    near = nearest(value, choices) if isinstance(value, str) else None
    return UserError(f"{name}={shown}: expected {expected}" + (f"; the nearest is {near}" if near else ""))


def _unknown(name: str, value: Any, valid: Sequence[str]) -> UserError:
    near = nearest(name, valid)
    return UserError(f"{name}={value}: no such field" + (f"; the nearest is {near}" if near else ""))
