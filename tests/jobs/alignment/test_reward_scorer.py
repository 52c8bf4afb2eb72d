"""Scores of a reward model: those of each conversation alone, whatever it is scored with."""

import json
from pathlib import Path

import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.base.model_ref import ModelRef
from llm_jax.data import chat
from llm_jax.data.tokenizers import load_tokenizer
from llm_jax.jobs import graph
from llm_jax.jobs.alignment.checks import check_judge
from llm_jax.jobs.alignment.prompts import Prompt
from llm_jax.jobs.alignment.scorers import open_scorer
from llm_jax.jobs.answer_scores import compare
from llm_jax.jobs.config import ScorerConfig
from llm_jax.jobs.origin import origin
from llm_jax.models import HeadConfig, load, save, with_head
from llm_jax.models.families.heads import PAIRWISE
from tests.jobs.alignment.conftest import CONFIG, overrides

ASKED = ({"role": "user", "content": "Ben has 3 pens. How many?"},)


def judge(chain, folder: Path, labels: int = 1) -> Path:
    model = load(chain["sft"].workdir.path)
    model.tokenizer_dir = chain["sft"].workdir.tokenizer
    scored = with_head(model, HeadConfig(labels=labels), seed=0)
    scored.tokenizer_dir = model.tokenizer_dir
    save(scored, folder)
    return folder


def test_each_answer_as_alone(chain, tmp_path):
    folder = judge(chain, tmp_path / "judge")
    model, tokenizer = load(folder), load_tokenizer(folder)
    prompts = [Prompt(i, f"f:{i}", ASKED if i else "Ben has 3 pens. ") for i in range(12)]
    answers = [[f"{i} and {j}" * (1 + j) for j in range(3)] for i in range(12)]
    with open_scorer(ScorerConfig(kind="reward", model=ModelRef("judge")), origin(folder, "scorer.model")) as scorer:
        scores = scorer(prompts, answers)
    for prompt, texts, found in zip(prompts, answers, scores, strict=True):
        assert found is not None
        for text, score in zip(texts, found, strict=True):
            if isinstance(prompt.content, str):
                ids = [*tokenizer.encode(prompt.content + text, add_special_tokens=True), tokenizer.eos_id]
            else:
                ids, _ = chat.render(tokenizer, [*ASKED, {"role": "assistant", "content": text}])
            assert score == pytest.approx(float(model.scores(np.array([ids]))[0, 0, 0]), abs=1e-6)
    assert len({round(float(score), 6) for found in scores if found is not None for score in found}) > 30


def test_a_run_with_a_reward_model(chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    judge(chain, tmp_path / "judge")
    judge(chain, tmp_path / "two", labels=2)

    def given(name):
        return [*overrides(chain), ("scorer.kind", "reward"), ("scorer.function", "none"), ("scorer.model", name)]

    node = graph.prepare(CONFIG, given("judge"))
    assert node.record()["parents"]["scorer.model"]["path"] == str(tmp_path / "judge")
    assert node.hash != graph.resolve(CONFIG, overrides(chain)).hash
    with pytest.raises(UserError, match="two gives 2 scores; a reward model gives one score to a text"):
        graph.prepare(CONFIG, given("two"))


def test_a_model_that_compares_gives_probabilities(chain, tmp_path):
    folder = judge(chain, tmp_path / "judge")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {PAIRWISE: True}))
    texts = ["It is 3.", "4, I think", "It is 3."]
    with open_scorer(ScorerConfig(kind="reward", model=ModelRef("judge")), origin(folder, "scorer.model")) as scorer:
        (wins,) = scorer([Prompt(0, "f:1", ASKED)], [texts])
    (first,) = compare(folder, [ASKED], texts[:1], texts[1:2])
    assert wins is not None and wins[0, 1] == pytest.approx(float(first), abs=1e-6) and wins[0, 1] != 0.5
    np.testing.assert_allclose(wins + wins.T, 1.0, atol=1e-7)
    assert wins[0, 2] == 0.5
    # A tree scores one answer at a time.
    with pytest.raises(UserError, match="judge compares two answers .*; method=mcts_dpo scores one at a time"):
        check_judge(origin(folder, "scorer.model"), "mcts_dpo")
    check_judge(origin(folder, "scorer.model"), "spo")
