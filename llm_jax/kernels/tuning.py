"""Which tile sizes are fastest on the device at hand: every candidate is compiled, checked and timed."""

import dataclasses
import importlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp

from llm_jax.kernels import cases
from llm_jax.kernels.cases import Case
from llm_jax.kernels.choice import ArgumentError, find
from llm_jax.kernels.tiles import Asked, hearing, trying

LEAST_SECONDS = 0.003
"""A measurement takes at least that long, by as many calls as that needs."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-3}
"""How far, norm over norm, a candidate's results may be from those of the default sizes."""


class Tuning(Protocol):
    """The module `kernels/OP/tuning.py`."""

    SHAPE: Mapping[str, int]
    """Sizes and options that make a case, with their defaults; the keys of `--shape`."""
    CANDIDATES: Mapping[str, Mapping[str, Sequence[int]]]
    """Of each implementation, values to try of the fields of its tile sizes. Those that do not fit may be among them:
    the kernel or the compiler refuses them."""

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


def tune(op: str, case: Case, implementation: str | None, repeats: int) -> list[Tuned]:
    """Every row that the call asks the tables for, each with its candidates timed in turn, `repeats` times each.

    Raises:
        ArgumentError: the implementation can't run the call, or has no sizes to tune.
    """
    known = tuning_of(op).CANDIDATES
    passes = _asked(case, implementation)
    rows = [row for row in dict.fromkeys([*passes["forward"], *passes["backward"]]) if known.get(row.implementation)]
    if not rows:
        raise ArgumentError(f"{op}: {implementation or 'the implementation for this device'} has no tile sizes to tune")
    tuned = []
    for row in rows:
        measured = [name for name, asked in passes.items() if row in asked]
        calls = _calls(case, implementation, row, measured, known[row.implementation])
        tuned.append(Tuned(row, " and ".join(measured), tuple(_time(calls, repeats))))
    return tuned


def candidates(default: Any, fields: Mapping[str, Sequence[int]]) -> list[Any]:
    """The default, then every combination of the values of those fields that it has."""
    own = [field.name for field in dataclasses.fields(default) if field.name in fields]
    made = [dataclasses.replace(default, **dict(zip(own, v))) for v in itertools.product(*(fields[f] for f in own))]
    return list(dict.fromkeys([default, *made]))


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
    case: Case, implementation: str | None, row: Asked, measured: Sequence[str], fields: Mapping[str, Sequence[int]]
) -> dict[Any, Callable[[], Any] | str]:
    """A compiled call for each candidate, or why it can't be had."""
    made: dict[Any, Callable[[], Any] | str] = {}
    expected: Any = None
    for sizes in candidates(row.default, fields):
        try:
            with trying(row.op, row.implementation, sizes, row.shape):
                call = _compiled(case, implementation, measured)
                results = jax.block_until_ready(call())
        except Exception as error:  # whatever the compiler says of sizes that do not fit
            if expected is None:
                raise
            made[sizes] = f"refused: {str(error).strip().splitlines()[0][:160]}"
            continue
        expected = results if expected is None else expected
        far = _distance(results, expected)
        made[sizes] = call if far is None else f"wrong: {far:.1e} from the default's results"
    return made


def _compiled(case: Case, implementation: str | None, measured: Sequence[str]) -> Callable[[], Any]:
    jax.clear_caches()  # what an op's own jit has traced holds the sizes of another candidate
    arrays = case.arrays
    if "backward" not in measured:
        run = jax.jit(cases.forward(case, implementation)).lower(*arrays).compile()
        return lambda: run(*arrays)
    cotangents = cases.cotangents(case, implementation)
    out, pull = jax.jit(cases.pull(case, implementation))(*arrays)
    if "forward" not in measured:
        back = jax.jit(lambda pull, cotangents: pull(cotangents)).lower(pull, cotangents).compile()
        return lambda: back(pull, cotangents)

    def both(arrays: Any, cotangents: Any) -> Any:
        out, pull = cases.pull(case, implementation)(*arrays)
        return out, pull(cotangents)

    run_both = jax.jit(both).lower(arrays, cotangents).compile()
    return lambda: run_both(arrays, cotangents)


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


def _time(calls: Mapping[Any, Callable[[], Any] | str], repeats: int) -> Iterator[Timed]:
    """Medians over rounds in which every candidate has its turn, so that a busy device disturbs all alike."""
    runs = {sizes: call for sizes, call in calls.items() if not isinstance(call, str)}
    counts = {sizes: max(1, round(LEAST_SECONDS / seconds_of(call, 1))) for sizes, call in runs.items()}
    times: dict[Any, list[float]] = {sizes: [] for sizes in runs}
    for _ in range(repeats):
        for sizes, call in runs.items():
            times[sizes].append(seconds_of(call, counts[sizes]))
    for sizes, call in calls.items():
        yield Timed(sizes, None, call) if isinstance(call, str) else Timed(sizes, statistics.median(times[sizes]))


def seconds_of(call: Callable[[], Any], count: int) -> float:
    """Seconds of one call, of `count` that are given to the device at once."""
    start = time.perf_counter()
    for _ in range(count):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / count
