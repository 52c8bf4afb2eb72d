"""Attention on this machine's CPU: ours, `jax.nn`, and (with --peer-python) PyTorch's SDPA, float32, causal.

    python experiments/benchmarks/attention_cpu.py [--peer-python PYTHON_WITH_TORCH] [--repeats 15] [--lengths 256,2048]
        [--devices 1]

With --devices as many as there are cores, each core is a JAX device with its share of the rows.

Prints a Markdown table of medians in milliseconds, of wall time (the least in brackets) and of CPU time, which a busy
machine disturbs less, and ours over each of the others (medians of the ratios of neighbouring calls, of both times).
Calls of all rows alternate, PyTorch's in a process of its own that waits for its turn. "packed" rows hold documents of
100 tokens; PyTorch and jax.nn, given the mask as an array, compute all of it. A second table has the temporary memory
of our compiled programs by length.
"""

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SHAPES = (
    (8, 256, 256, 8, 32),
    (8, 2048, 2048, 8, 32),
    (8, 128, 128, 4, 32),
    (4, 1024, 1024, 8, 64),
    (8, 1, 512, 8, 32),
)
"""B, T, S, N, H. T = 1 is a decoding step against a full cache."""
LENGTHS = (512, 1024, 2048, 4096, 8192)
"""Of the table of memory, B8 N8 H32."""
MODES = ("forward", "forward+backward")
DOCUMENT = 100
LENGTHS_ASKED = "ATTENTION_CPU_LENGTHS"
"""Set for the worker alone."""


def cases(lengths: str) -> list[tuple[tuple[int, ...], bool, str]]:
    """(shape, packed, mode) of every row. `lengths`: those of T that are wanted, or "" for all."""
    return [
        (shape, packed, mode)
        for shape in SHAPES
        if not lengths or str(shape[1]) in lengths.split(",")
        for packed in (False, True)
        for mode in MODES
        if shape[1] > 1 or (mode == "forward" and not packed)
    ]


def jax_calls(lengths: str, devices: int) -> dict[str, list[Callable[[], object]]]:
    """One compiled call per case, for our op and for jax.nn."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from llm_jax.kernels import flash_attention

    mesh = jax.make_mesh((devices,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    by_rows = PartitionSpec("rows")

    def call(attend: Callable, shape: tuple[int, ...], packed: bool, mode: str) -> Callable[[], object]:
        B, T, S, N, H = shape
        keys = jax.random.split(jax.random.key(0), 4)
        q, g = (jax.random.normal(key, (B, T, N, H)) for key in keys[:2])
        k, v = (jax.random.normal(key, (B, S, N, H)) for key in keys[2:])
        segments = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32) // DOCUMENT + 1, (B, S)) if packed else None

        def forward(q, k, v, segments, g):
            return attend(q, k, v, segments)

        def both(q, k, v, segments, g):
            out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segments), q, k, v)
            return out, pull(g)

        run = forward if mode == "forward" else both
        run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=by_rows, out_specs=by_rows))
        arrays = jax.device_put((q, k, v, segments, g), NamedSharding(mesh, by_rows))
        return lambda: jax.block_until_ready(run(*arrays))

    def ours(q, k, v, segments):
        return flash_attention(q, k, v, segment_ids=segments)

    def jax_nn(q, k, v, segments):
        T, S = q.shape[1], k.shape[1]
        mask = (jnp.arange(S) <= jnp.arange(T)[:, None] + S - T)[None]
        if segments is not None:
            mask &= segments[:, :, None] == segments[:, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])

    return {name: [call(f, *case) for case in cases(lengths)] for name, f in (("llm_jax", ours), ("jax.nn", jax_nn))}


def memory_table() -> None:
    """What XLA sets aside for temporaries; inputs and outputs come on top."""
    import jax

    from llm_jax.kernels import flash_attention

    def both(q, k, v, g):
        out, pull = jax.vjp(flash_attention, q, k, v)
        return out, pull(g)

    print("\n| T | one array MiB | forward MiB | forward+backward MiB | scores of standard attention MiB |")
    print("|---|---|---|---|---|")
    for T in LENGTHS:
        x = jax.ShapeDtypeStruct((8, T, 8, 32), "float32")
        programs = (jax.jit(flash_attention).lower(x, x, x), jax.jit(both).lower(x, x, x, x))
        taken = [program.compile().memory_analysis().temp_size_in_bytes for program in programs]
        figures = (4 * x.size, *taken, 4 * 8 * 8 * T * T)
        print(f"| {T} | " + " | ".join(f"{f / 2**20:.1f}" for f in figures) + " |")


def torch_worker() -> None:
    """Times case i for every line "i" on stdin; answers wall and CPU seconds. Runs under the peer's Python."""
    torch: Any = importlib.import_module("torch")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    calls = []
    for (B, T, S, N, H), packed, mode in cases(os.environ[LENGTHS_ASKED]):
        backward = mode != "forward"
        q, k, v = (torch.randn(B, N, L, H, requires_grad=backward) for L in (T, S, S))
        g, mask = torch.randn(B, N, T, H), None
        if packed:
            document = torch.arange(S) // DOCUMENT
            mask = (document[:, None] == document) & torch.ones(S, S, dtype=torch.bool).tril()
        causal = mask is None and T == S

        def call(q=q, k=k, v=v, g=g, mask=mask, causal=causal, backward=backward):
            out = sdpa(q, k, v, attn_mask=mask, is_causal=causal)
            if backward:
                out.backward(g)
                q.grad = k.grad = v.grad = None

        call()
        calls.append(call)
    print("ready", flush=True)
    for line in sys.stdin:
        print(*_seconds(calls[int(line)]), flush=True)


def _seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Wall time, and CPU time of all threads of this process, of a call that follows another one.

    The other one, untimed, gives the threads of the side before the time to fall asleep: PyTorch's wait awake for
    milliseconds, on a core that is then not there for us.
    """
    call()
    start, busy = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python that has torch; without it its column is left out")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--devices", type=int, default=1, help="JAX devices that the cores are divided into")
    parser.add_argument("--lengths", default="", help="of queries, to leave the other rows out")
    options = parser.parse_args()

    from llm_jax.base.runtime import keep_memory

    devices = f"--xla_force_host_platform_device_count={options.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices}"
    keep_memory()  # as every command does, before JAX is imported
    timers: dict[str, Callable[[int], tuple[float, float]]] = {}
    for name, calls in jax_calls(options.lengths, options.devices).items():
        for call in calls:
            call()
        timers[name] = lambda i, calls=calls: _seconds(calls[i])
    peer = None
    if options.peer_python:
        command = [options.peer_python, os.path.abspath(__file__)]
        environment = os.environ | {LENGTHS_ASKED: options.lengths}
        environment.pop("PYTHONPATH", None)
        peer = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
        )
        stdin, stdout = peer.stdin, peer.stdout
        assert stdin is not None and stdout is not None
        if stdout.readline().strip() != "ready":
            sys.exit(f"error: {options.peer_python} could not run the PyTorch side")

        def ask(i: int) -> tuple[float, float]:
            print(i, file=stdin, flush=True)
            wall, cpu = stdout.readline().split()
            return float(wall), float(cpu)

        timers["PyTorch"] = ask
    others = [name for name in timers if name != "llm_jax"]
    columns = [f"{name} ms: wall (least), CPU" for name in timers] + [f"ours / {name}: wall, CPU" for name in others]
    print(f"| B T S N H | mask | | {' | '.join(columns)} |\n|---|---|---|{'---|' * len(columns)}")
    for i, (shape, packed, mode) in enumerate(cases(options.lengths)):
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in timers}
        for _ in range(options.repeats):
            for name, timer in timers.items():
                times[name].append(timer(i))
        cells = []
        for each in times.values():
            wall, cpu = ([1e3 * one[k] for one in each] for k in (0, 1))
            cells.append(f"{statistics.median(wall):.2f} ({min(wall):.2f}), {statistics.median(cpu):.2f}")
        for name in others:
            pairs = list(zip(times["llm_jax"], times[name], strict=True))
            wall, cpu = (statistics.median(ours[k] / other[k] for ours, other in pairs) for k in (0, 1))
            cells.append(f"{wall:.2f}, {cpu:.2f}")
        row = " ".join(map(str, shape)), "packed" if packed else "causal", mode, *cells
        print(f"| {' | '.join(row)} |", flush=True)
    memory_table()
    if peer is not None and peer.stdin is not None:
        peer.stdin.close()
        peer.wait(timeout=30)


if __name__ == "__main__":
    if LENGTHS_ASKED in os.environ:
        torch_worker()
    else:
        main()
