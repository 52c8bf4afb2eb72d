"""What a policy says to the prompts of a user's own records, before and after it was trained on them."""

import json

import pytest

from llm_jax.adapters.loading import load_merged
from llm_jax.data.chat import render
from llm_jax.data.tokenizers import load_tokenizer
from llm_jax.inference import Generator, SamplingParams
from llm_jax.jobs.graph import run
from tests.jobs.conftest import CONFIGS


@pytest.mark.parametrize(
    "mesh",
    [{"mesh.data": 1}, {"mesh.data": -1, "mesh.zero": 3, "adapter.r": 2, "adapter.lora_alpha": 64}],
    ids=["one", "eight"],
)
def test_the_report_shows_them_side_by_side(chain, tmp_path, monkeypatch, mesh):
    monkeypatch.chdir(tmp_path)
    talks = [[{"role": "user", "content": f"Say {word}."}] for word in ("one", "two", "three")]
    records = [{"prompt": talk, "chosen": [_said("Yes.")], "rejected": [_said("No.")]} for talk in talks]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    fields = {
        "init_from": chain["sft"].workdir.path,
        **mesh,
        "data.path": "a.jsonl",
        "data.eval_path": "a.jsonl",
    }
    fields |= {"task_eval.problems": "none", "task_eval.samples": 2, "task_eval.max_tokens": 4, "train.steps": 2}
    fields |= {"train.optimizer.learning_rate": 0.05}
    node = run(f"{CONFIGS / 'dpo.py'}:test", [(name, str(value)) for name, value in fields.items()], workdir="w")
    shown = [json.loads(line) for line in node.workdir.samples.read_text().splitlines()]
    assert [row["prompt"] for row in shown] == ["Say one.", "Say two."]
    tokenizer = load_tokenizer(node.workdir.tokenizer)
    asked = [render(tokenizer, talk, add_generation_prompt=True)[0] for talk in talks[:2]]
    for name, folder in (("before", chain["sft"].workdir.path), ("after", node.workdir.path)):
        generator = Generator(load_merged(folder), tokenizer, max_batch=2)
        done = generator.generate(asked, SamplingParams(max_tokens=4, temperature=0.0))
        assert [row[name] for row in shown] == [one.text for one in done]
    assert shown[0]["before"] != shown[0]["after"]
    assert "Say one." in node.workdir.report.read_text()


def _said(text):
    return {"role": "assistant", "content": text}
