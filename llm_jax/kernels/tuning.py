"""Which tile sizes are fastest on the device at hand: every candidate is compiled, checked and timed."""

import dataclasses
import importlib
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp

from llm_jax.base.journal import HUNG, Journal
from llm_jax.kernels import cases
from llm_jax.kernels.cases import Case
from llm_jax.kernels.choice import ArgumentError, find
from llm_jax.kernels.tiles import Asked, hearing, trying

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-3}
"""How far, norm over norm, a candidate's results may be from those of the default sizes."""


class Tuning(Protocol):
    """The module `kernels/OP/tuning.py`."""

    SHAPE: Mapping[str, int]
    """Sizes and options that make a case, with their defaults; the keys of `--shape`."""
    CANDIDATES: Mapping[str, Sequence[Mapping[str, Sequence[int]]]]
    """Of each implementation, groups of fields of its tile sizes with the values to try. Every combination within a
    group is tried; groups are taken one after the other, each with the best of those before it. Values that do not fit
    may be among them: the kernel or the compiler refuses them."""

    def make_case(self, shape: Mapping[str, int], dtype: str) -> Case:
        """A call on random data; `shape` has all keys of SHAPE. Raises ArgumentError."""
        ...


def tuning_of(op: str) -> Tuning:
    """Raises ArgumentError where there is no such op, or it has no sizes to tune."""
    found = find(op)
    try:
        return cast(Tuning, importlib.import_module(f"llm_jax.kernels.{found.name}.tuning"))
    except ModuleNotFoundError:
        raise ArgumentError(f"{op} has no tile sizes to tune") from None


@dataclass(frozen=True)
class Timed:
    """One candidate."""

    sizes: Any
    seconds: float | None
    """Median of one call; None where it can't run."""
    refusal: str = ""


@dataclass(frozen=True)
class Tuned:
    """The candidates of one row of the tables, the default first."""

    asked: Asked
    measured: str
    """What was timed: "forward", "backward", or "forward and backward"."""
    candidates: tuple[Timed, ...]

    @property
    def best(self) -> Timed:
        """The fastest; the default runs, so there is one."""
        return min((c for c in self.candidates if c.seconds is not None), key=lambda c: c.seconds or 0.0)


def tune(op: str, case: Case, implementation: str | None, repeats: int, journal: Journal) -> list[Tuned]:
    """Every row that the call asks the tables for, each with its candidates timed in turn, `repeats` times each.

    Candidates that a process before this one was at when it ended, by the journal, are not tried again.

    Raises:
        ArgumentError: the implementation can't run the call, or has no sizes to tune, or its default sizes ended a
            process.
    """
    known = tuning_of(op).CANDIDATES
    passes = _asked(case, implementation)
    rows = [row for row in dict.fromkeys([*passes["forward"], *passes["backward"]]) if known.get(row.implementation)]
    if not rows:
        raise ArgumentError(f"{op}: {implementation or 'the implementation for this device'} has no tile sizes to tune")
    tuned = []
    for row in rows:
        measured = " and ".join(name for name, asked in passes.items() if row in asked)
        tried: dict[Any, Timed] = {}
        found = Tuned(row, measured, ())
        for fields in known[row.implementation]:
            start = found.best.sizes if tried else row.default
            calls = _calls(case, implementation, row, measured, candidates(start, fields), journal)
            tried |= {one.sizes: one for one in _time(row, calls, repeats, journal)}
            found = Tuned(row, measured, tuple(tried.values()))
        tuned.append(found)
    return tuned


def candidates(start: Any, fields: Mapping[str, Sequence[int]]) -> list[Any]:
    """`start`, then every combination of the values of those fields that it has."""
    own = [field.name for field in dataclasses.fields(start) if field.name in fields]
    made = [dataclasses.replace(start, **dict(zip(own, v))) for v in itertools.product(*(fields[f] for f in own))]
    return list(dict.fromkeys([start, *made]))


def _asked(case: Case, implementation: str | None) -> dict[str, list[Asked]]:
    """Rows asked for while each pass is traced."""
    passes: dict[str, list[Asked]] = {"forward": [], "backward": []}

    def both(arrays: Any, cotangents: Any) -> Any:
        out, pull = cases.pull(case, implementation)(*arrays)
        with hearing() as passes["backward"]:
            return out, pull(cotangents)

    with hearing() as passes["forward"]:
        jax.eval_shape(cases.forward(case, implementation), *case.arrays)
    if case.differentiable:
        jax.eval_shape(both, case.arrays, cases.cotangents(case, implementation))
    return passes


def _calls(
    case: Case, implementation: str | None, row: Asked, measured: str, wanted: Sequence[Any], journal: Journal
) -> dict[Any, Callable[[], Any] | str]:
    """A compiled call for each candidate, or why it can't be had."""
    made: dict[Any, Callable[[], Any] | str] = {}
    expected: Any = None
    for sizes in wanted:
        if journal.began(_name(row, sizes)):
            if expected is None:
                raise ArgumentError(f"{_name(row, sizes)}: these sizes {HUNG}, and others are held to them")
            made[sizes] = HUNG
            continue
        try:
            with journal.at(_name(row, sizes)), trying(row.op, row.implementation, sizes, row.shape):
                jax.clear_caches()  # what an op's own jit has traced holds the sizes of another candidate
                call = cases.program(case, implementation, measured).call
                results = jax.block_until_ready(call())
        except Exception as error:  # whatever the compiler says of sizes that do not fit
            if expected is None:
                raise
            made[sizes] = f"refused: {cases.first_line(error)}"
            continue
        expected = results if expected is None else expected
        far = _distance(results, expected)
        made[sizes] = call if far is None else f"wrong: {far:.1e} from the default's results"
    return made


def _name(row: Asked, sizes: Any) -> str:
    return f"{row.implementation}, {row.shape}, {sizes}"


def _distance(got: Any, expected: Any) -> float | None:
    """The largest distance of a result that is beyond the tolerance of its dtype; None if there is none."""
    worst = 0.0
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if not jnp.issubdtype(y.dtype, jnp.floating):
            continue
        x, exact = x.astype(jnp.float32), y.astype(jnp.float32)
        far = float(jnp.linalg.norm((x - exact).ravel()) / jnp.maximum(jnp.linalg.norm(exact.ravel()), 1e-30))
        if not far <= TOLERANCE[jnp.dtype(y.dtype).name]:
            worst = max(worst, far) if far == far else far
    return worst or None


def _time(row: Asked, calls: Mapping[Any, Callable[[], Any] | str], repeats: int, journal: Journal) -> Iterator[Timed]:
    """Medians over rounds in which every candidate has its turn, so that a busy device disturbs all alike."""
    runs = {sizes: call for sizes, call in calls.items() if not isinstance(call, str)}
    counts: dict[Any, int] = {}
    for sizes, call in runs.items():
        with journal.at(_name(row, sizes)):
            counts[sizes] = cases.enough(call)
    times: dict[Any, list[float]] = {sizes: [] for sizes in runs}
    for _ in range(repeats):
        for sizes, call in runs.items():
            with journal.at(_name(row, sizes)):
                times[sizes].append(cases.seconds_of(call, counts[sizes]))
    for sizes, call in calls.items():
        yield Timed(sizes, None, call) if isinstance(call, str) else Timed(sizes, statistics.median(times[sizes]))
