"""The held-out text of a base model, in nats per byte, beside the n-gram models it has to beat."""

import math

import numpy as np

from llm_jax.base import processes
from llm_jax.data import Loader
from llm_jax.data.baselines import interpolated_bigram_nats, unigram_nats, xz_bits_per_byte
from llm_jax.data.corpus import examples
from llm_jax.data.examples import Text
from llm_jax.jobs.fit import Hook
from llm_jax.jobs.setup import Setup
from llm_jax.models import declarations
from llm_jax.sharding import placed_batches
from llm_jax.training import Objective, make_eval_step


def text_hook(s: Setup, objective: Objective) -> Hook:
    """`eval_nats_per_byte`, `eval_bits_per_byte`, both n-gram models' nats per byte, and for files `xz -9`'s bits.

    Of embedded data the rows of the source `text` count, else all rows. All three models are scored on the same
    predicted tokens, and divided by the bytes of just these.
    """

    def hook(state) -> dict[str, float]:
        held_out = s.data.eval
        local = bool(s.config.data.path or s.config.data.mixture)
        names = held_out.manifest["sources"]
        columns = held_out.columns("source_id", "num_bytes")
        chosen = np.full(len(held_out), True) if local else columns["source_id"] == names.index("text")
        rows = np.flatnonzero(chosen)
        num_bytes = int(columns["num_bytes"][rows].sum())
        config = s.config.train
        loader = Loader(held_out, config.batch_size, config.microbatches, shuffle=False, subset=rows)
        eval_step = make_eval_step(objective, s.plan, {"policy": declarations(s.decoder)})
        batches = placed_batches(loader, s.plan, 0, len(loader))
        nats = sum(float(eval_step(state, batch)["loss/nll"][0]) for batch in batches)
        values = {
            "eval_nats_per_byte": nats / num_bytes,
            "eval_bits_per_byte": nats / num_bytes / math.log(2),
        }
        return values | processes.from_first(lambda: compared(rows, num_bytes, local))

    def compared(rows: np.ndarray, num_bytes: int, local: bool) -> dict[str, float]:
        held_out, chosen = s.data.eval, rows.tolist()
        values = {
            "eval_unigram_nats_per_byte": unigram_nats(s.data.train, held_out, chosen) / num_bytes,
            "eval_bigram_nats_per_byte": interpolated_bigram_nats(s.data.train, held_out, chosen) / num_bytes,
        }
        if local:
            sources = examples("pretrain", s.config.data, "eval").values()
            texts = (text.text for records in sources for _, text in records if isinstance(text, Text))
            values["eval_xz_bits_per_byte"] = xz_bits_per_byte(texts)
        return values

    return hook
