"""A training job of milliseconds, for tests of the loop; as a program it trains in a workdir like a door would.

python tests/training/tiny_job.py WORKDIR STEPS EVERY SLEEP

TINY_DEVICES virtual devices (2); LLM_JAX_COORDINATOR and its kin make it one of several processes.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

if __name__ == "__main__":
    devices = os.environ.get("TINY_DEVICES", "2")
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from llm_jax.base import processes
from llm_jax.base.door import run_door
from llm_jax.base.join import join, place
from llm_jax.sharding.config import MeshConfig
from llm_jax.sharding.plan import Plan, make_plan
from llm_jax.storage.workdir import Workdir
from llm_jax.training.config import CheckpointConfig, TrainConfig
from llm_jax.training.loop import TrainingJob

WIDTH = 64
ROWS = 40


class Rows:
    """Batches `[2, batch/2, WIDTH]` as a function of the step; row `poisoned` is NaN."""

    def __init__(self, batch_size: int, poisoned: int | None = None) -> None:
        self.batch_size, self.poisoned = batch_size, poisoned

    def indices(self, step: int) -> np.ndarray:
        return (np.arange(self.batch_size) * 7 + step * self.batch_size) % ROWS

    def iterate(self, start: int, stop: int, part: tuple[int, int] = (0, 1)) -> Iterator[dict[str, np.ndarray]]:
        for step in range(start, stop):
            rows = [np.random.default_rng(int(i)).standard_normal(WIDTH).astype(np.float32) for i in self.indices(step)]
            rows = [row * np.nan if i == self.poisoned else row for i, row in zip(self.indices(step), rows)]
            yield {"x": np.split(np.stack(rows).reshape(2, -1, WIDTH), part[1], axis=1)[part[0]]}


def loss_of(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["segments"]["w"])
    return jnp.mean((hidden @ params["out"] - x[..., :1]) ** 2)


def train_step(state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
    params, moments = state["params"]["policy"], state["opt_state"]["mu"]
    loss, grads = jax.value_and_grad(loss_of)(params, batch["x"])
    finite = jnp.isfinite(loss)
    moments = jax.tree.map(lambda m, g: 0.9 * m + g, moments, grads)
    new = {
        "params": {"policy": jax.tree.map(lambda p, m: p - 0.01 * m, params, moments)},
        "opt_state": {"mu": moments},
        "step": state["step"] + 1,
    }
    state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    grad_norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
    metrics = {"loss": loss, "grad_norm": grad_norm, "learning_rate": jnp.float32(0.01) * state["step"]}
    return state, metrics | {"num_tokens": jnp.float32(batch["x"].size), "finite": finite}


def initial() -> Any:
    keys = jax.random.split(jax.random.key(0))
    params = {
        "segments": {"w": jax.random.normal(keys[0], (WIDTH, 256)) * 0.1},
        "out": jax.random.normal(keys[1], (256, 1)) * 0.1,
    }
    zeros = jax.tree.map(jnp.zeros_like, params)
    return {"params": {"policy": params}, "opt_state": {"mu": zeros}, "step": jnp.zeros((), jnp.int32)}


def tiny_job(
    workdir: Workdir,
    config: TrainConfig,
    *,
    plan: Plan | None = None,
    poisoned: int | None = None,
    before_step: Callable[[], None] = lambda: None,
    finish: tuple[Callable[[Any], Mapping[str, Any]], ...] = (),
    **fields: Any,
) -> TrainingJob:
    plan = plan or make_plan(MeshConfig(), devices=jax.devices() if processes.several() else jax.devices()[:2])
    sharding = plan.sharding(PartitionSpec())
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), jax.eval_shape(initial)
    )
    compiled = jax.jit(train_step, donate_argnums=0)
    evaluate_loss = jax.jit(lambda state: loss_of(state["params"]["policy"], jnp.ones((2, WIDTH))))

    def step(state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        before_step()
        return compiled(state, batch)

    return TrainingJob(
        name="tiny",
        workdir=workdir,
        config=config,
        plan=plan,
        abstract_state=abstract,
        init=jax.jit(initial, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract)),
        train_step=step,
        loader=Rows(config.batch_size, poisoned),
        rows=ROWS,
        evaluate=lambda state: {"eval_loss": float(evaluate_loss(state))},
        finish=finish,
        **fields,
    )


def main(argv: list[str]) -> None:
    from llm_jax.training.loop import train

    workdir, steps, every, sleep = Workdir(argv[0]), int(argv[1]), int(argv[2]), float(argv[3])
    config = TrainConfig(
        steps=steps, batch_size=8, microbatches=2, log_every=7, eval_every=10, checkpoint=CheckpointConfig(every=every)
    )
    join(place({}, os.environ))
    with workdir.lock() if processes.first() else contextlib.nullcontext():
        job = tiny_job(
            workdir, config, before_step=lambda: time.sleep(sleep), finish=(lambda state: {"eval_final": 1.0},)
        )
        train(job)


if __name__ == "__main__":
    sys.exit(run_door(main, sys.argv[1:]))
