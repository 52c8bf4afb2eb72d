"""configs/generate.py:test, from the base model of the chain."""

import json

from llm_jax.jobs.graph import run
from tests.jobs.conftest import CONFIGS


def test_lines_with_answers_and_log_probabilities(chain, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    node = run(f"{CONFIGS / 'generate.py'}:test", [("init_from", str(chain["base"].workdir.path))])
    lines = [json.loads(line) for line in node.workdir.samples.read_text().splitlines()]
    assert node.is_done() and len(lines) == 6
    assert [line["sample"] for line in lines] == [0, 1] * 3
    for line in lines:
        assert isinstance(line["answer"], int) and line["correct"] in (True, False)
        assert 1 <= line["num_tokens"] == len(line["tokens"]) <= 8
        assert sum(token["logprob"] for token in line["tokens"]) == line["sum_logprobs"]
        assert all(len(token["top"]) == 3 for token in line["tokens"])
