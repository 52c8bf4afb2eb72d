"""Tile sizes of an op's kernels, measured on the device at hand; the best ones become a row of a table."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from llm_jax.base.errors import UserError
from llm_jax.base.journal import Journal
from llm_jax.base.nearest import nearest
from llm_jax.kernels.cases import Case
from llm_jax.kernels.tiles import KEYS, VARIABLE
from llm_jax.kernels.tuning import Tuned, Tuning, tune, tuning_of
from llm_jax.storage.atomic import write_atomically

DTYPES = ("float32", "bfloat16", "float16")


def run(
    op: str,
    shape: str,
    implementation: str | None,
    dtype: str | None,
    repeats: int,
    target: str | None,
    journal: Journal,
) -> None:
    """Measures, prints a table for each row, and puts the rows into the file `target`, in place of what they replace.

    Raises UserError for an unknown op, implementation, key of the shape or dtype, and for a file that is no table.
    """
    tuning = tuning_of(op)
    sizes = read_shape(shape, tuning)
    kept = _rows(Path(target)) if target else []
    device = jax.devices()[0]
    dtype = dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype} is not one of {', '.join(DTYPES)}")
    if not journal.entries:  # the first process of the run
        print(f"{op} on {device.device_kind}, {dtype}, {', '.join(f'{k}={v}' for k, v in sizes.items())}", flush=True)
    case = tuning.make_case(sizes, dtype)
    tuned = tune(op, case, implementation, repeats, journal)
    for one in tuned:
        print(f"\n{one.asked.implementation}, shape {one.asked.shape!r}, {one.measured}")
        print(table(one, case))
    rows = [row(one) for one in tuned]
    if target is None:
        print("\n" + "\n".join(json.dumps(new) for new in rows))
        return
    replaced = {_key(new) for new in rows}
    write_rows(Path(target), [old for old in kept if _key(old) not in replaced] + rows)
    print(f"\nwrote {target}; read where {VARIABLE}={target}")


def read_shape(text: str, tuning: Tuning) -> dict[str, int]:
    """ "heads=32,q_len=4096" over the op's defaults. Raises UserError."""
    shape = dict(tuning.SHAPE)
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        if name not in shape:
            near = nearest(name, list(shape))
            raise UserError(
                f"--shape: {name!r} is none of {', '.join(shape)}" + (f"; the nearest is {near}" if near else "")
            )
        if not value.isdecimal():
            raise UserError(f"--shape: {part!r} has to be {name}=N, a number of at least 0")
        shape[name] = int(value)
    return shape


def table(tuned: Tuned, case: Case) -> str:
    """Markdown, the fastest first, those that can't run last."""
    flops = {"forward": case.flops, "backward": case.backward_flops}.get(
        tuned.measured, case.flops + case.backward_flops
    )
    names = [field.name for field in dataclasses.fields(tuned.asked.default)]
    default = next(c for c in tuned.candidates if c.sizes == tuned.asked.default)
    lines = [f"| {' | '.join(names)} | ms | TFLOP/s | of the default's time |", "|---" * (len(names) + 3) + "|"]
    for c in sorted(tuned.candidates, key=lambda c: (c.seconds is None, c.seconds)):
        sizes = " | ".join(str(getattr(c.sizes, name)) for name in names)
        if c.seconds is None or default.seconds is None:
            lines.append(f"| {sizes} | {c.refusal} | | |")
            continue
        rate = f"{flops / c.seconds / 1e12:.3g}" if flops else ""
        share = "default" if c is default else f"{c.seconds / default.seconds:.2f}"
        lines.append(f"| {sizes} | {1e3 * c.seconds:.4g} | {rate} | {share} |")
    return "\n".join(lines)


def row(tuned: Tuned) -> dict[str, Any]:
    """The table's row, with the times that it rests on."""
    asked, best = tuned.asked, tuned.best
    default = next(c for c in tuned.candidates if c.sizes == asked.default)
    values = (asked.op, asked.implementation, asked.device, asked.dtype, asked.shape, dataclasses.asdict(best.sizes))
    times = {"ms": best.seconds, "default_ms": default.seconds}
    return dict(zip(KEYS, values, strict=True)) | {name: round(1e3 * (s or 0.0), 4) for name, s in times.items()}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """One row a line, so that a difference of two tables reads well."""
    write_atomically(path, "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
        good = isinstance(rows, list) and all(set(KEYS) <= row.keys() for row in rows)
    except (ValueError, AttributeError):
        good, rows = False, []
    if not good:
        raise UserError(f"--write {path}: the file is there and is not a table of tile sizes")
    return rows


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in KEYS[:-1])
