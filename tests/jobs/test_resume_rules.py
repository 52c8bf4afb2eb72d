"""Every rule, with average, dropout, NEFTune, z-loss and frozen layers: stopped and started is never stopped."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import pytest

from llm_jax.base.trees import flatten
from llm_jax.jobs.regularization import Regularization
from llm_jax.jobs.terms import sft_objective
from llm_jax.models import Decoder, ModelConfig, abstract_params, declarations, init_params, layout, load, regroup
from llm_jax.models.segments import Grouping
from llm_jax.sharding import MeshConfig, make_plan
from llm_jax.storage.workdir import Workdir
from llm_jax.training import (
    CheckpointConfig,
    OptimizerConfig,
    TrainConfig,
    TrainingJob,
    abstract_state,
    evaluate,
    init_state,
    make_eval_step,
    make_optimizer,
    make_train_step,
    train,
    weights_in_use,
)
from tests.jobs.batches import Document, document_rows

SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_layers": 3, "num_heads": 4}
CONFIG = ModelConfig(**SIZES, embed_init_std=1.0)
EXTRA = Regularization(0.01, 5.0, 0.1, 0.1)
BATCH, WINDOW, DECAY = 8, 12, 0.9


class Rows:
    def iterate(self, start: int, stop: int, part: tuple[int, int] = (0, 1)) -> Iterator[dict[str, np.ndarray]]:
        assert part == (0, 1)
        for step in range(start, stop):
            random = np.random.default_rng(step)
            rows = random.integers(32, size=(BATCH, 11))
            documents = [[Document(part, np.ones(len(part), bool)) for part in (row[:5], row[5:])] for row in rows]
            yield {name: x.reshape(2, -1, *x.shape[1:]) for name, x in document_rows(documents, WINDOW).items()}

    def indices(self, step: int) -> range:
        return range(step * BATCH, (step + 1) * BATCH)


def job(
    folder, rule: str, steps: int, grouping: Grouping = "scan", freeze=(r"layers\.1\.",), extra=EXTRA
) -> TrainingJob:
    decoder = Decoder(CONFIG, segments=grouping)
    declared = {"policy": declarations(decoder)}
    plan = make_plan(MeshConfig(2, 1, 3), devices=jax.devices()[:2])
    fields = OptimizerConfig(rule=rule, learning_rate=0.01, schedule="constant")  # type: ignore[arg-type]
    optimizer = make_optimizer(fields, declared, 4, freeze=freeze, layouts={"policy": layout(decoder)})
    workdir = Workdir(folder)
    workdir.path.mkdir(parents=True, exist_ok=True)
    checkpoint = CheckpointConfig(every=100, keep_last=9)
    return TrainingJob(
        name=rule,
        workdir=workdir,
        config=TrainConfig(steps=steps, batch_size=BATCH, microbatches=2, log_every=1, checkpoint=checkpoint),
        plan=plan,
        abstract_state=abstract_state({"policy": abstract_params(decoder)}, optimizer, declared, plan, ema=True),
        init=lambda: init_state({"policy": init_params(decoder, 0)}, optimizer, declared, plan, ema=True),
        train_step=make_train_step(sft_objective(decoder, extra), optimizer, plan, declared, ema_decay=DECAY),
        loader=Rows(),
        rows=1000,
        layout=layout(decoder),
        regroup=regroup,
    )


@pytest.mark.parametrize("rule", ["adamw", "lion", "adafactor", "muon", "sgd"])
def test_resumes_bit_for_bit(tmp_path, rule):
    whole = train(job(tmp_path / "whole", rule, 4))
    train(job(tmp_path / "cut", rule, 2))
    cut = train(job(tmp_path / "cut", rule, 4))
    assert jax.tree.structure(cut) == jax.tree.structure(whole)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(cut), jax.device_get(whole))
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("cut", "whole")]
    got, want = ([line.split('"perf/')[0] for line in each] for each in lines)
    assert got == want and '"loss/z_loss"' in got[0]


@pytest.mark.parametrize("rule", ["adafactor", "muon"])
def test_goes_on_under_another_grouping(tmp_path, rule):
    """Two steps with layers apart, two stacked: what rules keep is restacked, factored moments too."""
    quiet = {"freeze": (), "extra": Regularization()}
    whole = train(job(tmp_path / "whole", rule, 4, **quiet))
    train(job(tmp_path / "cut", rule, 2, grouping="unrolled", **quiet))
    cut = train(job(tmp_path / "cut", rule, 4, **quiet))
    for path, want in flatten(whole).items():
        got, want = np.asarray(flatten(cut)[path]), np.asarray(want)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max(), err_msg=path)


def test_the_average_is_what_evaluation_and_children_take(tmp_path):
    """ema = decay ema + (1 - decay) params from the initial values, step by step; torch's and optax's formula."""
    states: list[Any] = [jax.device_get(train(job(tmp_path / str(n), "adamw", n))) for n in (1, 2)]
    ema: Any = init_params(Decoder(CONFIG), 0)
    for state in states:
        ema = optax.incremental_update(state["params"]["policy"], ema, 1 - DECAY)
    for path, want in flatten(ema).items():
        np.testing.assert_allclose(flatten(states[1]["ema"]["policy"])[path], want, rtol=1e-6, atol=1e-7)
    assert weights_in_use(states[1]) is states[1]["ema"]

    made = job(tmp_path / "2", "adamw", 2)
    shardings = {path: leaf.sharding for path, leaf in flatten(made.abstract_state["params"]).items()}
    assert shardings == {path: leaf.sharding for path, leaf in flatten(made.abstract_state["ema"]).items()}

    plain = sft_objective(Decoder(CONFIG))
    step = make_eval_step(plain, made.plan, {"policy": declarations(Decoder(CONFIG))})
    batches = list(Rows().iterate(7, 9))
    got, averaged = (
        evaluate(step, plain, state, batches)["loss"]
        for state in (states[1], {**states[1], "params": states[1]["ema"], "ema": states[1]["ema"]})
    )
    without = evaluate(step, plain, {k: v for k, v in states[1].items() if k != "ema"}, batches)["loss"]
    assert got == averaged != without

    (tmp_path / "2" / "model.json").write_text(json.dumps(dataclasses.asdict(CONFIG)))
    (tmp_path / "2" / "config.json").write_text("{}")
    loaded = load(tmp_path / "2")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(dict(loaded.params)), states[1]["ema"]["policy"])
