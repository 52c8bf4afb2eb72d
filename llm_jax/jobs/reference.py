"""A frozen reference's log-probabilities of every pair: computed once, stored beside the rows, read ever after."""

import io
import json

import jax
import numpy as np
from etils import epath
from jax.sharding import PartitionSpec

from llm_jax.adapters.loading import load_merged
from llm_jax.base import processes
from llm_jax.base.logging import log
from llm_jax.data import Loader, RowSet
from llm_jax.jobs.fit import Columns, Setup
from llm_jax.jobs.origin import Origin
from llm_jax.jobs.scoring import answer_logps
from llm_jax.models import Decoder, bind
from llm_jax.sharding import placed_batches
from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.hashes import canonical_hash
from llm_jax.training.step import Program


def stored_logps(s: Setup, reference: Origin) -> Columns:
    """`ref_chosen_logps` and `ref_rejected_logps`, float32[rows, P], for both splits.

    The file is named by the hash of the reference, the rows' manifest and the compute dtype, so that none of them can
    change under it.
    """
    key = canonical_hash(
        {
            "reference": {name: parent["hash"] for name, parent in s.workdir.read_config()["parents"].items()},
            "rows": json.loads((s.workdir.data / "manifest.json").read_text())["inputs"],
            "compute_dtype": s.config.train.compute_dtype,
        }
    )
    file = s.workdir.data / f"reference-{key}.npz"
    if not processes.from_first(file.exists):
        log(f"{s.node.name}: the reference's log-probabilities of {len(s.data.train) + len(s.data.eval)} rows")
        values = _compute(s, reference)
        if processes.first():
            _store(file, values)
        return values
    stored = np.load(io.BytesIO(file.read_bytes()))
    return {
        split: {name: stored[f"{split}/{name}"] for name in ("ref_chosen_logps", "ref_rejected_logps")}
        for split in ("train", "eval")
    }


def _store(file: epath.Path, values: Columns) -> None:
    flat = {f"{split}/{name}": array for split, arrays in values.items() for name, array in arrays.items()}
    packed = io.BytesIO()
    np.savez(packed, **flat)  # pyright: ignore[reportArgumentType]
    write_atomically(file, packed.getvalue())


def _compute(s: Setup, reference: Origin) -> Columns:
    decoder = Decoder(reference.model)
    params = load_merged(reference.path, mesh=s.config.mesh).params

    def score(params, rows):
        found = answer_logps(bind(decoder, params), jax.tree.map(lambda x: x[0], rows))
        return found["chosen_logps"], found["rejected_logps"]

    # Every process gets the numbers of all rows.
    whole = Program(s.plan, lambda *_: jax.jit(score, out_shardings=s.plan.sharding(PartitionSpec())))

    def over(rowset: RowSet) -> dict[str, np.ndarray]:
        loader = Loader(rowset, s.config.train.batch_size // s.config.train.microbatches, shuffle=False)
        batches = placed_batches(loader, s.plan, 0, len(loader))
        parts = [jax.device_get(whole(params, rows)) for rows in batches]
        chosen, rejected = (np.concatenate(side)[: len(rowset)] for side in zip(*parts, strict=True))
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    return {"train": over(s.data.train), "eval": over(s.data.eval)}
