"""What the processes of a run compare before they begin: configurations, code, versions, and the files they see."""

import functools
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etils import epath

from llm_jax.base import processes
from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten
from llm_jax.storage.hashes import canonical_hash, file_sha256

if TYPE_CHECKING:
    from llm_jax.jobs.graph import Node

PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "orbax-checkpoint", "numpy")
SEEN = ("config.json", "model.json", "data/manifest.json", "tokenizer/tokenizer.json")
"""Files that process 0 has written when all go on."""


def agree_on_runs(nodes: Sequence["Node"], todo: Sequence["Node"]) -> None:
    """Compares, over the processes, every run that a command leads to, and which of them are still to be made.

    Raises UserError, in all processes, naming one that differs and in what; and for a job that knows one process only.
    """
    if not processes.several():
        return
    values: dict[str, Any] = {"python": platform.python_version()}
    values |= {package: importlib.metadata.version(package) for package in PACKAGES}
    values["the code of llm_jax"] = _code_hash()
    for node in nodes:
        record = node.record()
        config = flatten(record.pop("config"))
        # The last one is the one that was asked for; its fields go by the names they are typed with.
        prefix = "" if node is nodes[-1] else f"{node.name}: "
        values |= {f"{prefix}{path.replace('/', '.')}": value for path, value in config.items()}
        values[f"{prefix}the hash of the data"] = record.pop("sources")
        values |= {f"{prefix}{path.replace('/', '.')}": value for path, value in flatten(record).items()}
        values[f"{prefix}workdir"] = node.workdir.path
        values[f"{prefix}finished"] = node not in todo
    processes.agree(values)
    for node in todo:
        if node.job in ("generate", "rounds"):
            raise UserError(f"{node.name}: the job {node.job} runs in one process, not in {processes.count()}")


def agree_on_files(nodes: Sequence["Node"]) -> None:
    """Compares the small files in the workdirs. Raises UserError, as for a workdir that not all processes see."""
    if not processes.several():
        return
    files = {str(node.workdir.path / file): node.workdir.path / file for node in nodes for file in SEEN}
    processes.agree({name: _hash(path) for name, path in files.items()})


def _hash(path: epath.Path) -> str:
    return file_sha256(path)[:16] if path.exists() else "absent (is it on a disk that all processes share?)"


@functools.cache
def _code_hash() -> str:
    package = Path(__file__).parents[1]
    return canonical_hash({str(f.relative_to(package)): file_sha256(f) for f in sorted(package.rglob("*.py"))})
