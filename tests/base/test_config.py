import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import pytest

from llm_jax.base.config import apply_overrides, bind, to_dict
from llm_jax.base.errors import UserError
from llm_jax.base.fields import field_docs, field_names, fields_of_type
from llm_jax.base.model_ref import ModelRef
from llm_jax.jobs.config import JOBS


@dataclass(frozen=True)
class Item:
    match: str = ".*"
    """What it is for."""
    rate: float | None = None
    """How fast."""


@dataclass(frozen=True)
class Inner:
    size: int = 3
    """How big,
    in units."""
    kind: Literal["small", "large"] = "small"
    items: tuple[Item, ...] = ()
    """Exceptions."""
    names: tuple[str, ...] = ("a",)
    kinds: tuple[Literal["small", "large"], ...] = ()
    table: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Outer:
    needed: int
    """Has no default."""
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    rate: float = 0.5
    flag: bool = False
    start: ModelRef | None = None
    """A model."""


GOOD = {"needed": 1}


def override(dotted, text):
    return bind(Outer, apply_overrides(GOOD, [(dotted, text)], Outer))


def test_defaults_and_nested_values():
    config = bind(Outer, {"needed": 1, "inner": {"size": 4, "items": [{"match": "x"}]}, "rate": 2})
    assert config.inner == Inner(size=4, items=(Item("x"),))
    assert config.rate == 2.0 and isinstance(config.rate, float)
    assert bind(Outer, to_dict(config)) == config


@pytest.mark.parametrize(
    "values, said",
    [
        ({"neded": 1}, "config.neded=1: no such field; the nearest is config.needed"),
        ({"needed": 1, "inner": {"sise": 4}}, "config.inner.sise=4: no such field; the nearest is config.inner.size"),
        ({"needed": 1, "size": 4}, "config.size=4: no such field; the nearest is config.inner.size"),
        (
            {"needed": 1, "inner": {"items": [{"mach": "x"}]}},
            "config.inner.items[0].mach=x: no such field; the nearest is config.inner.items[0].match",
        ),
        ({"needed": 1, "zzzz": 4}, "config.zzzz=4: no such field"),
        ({}, "config.needed is missing; it is int"),
        ({"needed": "x"}, "config.needed=x: expected int"),
        ({"needed": True}, "config.needed=True: expected int"),
        ({"needed": 1.0}, "config.needed=1.0: expected int"),
        ({"needed": None}, "config.needed=None: expected int"),
        ({"needed": 1, "flag": 1}, "config.flag=1: expected bool"),
        ({"needed": 1, "rate": True}, "config.rate=True: expected float"),
        ({"needed": 1, "rate": float("nan")}, "config.rate=nan: expected float"),
        ({"needed": 1, "start": 3}, "config.start=3: expected ModelRef | None"),
        ({"needed": 1, "inner": 3}, "config.inner=3: expected a group of fields"),
        ({"needed": 1, "maybe": {"size": "x"}}, "config.maybe.size=x: expected int"),
        ({"needed": 1, "inner": {"names": "ab"}}, "config.inner.names=ab: expected tuple[str, ...]"),
        ({"needed": 1, "inner": {"names": ["a", 1]}}, "config.inner.names[1]=1: expected str"),
        ({"needed": 1, "inner": {"table": {"k": "v"}}}, "config.inner.table.k=v: expected int"),
        (
            {"needed": 1, "inner": {"kind": "smal"}},
            "config.inner.kind=smal: expected 'small' | 'large'; the nearest is small",
        ),
    ],
)
def test_errors_name_the_field_the_value_and_what_was_expected(values, said):
    with pytest.raises(UserError) as e:
        bind(Outer, values)
    assert str(e.value) == said


@pytest.mark.parametrize(
    "dotted, text, get, value",
    [
        ("needed", "-7", lambda c: c.needed, -7),
        ("rate", "3e-4", lambda c: c.rate, 3e-4),
        ("rate", "2", lambda c: c.rate, 2.0),
        ("flag", "true", lambda c: c.flag, True),
        ("flag", "False", lambda c: c.flag, False),
        ("start", "some/where", lambda c: c.start, "some/where"),
        ("start", "none", lambda c: c.start, None),
        ("inner.kind", "large", lambda c: c.inner.kind, "large"),
        ("inner.names", "['b', 'c']", lambda c: c.inner.names, ("b", "c")),
        ("inner.names", '["b", "c"]', lambda c: c.inner.names, ("b", "c")),
        ("inner.names", "()", lambda c: c.inner.names, ()),
        ("inner.kinds", "large,small", lambda c: c.inner.kinds, ("large", "small")),
        ("inner.kinds", '["large"]', lambda c: c.inner.kinds, ("large",)),
        ("inner.kinds", "", lambda c: c.inner.kinds, ()),
        ("inner.table", '{"k": 1}', lambda c: c.inner.table, {"k": 1}),
        ("inner.items", '[{"match": "x", "rate": 1}]', lambda c: c.inner.items, (Item("x", 1.0),)),
        ("maybe.size", "9", lambda c: c.maybe, Inner(size=9)),
        ("maybe", "None", lambda c: c.maybe, None),
    ],
)
def test_overrides_are_read_as_their_fields_type(dotted, text, get, value):
    assert get(override(dotted, text)) == value


@pytest.mark.parametrize(
    "dotted, text, said",
    [
        ("inner.sise", "4", "config.inner.sise=4: no such field; the nearest is config.inner.size"),
        ("needed.x", "4", "config.needed.x=4: no such field; the nearest is config.needed"),
        ("", "4", "config.=4: no such field"),
        ("needed", "4.5", "config.needed=4.5: expected int"),
        ("needed", "None", "config.needed=None: expected int"),
        ("rate", "fast", "config.rate=fast: expected float"),
        ("rate", "inf", "config.rate=inf: expected float"),
        ("flag", "yes", "config.flag=yes: expected bool"),
        ("inner", "4", "config.inner=4: a group of fields; set one of them, as config.inner.size"),
        ("inner.kind", "big", "config.inner.kind=big: expected 'small' | 'large'"),
        ("inner.names", "b", "config.inner.names=b: expected tuple[str, ...]"),
        ("inner.kinds", "small,larg", "config.inner.kinds[1]=larg: expected 'small' | 'large'; the nearest is large"),
        ("inner.items", '[{"mach": 1}]', "config.inner.items[0].mach=1: no such field"),
    ],
)
def test_override_errors(dotted, text, said):
    with pytest.raises(UserError) as e:
        override(dotted, text)
    assert str(e.value).startswith(said)


def test_overrides_leave_their_input_alone():
    values = {"needed": 1, "inner": {"size": 3}}
    apply_overrides(values, [("inner.size", "4")], Outer)
    assert values == {"needed": 1, "inner": {"size": 3}}


def test_field_docs():
    rows = {name: rest for name, *rest in field_docs(Outer)}
    assert rows["needed"] == ["int", "required", "Has no default."]
    assert rows["inner.size"] == ["int", "3", "How big, in units."]
    assert rows["inner.kind"] == ["'small' | 'large'", "small", ""]
    assert rows["inner.items[].rate"] == ["float | None", "None", "How fast."]
    assert rows["inner.names"] == ["tuple[str, ...]", '["a"]', ""]
    assert rows["start"] == ["ModelRef | None", "None", "A model."]
    resolved = {name: default for name, _, default, _ in field_docs(Outer, bind(Outer, {"needed": 8}))}
    assert resolved["needed"] == "8"
    assert fields_of_type(Outer, ModelRef) == ["start"]


@pytest.mark.parametrize("job", JOBS)
def test_every_field_of_every_job_has_a_doc_line_and_round_trips(job):
    cls = JOBS[job]
    undocumented = [name for name, _, _, doc in field_docs(cls) if not doc and name.rpartition(".")[2] != "job"]
    assert undocumented == []
    assert bind(cls, to_dict(cls())) == cls()
    # What --help shows for a default is what the command line takes.
    documented = {name: default for name, _, default, _ in field_docs(cls) if "[]" not in name}
    assert set(documented) <= set(field_names(cls))
    assert bind(cls, apply_overrides({}, documented.items(), cls)) == cls()
    assert dataclasses.fields(cls)
