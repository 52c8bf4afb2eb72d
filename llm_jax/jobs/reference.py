"""The reference of a preference run: what it says of every row, computed once and stored; or one that moves along."""

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import PartitionSpec

from llm_jax.adapters.loading import load_merged
from llm_jax.base import processes
from llm_jax.base.logging import log
from llm_jax.data import Loader, RowSet
from llm_jax.jobs.fit import Columns
from llm_jax.jobs.origin import Origin
from llm_jax.jobs.setup import Setup
from llm_jax.models import Decoder, bind
from llm_jax.sharding import placed_batches
from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.hashes import canonical_hash
from llm_jax.training.step import Program
from llm_jax.training.terms import Params, Rows

Score = Callable[[Decoder, Rows], dict[str, jax.Array]]
"""`scoring.answer_logps`, say: numbers of the rows of a batch by name, each [n, P]."""


def stored_logps(s: Setup, reference: Origin, score: Score, **options: Any) -> Columns:
    """What `score` says of all rows of both splits, float32[rows, P], each by its name behind `ref_`.

    The file is named by the hash of the reference, the rows' manifest, the compute dtype, and the options that `score`
    was made with, so that none of them can change under it.
    """
    key = canonical_hash(
        {
            "reference": {name: parent["hash"] for name, parent in s.workdir.read_config()["parents"].items()},
            "rows": json.loads((s.workdir.data / "manifest.json").read_text())["inputs"],
            "compute_dtype": s.config.train.compute_dtype,
            **{name: value for name, value in options.items() if value is not None},
        }
    )
    file = s.workdir.data / f"reference-{key}.npz"
    if not processes.from_first(file.exists):
        log(f"{s.node.name}: the reference's log-probabilities of {len(s.data.train) + len(s.data.eval)} rows")
        values = _compute(s, reference, score)
        if processes.first():
            _store(file, values)
        return values
    stored = np.load(io.BytesIO(file.read_bytes()))
    found: dict[str, dict[str, np.ndarray]] = {"train": {}, "eval": {}}
    for key in stored.files:
        split, _, name = key.partition("/")
        found[split][name] = stored[key]
    return found


def _store(file: epath.Path, values: Columns) -> None:
    flat = {f"{split}/{name}": array for split, arrays in values.items() for name, array in arrays.items()}
    packed = io.BytesIO()
    np.savez(packed, **flat)  # pyright: ignore[reportArgumentType]
    write_atomically(file, packed.getvalue())


def _compute(s: Setup, reference: Origin, score: Score) -> Columns:
    decoder = Decoder(reference.model)
    params = load_merged(reference.path, mesh=s.config.mesh).params

    def said(params, rows):
        return score(bind(decoder, params), jax.tree.map(lambda x: x[0], rows))

    # Every process gets the numbers of all rows.
    whole = Program(s.plan, lambda *_: jax.jit(said, out_shardings=s.plan.sharding(PartitionSpec())))

    def over(rowset: RowSet) -> dict[str, np.ndarray]:
        loader = Loader(rowset, s.config.train.batch_size // s.config.train.microbatches, shuffle=False)
        batches = placed_batches(loader, s.plan, 0, len(loader))
        parts = [jax.device_get(whole(params, rows)) for rows in batches]
        return {f"ref_{name}": np.concatenate([part[name] for part in parts])[: len(rowset)] for name in parts[0]}

    return {"train": over(s.data.train), "eval": over(s.data.eval)}


def synchronised(alpha: float, every: int) -> Callable[[Params, Params, jax.Array], dict[str, Any]]:
    """TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656, eq. 6 and 7): every `every` steps the reference becomes
    alpha π_θ + (1 - alpha) π_ref, parameter by parameter; alpha 1 is the hard update.

    For `Objective.synced`. After step n where `every` divides n, as TRL's callback does; the reference is part of the
    train state, so a resumed run has the one it would have had.
    """

    def moved(frozen: Params, trained: Params, steps: jax.Array) -> dict[str, Any]:
        def mixed(ref: Mapping[str, Any]) -> Mapping[str, Any]:
            return jax.tree.map(lambda r, p: alpha * p + (1 - alpha) * r, ref, trained["policy"])

        return {**frozen, "ref": jax.lax.cond(steps % every == 0, mixed, lambda ref: ref, frozen["ref"])}

    return moved
