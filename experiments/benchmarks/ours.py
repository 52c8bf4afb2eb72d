"""Our worker: the jitted step as a job runs it, with the metrics it logs; and a hand-written one of the same model."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
import workload
from sides import serve

from llm_jax.base.runtime import keep_memory
from llm_jax.jobs.scoring import score_rows
from llm_jax.jobs.terms import sft_objective
from llm_jax.models import Decoder, ModelConfig, bind, declarations, init_params, load
from llm_jax.sharding import MeshConfig, make_plan
from llm_jax.training import Objective, OptimizerConfig, init_state, make_optimizer, make_train_step

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


def stepper(decoder: Decoder, objective: Objective, batch: dict[str, np.ndarray], params: Any = None) -> Step:
    """A step that trains all of a model. `params`: None draws them."""
    params = init_params(decoder, seed=0) if params is None else params
    return step_of(objective, batch, {"policy": params}, {"policy": declarations(decoder)})


def step_of(
    objective: Objective,
    batch: dict[str, np.ndarray],
    trained: dict[str, Any],
    declared: dict[str, Any],
    frozen: dict[str, Any] | None = None,
) -> Step:
    """What `training.loop` does for a step, with its result fetched; parameters and declarations by role."""
    plan = make_plan(MeshConfig())
    config = OptimizerConfig(**workload.OPTIMIZER, schedule="constant")
    optimizer = make_optimizer(config, {"policy": declared["policy"]}, 1000)
    state = init_state(trained, optimizer, declared, plan, frozen=frozen)
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


def one_microbatch(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: x[None] for name, x in rows.items()}


def train_step(model: str, rows: int, length: int) -> Step:
    decoder = make_decoder(model)
    batch = one_microbatch(language_rows(workload.tokens(model, rows, length)))
    return stepper(decoder, sft_objective(decoder), batch)


def train_folder(folder: str, vocab: int, rows: int, length: int) -> Step:
    model = load(folder)
    batch = one_microbatch(language_rows(workload.random_tokens(vocab, rows, length)))
    return stepper(model.decoder, sft_objective(model.decoder), batch, model.params)


def sft_packed(model: str, rows: int, length: int) -> Step:
    decoder = make_decoder(model)
    return stepper(
        decoder, sft_objective(decoder), one_microbatch(packed_rows(workload.documents(model, rows, length), length))
    )


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
    "handwritten": handwritten,
}


def work(tasks: Mapping[str, Callable[..., Step]]) -> None:
    """A worker's whole life: its first argument names the task and its options."""
    keep_memory()  # As every command of llm_jax does.
    options = json.loads(sys.argv[1])
    task = options.pop("task")
    serve(task, tasks[task](**options))


if __name__ == "__main__":
    work(TASKS)
