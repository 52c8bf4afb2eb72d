"""The job: prompts to samples.jsonl, and what it finds before the model is loaded."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest

from llm_jax.base.config import to_dict
from llm_jax.base.errors import UserError
from llm_jax.data.config import DataConfig, EmbeddedConfig
from llm_jax.data.corpus import held_out_problems
from llm_jax.inference.config import SamplingParams
from llm_jax.jobs import generate
from llm_jax.jobs.config import GenerateConfig
from llm_jax.jobs.word_problems import encode_prompts
from llm_jax.sharding.config import MeshConfig
from llm_jax.storage.workdir import FORMAT, Workdir

SAMPLING = SamplingParams(max_tokens=6, temperature=0.8, n=2, ignore_eos=True)
ONE = MeshConfig(data=1)


def make_node(folder, tmp_path, **changes) -> Any:
    config = GenerateConfig(init_from=str(folder), batch_size=2, sampling=SAMPLING, mesh=ONE)  # type: ignore[arg-type]
    config = dataclasses.replace(config, **changes)
    workdir = Workdir(tmp_path / "run")
    workdir.path.mkdir()
    return SimpleNamespace(config=config, parents={"init_from": str(folder)}, workdir=workdir, hash="0")


def run(node):
    generate.source_manifest(node.config)
    generate.check(node)
    generate.prepare(node)
    generate.run(node)
    return [json.loads(line) for line in node.workdir.samples.read_text().splitlines()]


def test_a_line_per_prompt_and_sample(folder, tmp_path):
    file = tmp_path / "prompts.jsonl"
    records = [{"prompt": "Ben"}, {"messages": [{"role": "user", "content": "has"}]}, {"prompt": "pencils"}]
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    lines = run(make_node(folder, tmp_path, prompts=str(file)))
    assert [(line["prompt"], line["sample"]) for line in lines] == [
        (record.get("prompt", record.get("messages")), sample) for record in records for sample in (0, 1)
    ]
    assert all(line["num_tokens"] == 6 and line["finish_reason"] == "length" for line in lines)
    assert len({line["completion"] for line in lines}) > 3


def test_held_out_problems_are_checked(folder, tmp_path):
    node = make_node(folder, tmp_path, max_prompts=3)
    parent = SimpleNamespace(
        workdir=SimpleNamespace(path=folder),
        config=SimpleNamespace(data=DataConfig(generated=EmbeddedConfig(max_operations=1))),
    )
    node.parents["init_from"] = parent
    node.config = dataclasses.replace(node.config, raw=True)
    lines = run(node)
    assert len(lines) == 6
    assert all(line["correct"] in (True, False) and isinstance(line["answer"], int) for line in lines)


def test_settings_of_the_problems_come_from_a_workdir_made_elsewhere(folder, tmp_path):
    data = DataConfig(generated=EmbeddedConfig(max_operations=1))
    made = Workdir(tmp_path / "made")
    made.path.mkdir()
    record = {"format": FORMAT, "job": "sft", "config": {"data": to_dict(data)}}
    made.write_config(record)
    node = make_node(folder, tmp_path)
    assert generate.data_of(node) == DataConfig()  # a Hugging Face folder's config.json says nothing of them
    node.parents["init_from"] = made.path
    assert generate.data_of(node) == data
    made.write_config({**record, "config": {}})
    assert generate.data_of(node) == DataConfig()
    made.write_config({**record, "config": {"data": {"windw": 3}}})
    with pytest.raises(UserError, match=r"made/config.json: data.windw"):
        generate.data_of(node)


def test_held_out_problems_need_neither_template_nor_bos(tiny):
    bare = SimpleNamespace(chat_template=None, bos_id=None, encode=lambda text, add_special_tokens: [7, 8])
    problems = held_out_problems(DataConfig(), 2)
    assert encode_prompts(bare, problems) == [[7, 8]] * 2  # type: ignore[arg-type]
    ids = encode_prompts(tiny.tokenizer, problems)
    assert all(row[0] == tiny.tokenizer.bos_id for row in ids)


def test_manifest_follows_the_prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n')
    config = GenerateConfig(prompts=str(file))
    before = generate.source_manifest(config)
    assert before == generate.source_manifest(config)
    file.write_text('{"prompt": "b"}\n')
    assert before != generate.source_manifest(config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt"', "prompts.jsonl:2: not JSON"),
        ('{"text": "a"}\n', "prompts.jsonl:1: a prompt has to be"),
        ('{"prompt": "a", "tools": [1]}\n', "prompts.jsonl:1: `tools` is not supported"),
        ('{"prompt": "a", "system": "s"}\n', "prompts.jsonl:1: `system` is not read"),
        ('{"prompt": ""}\n', "prompts.jsonl:1: `prompt` is neither"),
        ('{"messages": [{"role": "user"}]}\n', "prompts.jsonl:1: `messages` is neither"),
        ("", "is empty"),
    ],
)
def test_bad_prompts_name_file_and_line(folder, tmp_path, content, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        generate.check(make_node(folder, tmp_path, prompts=str(file)))


def test_a_prompt_too_long_is_found_before_loading(folder, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "' + "Zoë " * 99 + '"}\n')
    node = make_node(folder, tmp_path, prompts=str(file))
    message = r"prompts.jsonl:2 has \d+ tokens; the model's 96"
    with pytest.raises(UserError, match=message):
        generate.check(node)
    node.parents["init_from"] = SimpleNamespace(workdir=SimpleNamespace(path=folder), config=None)
    generate.check(node)  # of a parent still to be made nothing is known yet
    with pytest.raises(UserError, match=message):
        generate.prepare(node)


def test_config_without_a_model_or_with_bad_sampling_or_mesh(folder, tmp_path):
    node = make_node(folder, tmp_path)
    node.config = dataclasses.replace(node.config, sampling=SamplingParams(top_p=3.0))
    with pytest.raises(UserError, match="top_p"):
        generate.check(node)
    for mesh, message in ((MeshConfig(data=3), "mesh data=3"), (MeshConfig(data=1, tensor=8), "mesh.tensor=8")):
        node.config = dataclasses.replace(node.config, sampling=SAMPLING, mesh=mesh)
        with pytest.raises(UserError, match=message):
            generate.check(node)
    node.config = dataclasses.replace(node.config, init_from=None)
    with pytest.raises(UserError, match="init_from"):
        generate.check(node)
