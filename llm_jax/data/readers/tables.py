"""Rows of Arrow tables as JSON values, for the two formats that hold such tables.

A null in a table is no field: where one row of a nested column has a field, Arrow gives it to all of them.
"""

import base64
import datetime
import decimal
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from llm_jax.base.errors import UserError
from llm_jax.data.readers.base import Record, require

if TYPE_CHECKING:
    import pyarrow


def arrow(what: str) -> Any:
    """The module pyarrow. Raises UserError where it is not installed."""
    return require("pyarrow", "arrow", what)


def rows(batch: "pyarrow.RecordBatch", name: str, first: int, start: int) -> Iterator[Record]:
    """Rows of a batch as dicts of JSON values.

    Args:
      batch: rows `first`, `first + 1`, ... of the file.
      name: the file, for `Record.where`.
      first: number of the batch's first row, from 0.
      start: number of the first row that is wanted.

    Raises:
      UserError: two columns have one name, the batch's bytes are damaged (a text that is not UTF-8, for one), or a
        column declared as JSON is not.
    """
    skipped = max(0, start - first)
    names = batch.schema.names
    if len(set(names)) < len(names):
        raise UserError(f"{name}: two columns are called {max(names, key=names.count)!r}")
    converters = {field.name: _converter(field.type) for field in batch.schema}
    wanted = batch.slice(skipped)
    try:
        wanted.validate(full=True)
    except ValueError as error:  # pyarrow.ArrowInvalid
        last = first + batch.num_rows
        raise UserError(f"{name}, rows {first + skipped + 1} to {last}: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(wanted.to_pylist(), first + skipped + 1):
        where = f"{name}, row {number}"
        try:
            yield Record(where, _fields(row, converters))
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: {error}") from None


Converter = Callable[[Any], Any] | None
"""From what pyarrow gives to a JSON value; None where that is one."""


def _fields(row: dict[str, Any], converters: dict[str, Converter]) -> dict[str, Any]:
    made = {}
    for key, value in row.items():
        if value is not None:
            convert = converters[key]
            made[key] = value if convert is None else convert(value)
    return made


def _converter(kind: "pyarrow.DataType") -> Converter:
    import pyarrow
    import pyarrow.types as t

    if t.is_struct(kind):
        inner = {field.name: _converter(field.type) for field in kind}
        return lambda value: _fields(value, inner)
    if t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind):
        item = _converter(kind.value_type)
        return None if item is None else lambda value: [None if v is None else item(v) for v in value]
    if t.is_dictionary(kind):
        return _converter(kind.value_type)
    if isinstance(kind, pyarrow.JsonType):  # `datasets.Json`
        return json.loads
    text = t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind)
    plain = text or t.is_boolean(kind) or t.is_integer(kind) or t.is_floating(kind) or t.is_null(kind)
    return None if plain else _json


def _json(value: Any) -> Any:
    """Times as ISO 8601, bytes as base64, decimals as text: metadata as a rule, but records have to be comparable."""
    match value:
        case list() | tuple():  # of which a map is made
            return [_json(inner) for inner in value]
        case dict():
            return {key: _json(inner) for key, inner in value.items()}
        case bytes():
            return base64.b64encode(value).decode()
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case datetime.timedelta() | decimal.Decimal():
            return str(value)
    json.dumps(value)  # a TypeError names any other type
    return value
