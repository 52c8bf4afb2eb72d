"""Run as a process of its own: loads a folder and prints, as JSON, what that did to its memory.

Usage: load_memory.py TINY FOLDER DTYPE MESH: a folder to warm up with, the one to measure, and `one` device or a
MeshConfig's fields, `data=4,tensor=2,zero=3`.
"""

import gc
import json
import sys
import threading
from pathlib import Path

import jax

from llm_jax.base.trees import flatten
from llm_jax.models.loading import Model, load
from llm_jax.sharding.config import MeshConfig


def anonymous() -> int:
    """Bytes of resident memory that no file stands for (proc(5), RssAnon)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


class Peak(threading.Thread):
    """The most that `anonymous` ever was, looked at every two milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = anonymous()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.002):
            self.most = max(self.most, anonymous())


def main(tiny: str, folder: str, dtype: str, mesh: str) -> None:
    fields = {} if mesh == "one" else {name: int(n) for name, n in (pair.split("=") for pair in mesh.split(","))}

    def loaded(path: str) -> Model:
        return load(path, dtype, MeshConfig(**fields) if fields else None)

    loaded(tiny)
    gc.collect()
    before, peak = anonymous(), Peak()
    peak.start()
    params = flatten(loaded(folder).params)
    peak.over.set()
    peak.join()
    # Of a host array that was copied jax lets go at its next call.
    jax.block_until_ready(jax.device_put(1.0))
    pieces = {name: [shard.data.nbytes for shard in leaf.addressable_shards] for name, leaf in params.items()}
    stacked = sorted((sizes[0] for name, sizes in pieces.items() if name.startswith("segments/")), reverse=True)
    figures = {"grown": max(peak.most, anonymous()) - before, "kept": anonymous() - before}
    print(json.dumps(figures | {"placed": sum(map(sum, pieces.values())), "stacked": stacked[:2]}))


main(*sys.argv[1:])
