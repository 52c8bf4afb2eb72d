"""Slots that pages leave unused, beside caches of one piece per request, over lengths as in the vLLM paper.

    python experiments/studies/page_waste.py [--seeds 3]

The claim (Kwon et al. 2023, https://arxiv.org/abs/2309.06180): less than 4% of a paged cache is wasted, where caches of
one piece use 20% to 38% of what they reserve. Prompts and outputs have the paper's mean lengths (ShareGPT 161 and 338
tokens, Alpaca 19 and 58). It gives no spread: they are log-normal here with sigma 1, a mean 1.6 times the median, and a
second table has other sigmas. A request holds slots from its prompt's end to its last token, a token a step; the share
is taken over all steps of all requests, as a server sees it that has many at all times:

- pages: whole pages up to the token at hand. On average half a page is unused: share (S - 1) / 2 over length plus that.
- up to the end: a piece of just the request's final length, as if known ahead (the paper's Orca with an oracle).
- longest: a piece of 2048 slots for each request, whose lengths are cut to that.

The last table has what small pages cost in time: attention of one token for 16 requests of such lengths in float32, 8
query and key heads of 64, by `ragged_paged_attention` on this machine, in turns. Prints Markdown; `--seeds` are traces,
or repeats of timings. The plot has the first table's shares and the estimate by half a page.
"""

import functools
import time
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import cell, make_parser, mean, table
from plot import lines

from llm_jax.kernels import Pages, ragged_paged_attention

MEANS = {"ShareGPT": (161, 338), "Alpaca": (19, 58)}
PAGES = (8, 16, 32, 64, 128, 256)
LONGEST = 2048


class Trace(NamedTuple):
    """Tokens of each request."""

    prompts: np.ndarray
    outputs: np.ndarray


def trace(name: str, sigma: float, requests: int, seed: int) -> Trace:
    """Log-normal lengths of at least one token, with the trace's means (before the cut at LONGEST)."""
    rng = np.random.default_rng(seed)
    prompts, outputs = (
        np.maximum(1, np.round(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, requests))).astype(np.int64)
        for mean in MEANS[name]
    )
    prompts = np.minimum(prompts, LONGEST - 1)
    return Trace(prompts, np.minimum(outputs, LONGEST - prompts))


def slots_of_pages(length: np.ndarray, page: int) -> np.ndarray:
    """The sum of whole pages' slots over the lengths 1 to `length`."""
    full, rest = np.divmod(length, page)
    return page * page * full * (full + 1) // 2 + rest * page * (full + 1)


def used(t: Trace) -> int:
    """Slots with a token, summed over steps and requests: after each of the outputs' tokens."""
    return int((t.outputs * t.prompts + t.outputs * (t.outputs + 1) // 2).sum())


def waste_of_pages(t: Trace, page: int) -> float:
    """Share of reserved slots that have no token."""
    held = slots_of_pages(t.prompts + t.outputs, page) - slots_of_pages(t.prompts, page)
    return 1 - used(t) / int(held.sum())


def waste_of_pieces(t: Trace, size: np.ndarray | int) -> float:
    """The same where each request reserves `size` slots at once."""
    return 1 - used(t) / int((t.outputs * size).sum())


def mean_length(t: Trace) -> float:
    """Over steps."""
    return used(t) / int(t.outputs.sum())


def percent(shares: list[float]) -> str:
    return cell([100 * share for share in shares], 1)


def milliseconds(options: Namespace, pages: tuple[int, ...]) -> dict[str, dict[int, list[float]]]:
    """Of a call with lengths drawn from each trace, by page size."""
    rows, heads, size = (4, 2, 16) if options.scale == "test" else (16, 8, 64)
    calls = {}
    for name in MEANS:
        t = trace(name, 1.0, rows, seed=0)
        lengths = t.prompts + t.outputs
        for page in pages:
            counts = -(-lengths // page)
            tables = np.zeros((rows, counts.max()), np.int32)
            ids = np.random.default_rng(0).permutation(counts.sum())
            for r, end in enumerate(np.cumsum(counts)):
                tables[r, : counts[r]] = ids[end - counts[r] : end]
            k, v, q = (
                jax.random.normal(jax.random.key(i), shape)
                for i, shape in enumerate([(ids.size, heads, page, size)] * 2 + [(rows, heads, size)])
            )
            arrays = (q, Pages(k, v), jnp.asarray(lengths), jnp.asarray(tables), jnp.arange(rows + 1))
            calls[name, page] = functools.partial(jax.jit(ragged_paged_attention), *arrays)
            jax.block_until_ready(calls[name, page]())
    found: dict[str, dict[int, list[float]]] = {name: {page: [] for page in pages} for name in MEANS}
    for _ in range(options.seeds):
        turns: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
        for _ in range(2 if options.scale == "test" else 40):
            for key, call in calls.items():
                begin = time.perf_counter()
                jax.block_until_ready(call())
                turns[key].append(1e3 * (time.perf_counter() - begin))
        for (name, page), each in turns.items():
            found[name][page].append(float(np.median(each)))
    return found


def main() -> None:
    options = make_parser(__doc__, __file__, steps=None).parse_args()
    requests = 100 if options.scale == "test" else 100_000
    seeds = range(options.seeds)
    curves, body = {}, []
    for name in MEANS:
        traces = [trace(name, 1.0, requests, seed) for seed in seeds]
        length = mean([mean_length(t) for t in traces])
        shares = {page: [waste_of_pages(t, page) for t in traces] for page in PAGES}
        body.append(
            [
                name,
                f"{length:.0f}",
                *map(percent, shares.values()),
                percent([waste_of_pieces(t, t.prompts + t.outputs) for t in traces]),
                percent([waste_of_pieces(t, LONGEST) for t in traces]),
            ]
        )
        curves[name] = [(page, 100 * mean(each)) for page, each in shares.items()]
        curves[f"{name}, half a page"] = [(page, 100 * (page - 1) / 2 / (length + (page - 1) / 2)) for page in PAGES]
    print("Unused, % of what is reserved:\n")
    head = ["trace", "mean length", *(f"pages of {page}" for page in PAGES), "up to the end", f"{LONGEST} each"]
    print(table(head, body) + "\n")
    body = []
    for name in MEANS:
        for sigma in (0.5, 1.0, 1.5):
            traces = [trace(name, sigma, requests, seed) for seed in seeds]
            body.append([name, sigma, *(percent([waste_of_pages(t, page) for t in traces]) for page in (16, 64, 128))])
    print(table(["trace", "sigma", "pages of 16", "64", "128"], body) + "\n")
    timed = (16, 32) if options.scale == "test" else (16, 64, 128)
    body = [
        [name, *(cell(each, 2) for each in by_page.values())] for name, by_page in milliseconds(options, timed).items()
    ]
    print("Milliseconds of attention for one token of 16 requests:\n")
    print(table(["trace", *(f"pages of {page}" for page in timed)], body))
    caption = "slots per page; unused share of reserved slots, %"
    Path(options.svg).write_text(lines(curves, caption, log_x=True))


if __name__ == "__main__":
    main()
