"""pretrain -> SFT -> DPO at test size: what each run leaves, and that the next run finds it."""

import json
import math

import numpy as np
import pytest

import llm_jax
from llm_jax.data import load_tokenizer
from llm_jax.inference import Generator, SamplingParams
from llm_jax.jobs.graph import run
from tests.jobs.conftest import CONFIGS

STAGES = ("base", "sft", "dpo")


def metrics(node) -> list[dict]:
    return [json.loads(line) for line in node.workdir.metrics.read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_leaves_what_the_readme_names(chain, stage):
    workdir = chain[stage].workdir
    for path in (workdir.config, workdir.metrics, workdir.report, workdir.samples, workdir.done):
        assert path.exists(), path
    assert (workdir.export / "config.json").exists() and (workdir.export / "tokenizer.json").exists()
    assert chain[stage].is_done()


def test_dpo_starts_at_log_2(chain):
    """Policy and reference are the same model at the first step (Rafailov et al. 2023, eq. 7 at 0)."""
    loss = held_out_loss_at_step_0(chain["dpo"])
    assert loss == pytest.approx(math.log(2), rel=1e-6)


def held_out_loss_at_step_0(node) -> float:
    from llm_jax.data import Loader
    from llm_jax.jobs.origin import origin
    from llm_jax.jobs.paired import paired_objective
    from llm_jax.jobs.preference_loss import preference_loss
    from llm_jax.jobs.reference import stored_logps
    from llm_jax.jobs.scoring import answer_logps
    from llm_jax.jobs.setup import setup
    from llm_jax.models import declarations
    from llm_jax.training import evaluate, make_eval_step

    s = setup(node, "preference")
    reference = origin(node.parents["init_from"], "init_from")
    loader = Loader(s.data.eval, 8, shuffle=False)
    for name, array in stored_logps(s, reference, answer_logps)["eval"].items():
        loader.extra(name, array)
    objective = paired_objective(s.decoder, preference_loss(node.config))
    step = make_eval_step(objective, s.plan, {"policy": declarations(s.decoder)})
    state = {
        "params": {"policy": llm_jax.load(reference.path, mesh=llm_jax.MeshConfig()).params},
        "frozen": {},
        "model_state": {},
    }
    return evaluate(step, objective, state, loader.iterate(0, 1))["loss"]


@pytest.mark.parametrize("stage", STAGES)
def test_metrics_carry_trl_names(chain, stage):
    names = set().union(*metrics(chain[stage]))
    expected = {"loss", "grad_norm", "learning_rate", "num_tokens", "entropy", "mean_token_accuracy", "eval_loss"}
    if stage == "dpo":
        expected |= {"rewards/margins", "logps/chosen", "logits/rejected", "eval_rewards/accuracies"}
    if stage == "base":
        expected |= {"eval_nats_per_byte", "eval_bigram_nats_per_byte", "eval_unigram_nats_per_byte"}
    assert expected | {"eval_exact_match", "eval_careful"} <= names


def test_the_export_is_the_model(chain):
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    workdir = chain["dpo"].workdir
    ours, exported = llm_jax.load(workdir.path)(tokens), llm_jax.load(workdir.export)(tokens)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(exported))


def test_the_export_says_where_a_turn_ends(chain):
    """transformers reads `generation_config.json`: without the end of turn there, a chat would go on and on."""
    tokenizer = load_tokenizer(chain["dpo"].workdir.tokenizer)
    ends = json.loads((chain["dpo"].workdir.export / "generation_config.json").read_text())["eos_token_id"]
    assert {tokenizer.eos_id, tokenizer.end_of_turn_id} <= set(ends)


def test_a_finished_run_decodes(chain):
    path = chain["dpo"].workdir.path
    model, tokenizer = llm_jax.load(path), load_tokenizer(chain["dpo"].workdir.tokenizer)
    (completion,) = Generator(model, tokenizer).generate(
        [tokenizer.encode("def load(path):")], SamplingParams(max_tokens=5)
    )
    assert 1 <= len(completion.tokens) <= 5


def test_the_same_command_again_trains_nothing(chain, monkeypatch):
    monkeypatch.chdir(chain["dpo"].workdir.path.parent.parent)
    before = chain["dpo"].workdir.metrics.read_bytes()
    node = run(f"{CONFIGS / 'dpo.py'}:test")
    assert node.workdir.path == chain["dpo"].workdir.path and node.workdir.metrics.read_bytes() == before


def test_the_report_needs_no_network(chain):
    page = chain["dpo"].workdir.report.read_text()
    assert "<svg" in page and "eval_exact_match" in page
    assert (
        "<script" not in page
        and "src=" not in page
        and "@import" not in page
        and "http" not in page.split("</style>")[0]
    )
