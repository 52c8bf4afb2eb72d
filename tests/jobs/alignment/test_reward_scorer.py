"""Scores of a reward model: those of each conversation alone, whatever it is scored with."""

from pathlib import Path

import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.base.model_ref import ModelRef
from llm_jax.data import chat
from llm_jax.data.tokenizers import load_tokenizer
from llm_jax.jobs import graph
from llm_jax.jobs.alignment.prompts import Prompt
from llm_jax.jobs.alignment.scorers import BATCH, open_scorer
from llm_jax.jobs.config import ScorerConfig
from llm_jax.jobs.origin import origin
from llm_jax.models import HeadConfig, load, save, with_head
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
    assert sum(map(len, answers)) > BATCH
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
