"""A stacked model small enough to read: embedding, residual MLP blocks by scan, head; its rows and its objectives."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.sharding import compute_weights, constrain
from llm_jax.training.terms import Objective

V, D, F, L, T = 32, 16, 32, 3, 6


@dataclass(frozen=True)
class Declared:
    axes: tuple[str, ...]
    decay: bool = True
    learned: bool = True

    @property
    def matrix(self):
        """The last two axes of what is no norm, as models.Declaration has it."""
        last = len(self.axes) - 1
        return None if "norm" in self.axes else ((last - 1,), (last,))


DECLARATIONS = {
    "embed": {"weight": Declared(("vocab", "embed"))},
    "layers": {
        "norm": Declared(("layers", "norm"), decay=False),
        "up": Declared(("layers", "embed", "mlp")),
        "down": Declared(("layers", "mlp", "embed")),
    },
    "head": {"weight": Declared(("embed", "vocab"))},
}
SHAPES = {
    "embed": {"weight": (V, D)},
    "layers": {"norm": (L, D), "up": (L, D, F), "down": (L, F, D)},
    "head": {"weight": (D, V)},
}


def init(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32), SHAPES, is_leaf=lambda x: type(x) is tuple
    )


def use_weights(tree, declared, *, sliced=False):
    axes = jax.tree.map(lambda d: d.axes[1:] if sliced else d.axes, declared)
    return compute_weights(tree, axes)


def forward(params, tokens):
    """float32 logits [B, T, V]."""
    hidden = use_weights(params["embed"], DECLARATIONS["embed"])["weight"][tokens]

    def block(hidden, layer):
        w = use_weights(layer, DECLARATIONS["layers"], sliced=True)
        hidden = constrain(hidden, ("batch", "length", "embed"))
        inner = jax.nn.silu((hidden * (1 + w["norm"])) @ w["up"])
        return hidden + constrain(inner, ("batch", "length", "mlp")) @ w["down"], None

    hidden, _ = jax.lax.scan(block, hidden, params["layers"])
    head = use_weights(params["head"], DECLARATIONS["head"])["weight"]
    return constrain((hidden @ head).astype(jnp.float32), ("batch", "length", "vocab"))


def nll(params, rows):
    logps = jax.nn.log_softmax(forward(params, rows["tokens"]))
    return -jnp.take_along_axis(logps, rows["targets"][..., None], -1)[..., 0] * rows["mask"]


def rows(seed: int, microbatches: int, total: int = 32) -> dict[str, np.ndarray]:
    """The same rows however they are cut; masks of very different lengths, some empty."""
    rng = np.random.default_rng(seed)
    mask = np.arange(T) < rng.integers(0, T + 1, (total, 1)) * (np.arange(total)[:, None] % 5 != 0)
    flat = {
        "tokens": rng.integers(0, V, (total, T), dtype=np.int32),
        "targets": rng.integers(0, V, (total, T), dtype=np.int32),
        "mask": mask.astype(np.float32),
    }
    return {name: x.reshape(microbatches, total // microbatches, *x.shape[1:]) for name, x in flat.items()}


def token_mean() -> Objective:
    def terms(params, frozen, rows, statistics, key):
        losses = nll(params["policy"], rows)
        longest = jnp.sum(rows["mask"].sum(-1) > 0)
        return {"nll": losses.sum()}, {"rows": (longest.astype(jnp.float32), jnp.float32(0))}

    return Objective(terms=terms, weights=lambda batch: {"nll": batch["mask"].sum()})


def several() -> Objective:
    """Tokens' mean, a term against the batch's mean, and one against the batch's sorted values, of the same model."""

    def per_row(params, rows):
        return nll(params, rows).sum(-1)

    def statistics(params, frozen, rows, key):
        return {"loss": per_row(params["policy"], rows), "other": per_row(frozen["ref"], rows)}

    def terms(params, frozen, rows, statistics, key):
        losses = nll(params["policy"], rows)
        mine = losses.sum(-1)
        every = statistics.everything
        mean = every["loss"].mean()
        own = statistics.values["loss"][statistics.index]
        # 1-D optimal transport: the i-th smallest of the policy's rows against the i-th smallest of the reference's
        rank = (own[:, None] > every["loss"][None, :]).sum(-1)
        partner = jnp.sort(every["other"])[rank]
        sums = {"nll": losses.sum(), "spread": jnp.sum((mine - mean) ** 2), "transport": jnp.sum((mine - partner) ** 2)}
        return sums, {"accuracy": (jnp.sum(losses < 3.0), jnp.float32(losses.size))}

    def weights(batch):
        count = jnp.float32(batch["tokens"].shape[0] * batch["tokens"].shape[1])
        return {"nll": batch["mask"].sum(), "spread": count, "transport": count}

    return Objective(terms, weights, {"spread": 0.02, "transport": 0.01}, statistics)
