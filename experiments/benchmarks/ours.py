"""Our worker: the jitted step as a job runs it, with the metrics it logs; and a hand-written one of the same model."""

import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import workload
from sides import serve

from llm_jax.base.runtime import keep_memory
from llm_jax.jobs.config import PreferenceConfig
from llm_jax.jobs.paired import paired_objective
from llm_jax.jobs.preference_loss import preference_loss
from llm_jax.jobs.scoring import score_rows
from llm_jax.jobs.terms import sft_objective
from llm_jax.models import Decoder, ModelConfig, bind, declarations, init_params, load
from llm_jax.sharding import MeshConfig, make_plan
from llm_jax.training import OptimizerConfig, init_state, make_optimizer, make_train_step

Step = Callable[[], float]
ROW = ("tokens", "segment_ids", "positions", "loss_mask")


def make_decoder(name: str, **more: Any) -> Decoder:
    """A model of `workload.MODELS`, with further fields of its config."""
    shape = workload.MODELS[name]
    return Decoder(
        ModelConfig(
            vocab_size=shape["vocab"],
            hidden_size=shape["width"],
            intermediate_size=shape["inner"],
            num_layers=shape["layers"],
            num_heads=shape["heads"],
            **more,
        )
    )


def stepper(
    decoder: Decoder, objective: Any, batch: dict[str, np.ndarray], live: bool = False, params: Any = None
) -> Step:
    """What `training.loop` does for a step, with its result fetched. `params`: None draws them."""
    plan = make_plan(MeshConfig())
    declared = {"policy": declarations(decoder)} | ({"ref": declarations(decoder)} if live else {})
    config = OptimizerConfig(**workload.OPTIMIZER, schedule="constant")
    optimizer = make_optimizer(config, {"policy": declared["policy"]}, 1000)
    params = init_params(decoder, seed=0) if params is None else params
    frozen = {"ref": init_params(decoder, seed=0)} if live else {}
    state = init_state({"policy": params}, optimizer, declared, plan, frozen=frozen)
    train_step = make_train_step(objective, optimizer, plan, declared)
    rows = plan.activation_sharding((None, "batch"))

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, jax.device_put(batch, rows))
        return float(jax.device_get(metrics)["loss"])

    return step


def language_rows(tokens: np.ndarray) -> dict[str, np.ndarray]:
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    ones = np.ones_like(tokens)
    return dict(zip(ROW, (tokens, ones, positions, ones.astype(np.uint8))))


def packed_rows(documents: list[list[tuple[np.ndarray, int]]], length: int) -> dict[str, np.ndarray]:
    """Documents of each row one after another, the rest padding; what follows the prompt is a target."""
    out = {name: np.zeros((len(documents), length), np.int32) for name in ROW}
    for r, row in enumerate(documents):
        start = 0
        for segment, (ids, prompt) in enumerate(row, 1):
            here = slice(start, start + len(ids))
            out["tokens"][r, here], out["segment_ids"][r, here] = ids, segment
            out["positions"][r, here] = np.arange(len(ids))
            out["loss_mask"][r, start + prompt : here.stop] = 1
            start = here.stop
    return out | {"loss_mask": out["loss_mask"].astype(np.uint8)}


def pair_rows(model: str, length: int) -> dict[str, np.ndarray]:
    """Pairs packed into windows, first fit by size, as `llm_jax.data` does."""
    windows: list[list[dict[str, list[int]]]] = []

    def size(pair: dict[str, list[int]]) -> int:
        return 2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"])

    for pair in sorted(workload.pairs(model), key=size, reverse=True):
        fits = (w for w in windows if sum(map(size, w)) + size(pair) <= length)
        window = next(fits, None)
        if window is None:
            windows.append(window := [])
        window.append(pair)
    documents = [
        [
            (np.array(pair["prompt_ids"] + pair[side]), len(pair["prompt_ids"]))
            for pair in window
            for side in ("chosen_ids", "rejected_ids")
        ]
        for window in windows
    ]
    out = packed_rows(documents, length)
    segments = out["segment_ids"]
    most, number = max(map(len, windows)), 0
    out |= {"pair_id": (segments + 1) // 2, "side": np.where(segments == 0, 0, 2 - segments % 2).astype(np.int32)}
    out["pair_index"] = np.full((len(windows), most), -1, np.int32)
    for r, window in enumerate(windows):
        out["pair_index"][r, : len(window)] = number + np.arange(len(window))
        number += len(window)
    for side in ("chosen", "rejected"):
        out[f"ref_{side}_logps"] = np.full((len(windows), most), -600.0, np.float32)
    return out


def one_microbatch(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: x[None] for name, x in rows.items()}


def train_step(model: str, rows: int, length: int) -> Step:
    decoder = make_decoder(model)
    batch = one_microbatch(language_rows(workload.tokens(model, rows, length)))
    return stepper(decoder, sft_objective(decoder), batch)


def train_folder(folder: str, vocab: int, rows: int, length: int) -> Step:
    model = load(folder)
    batch = one_microbatch(language_rows(workload.random_tokens(vocab, rows, length)))
    return stepper(model.decoder, sft_objective(model.decoder), batch, params=model.params)


def sft_packed(model: str, rows: int, length: int) -> Step:
    decoder = make_decoder(model)
    return stepper(
        decoder, sft_objective(decoder), one_microbatch(packed_rows(workload.documents(model, rows, length), length))
    )


def preference(model: str, live: bool, length: int) -> Step:
    decoder = make_decoder(model)
    batch = one_microbatch(pair_rows(model, length))
    loss = preference_loss(PreferenceConfig(beta=workload.BETA))
    objective = paired_objective(decoder, loss, "live" if live else "stored")
    return stepper(decoder, objective, batch, live)


def handwritten(model: str, rows: int, length: int) -> Step:
    """The same model, loss and metrics in a jitted function of its own, with optax: no plan, terms or state."""
    decoder = make_decoder(model)
    batch = jax.device_put(language_rows(workload.tokens(model, rows, length)))
    o = workload.OPTIMIZER
    decays = jax.tree.map(lambda d: d.decay, declarations(decoder))
    tx = optax.chain(
        optax.clip_by_global_norm(o["clip_norm"]),
        optax.adamw(o["learning_rate"], o["beta1"], o["beta2"], o["eps"], weight_decay=o["weight_decay"], mask=decays),
    )
    params = init_params(decoder, seed=0)

    def loss_of(params: Any) -> tuple[Any, Any]:
        scores, mask = score_rows(bind(decoder, params), batch, ("logps", "entropy", "is_top1"))
        return -scores["logps"].sum() / mask.sum(), (scores["entropy"].sum(), scores["is_top1"].sum())

    def update(params: Any, state: Any) -> tuple[Any, Any, Any]:
        (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, (loss, metrics, optax.global_norm(grads))

    update = jax.jit(update, donate_argnums=(0, 1))
    state = jax.jit(tx.init)(params)

    def step() -> float:
        nonlocal params, state
        params, state, metrics = update(params, state)
        return float(jax.device_get(metrics)[0])

    return step


TASKS = {
    "train_step": train_step,
    "train_folder": train_folder,
    "sft_packed": sft_packed,
    "preference": preference,
    "handwritten": handwritten,
}

if __name__ == "__main__":
    keep_memory()  # As every command of llm_jax does.
    options = json.loads(sys.argv[1])
    task = options.pop("task")
    serve(task, TASKS[task](**options))
