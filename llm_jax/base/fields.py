"""What the fields of nested config dataclasses are: their dotted names, types, defaults and doc lines."""

import ast
import dataclasses
import functools
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union


def field_names(cls: type) -> list[str]:
    """The dotted names of all fields, groups of fields among them."""
    names = []
    for name, hint in field_types(cls).items():
        names.append(name)
        if group := group_in(hint):
            names.extend(f"{name}.{inner}" for inner in field_names(group))
    return names


def fields_of_type(cls: type, kind: Any) -> list[str]:
    """The dotted names of the fields whose type is `kind` or `kind | None`."""
    names = []
    for name, hint in field_types(cls).items():
        if kind in (hint, *union_arms(hint)):
            names.append(name)
        elif group := group_in(hint):
            names.extend(f"{name}.{inner}" for inner in fields_of_type(group, kind))
    return names


def field_value(obj: Any, dotted: str) -> Any:
    """The value of a field by its dotted name."""
    return functools.reduce(getattr, dotted.split("."), obj)


def field_docs(cls: type, instance: Any = None) -> list[tuple[str, str, str, str]]:
    """`(dotted name, type, default, doc line)` of every field; with an instance, its values for the defaults.

    The doc line is the string literal below the field. Groups are spelled out; the fields of a tuple's items follow
    the tuple, as `groups[].match`.
    """
    rows = []
    docs = _docs(cls)
    for field in dataclasses.fields(cls):
        hint = field_types(cls)[field.name]
        value = getattr(instance, field.name) if instance is not None else default_of(field)
        group = group_in(hint)
        if group is not None and value is not None:
            rows.extend((f"{field.name}.{name}", *rest) for name, *rest in field_docs(group, value))
            continue
        default = "required" if value is dataclasses.MISSING else value_text(value)
        rows.append((field.name, type_text(hint), default, docs.get(field.name, "")))
        items = typing.get_args(hint) if typing.get_origin(hint) is tuple else ()
        for item in [i for i in items if isinstance(i, type) and dataclasses.is_dataclass(i)]:
            rows.extend((f"{field.name}[].{name}", *rest) for name, *rest in field_docs(item))
    return rows


def type_text(hint: Any) -> str:
    """A type as a person would write it."""
    if hint is type(None):
        return "None"
    if arms := union_arms(hint):
        return " | ".join(type_text(a) for a in arms)
    if typing.get_origin(hint) is Literal:
        return " | ".join(repr(a) for a in typing.get_args(hint))
    if origin := typing.get_origin(hint):
        inner = ", ".join("..." if a is ... else type_text(a) for a in typing.get_args(hint))
        return f"{origin.__name__}[{inner}]"
    return hint.__name__


def value_text(value: Any) -> str:
    """A value as it would be written in an override."""
    if isinstance(value, str):
        return value
    if value is None:
        return "None"
    return json.dumps(plain(value))


def plain(value: Any) -> Any:
    """Any field's value as nested plain dicts and lists, ready for JSON."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """The type of each field, by name, in order."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def union_arms(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or ()."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else ()


def group_in(hint: Any) -> Any:
    """The dataclass that a field of type `X` or `X | None` holds, or None."""
    return next((a for a in (union_arms(hint) or (hint,)) if dataclasses.is_dataclass(a)), None)


def default_of(field: dataclasses.Field) -> Any:
    """A field's default, or dataclasses.MISSING."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


@functools.cache
def _docs(cls: type) -> dict[str, str]:
    """The string literal below each field of the class, by field."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    body = typing.cast(ast.ClassDef, definition).body
    docs = {}
    for field, below in zip(body, body[1:]):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                docs[name] = " ".join(doc.split())
    return docs
