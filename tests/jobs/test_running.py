"""BCO's reward shift of all batches so far: what a step takes and leaves, and that a resumed run goes on from it."""

import json
from typing import Any

import jax
import numpy as np
import pytest

from llm_jax import objectives
from llm_jax.base.trees import flatten
from llm_jax.jobs import running
from llm_jax.jobs.graph import Node, run
from llm_jax.jobs.scoring import answer_logps, unpaired_logps
from llm_jax.models.decoder import Decoder
from llm_jax.models.init import init_params
from llm_jax.models.parameter import bind, declarations
from llm_jax.sharding.config import MeshConfig
from llm_jax.sharding.plan import make_plan
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.training import OptimizerConfig, init_state, make_optimizer, make_train_step
from tests.jobs.conftest import CONFIGS
from tests.jobs.test_preference_identities import ROWS, decoder, objective_of

BETA = 0.3
__all__ = ["decoder"]


def told(decoder: Decoder, kind: str, params: Any, reference: Any, rows: Any) -> tuple[Any, ...]:
    """Log-probabilities, the reference's, labels, and which answers are there, of all answers of a batch."""
    if kind == "unpaired":
        own, other = (unpaired_logps(bind(decoder, p), rows)["logps"] for p in (params, reference))
        return own, other, rows["label"] != 0, rows["answer_index"] >= 0
    own, other = (answer_logps(bind(decoder, p), rows) for p in (params, reference))
    there = rows["pair_index"] >= 0
    stacked = [np.stack([x["chosen_logps"], x["rejected_logps"]]) for x in (own, other)]
    return *stacked, np.stack([np.ones_like(there), np.zeros_like(there)]), np.stack([there, there])


@pytest.mark.parametrize(("kind", "name", "microbatches"), [("unpaired", "bco_unpaired", 2), ("paired", "bco", 1)])
def test_the_shift_is_of_all_batches_so_far(decoder: Decoder, kind: str, name: str, microbatches: int):
    plan, reference, policy = make_plan(MeshConfig(data=1)), init_params(decoder, 0), init_params(decoder, 1)
    declared = {"policy": declarations(decoder), "ref": declarations(decoder), running.ROLE: running.DECLARATIONS}
    rules = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0)
    optimizer = make_optimizer(rules, {name: declared[name] for name in ("policy", running.ROLE)}, 10)
    trained = {"policy": jax.tree.map(np.array, policy), running.ROLE: running.nothing_yet()}
    state = init_state(trained, optimizer, declared, plan, frozen={"ref": jax.tree.map(np.array, reference)})
    assert "running" not in state["params"]
    objective = objective_of(decoder, name, running_delta=True)
    step = make_train_step(objective, optimizer, plan, declared)
    before = None
    for half in range(2):
        rows = {key: x[8 * half : 8 * half + 8] for key, x in ROWS[kind].items()}
        given = told(decoder, kind, state["params"]["policy"], reference, rows)
        logps, ref_logps, labels, present = given
        delta, before = objectives.bco_delta(*given[:3], BETA, present, before)
        weights = np.broadcast_to(rows["weight"], labels.shape)
        sign = np.where(labels, 1.0, -1.0)
        losses = weights * np.logaddexp(0, -sign * (BETA * np.float64(logps - ref_logps) - float(delta)))
        count = present.sum() if kind == "unpaired" else present[0].sum()
        batch = {key: x.reshape(microbatches, -1, *x.shape[1:]) for key, x in rows.items()}
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], np.where(present, losses, 0).sum() / count, rtol=1e-5)
        assert not any(key.startswith("running") for key in metrics)
        for side, want in before.items():
            np.testing.assert_allclose(state["model_state"]["running"][side], want, rtol=2e-5, err_msg=side)
        alone = objectives.bco_delta(*given[:3], beta=BETA, present=present)[0]
        assert half == 0 or abs(delta - alone) > 1e-3, "the first batch makes no difference"


def test_a_resumed_run_goes_on_from_it(chain: dict[str, Node], tmp_path, monkeypatch):
    fields = {"init_from": chain["sft"].workdir.path, "loss_type": "bco", "running_delta": True, "mesh.data": 1}
    fields |= {"train.steps": 4, "train.checkpoint.every": 2, "train.log_every": 1, "task_eval.problems": 0}
    given = [(name, str(value)) for name, value in fields.items()]
    config = f"{CONFIGS / 'dpo.py'}:test"

    def go(name: str) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
        node = run(config, given, workdir=str(tmp_path / name))
        checkpoints, lines = Checkpoints(node.workdir.checkpoints), node.workdir.metrics.read_text().splitlines()
        shown = [{k: v for k, v in json.loads(line).items() if "perf/" not in k} for line in lines]
        return flatten(checkpoints.restore_numpy(4)), shown

    whole, lines = go("whole")
    assert whole["model_state/running/chosen"][1] > 0
    save, saved = Checkpoints.save, []

    def stopping(self, step, *arguments, **options):
        save(self, step, *arguments, **options)
        saved.append(step)
        if step == 2 and saved == [2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", stopping)
    with pytest.raises(KeyboardInterrupt):
        go("stopped")
    again, repeated = go("stopped")
    assert saved == [2, 4] and repeated == lines
    for name, array in whole.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
