"""The job `generate`: prompts from a file, or held-out word problems, to `samples.jsonl` in the workdir."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_jax.base.config import bind
from llm_jax.base.errors import UserError
from llm_jax.base.logging import log
from llm_jax.data import chat
from llm_jax.data.config import DataConfig
from llm_jax.data.formats import refuse_unread
from llm_jax.data.sources import list_files, read_records
from llm_jax.data.tokenizers import Tokenizer, load_tokenizer
from llm_jax.inference.generation_config import read_end_ids
from llm_jax.inference.requests import check_prompt, check_sampling
from llm_jax.jobs.config import GenerateConfig
from llm_jax.jobs.origin import Origin, check_tokenizer, origin
from llm_jax.sharding import check_divides, make_plan
from llm_jax.storage.atomic import write_atomically
from llm_jax.storage.hashes import file_sha256
from llm_jax.storage.workdir import Workdir, is_workdir

if TYPE_CHECKING:
    from llm_jax.inference.generator import Completion
    from llm_jax.jobs.graph import Node

Messages = Sequence[dict[str, Any]]


class TokenIds(list[int]):
    """A prompt that is encoded already."""


@dataclass(frozen=True)
class Prompt:
    """What is asked, and for a word problem what checks the answer."""

    where: str
    content: str | Messages | TokenIds
    """Text, messages, or token ids."""
    problem: Any = None
    adapter: str | None = None
    """Name of the adapter that answers it."""


def source_manifest(config: GenerateConfig) -> dict[str, Any]:
    """What the samples depend on beside the configuration and the model: the hashes of the prompts' files."""
    if config.prompts is None:
        return {"prompts": "held-out problems"}
    return {"prompts": {file.name: file_sha256(file) for file in list_files(config.prompts)}}


def check(node: "Node") -> None:
    """Everything that files can tell, before the model is trained or loaded. Raises UserError."""
    config: GenerateConfig = node.config
    if config.init_from is None:
        raise UserError("init_from is not set: generate needs a model")
    if config.batch_size < 1:
        raise UserError(f"batch_size is {config.batch_size}; it must be at least 1")
    if config.max_prompts is not None and config.max_prompts < 1:
        raise UserError(f"max_prompts is {config.max_prompts}; it must be at least 1, or None")
    make_plan(config.mesh)
    check_sampling(config.sampling)
    if config.prompts is not None:
        file_prompts(config.prompts, config.max_prompts)
    # A parent that is itself to be made has no tokenizer before its `prepare`.
    if not hasattr(node.parents["init_from"], "workdir"):
        prepare(node)


def prepare(node: "Node") -> None:
    """Fits prompts and mesh to the model, from its tokenizer and architecture alone: before it has weights."""
    config: GenerateConfig = node.config
    source, tokenizer = open_model(node.parents["init_from"], "init_from")
    model = source.model.resolved()
    check_divides(make_plan(config.mesh), model.cut_sizes())
    prompts = read_prompts(config, data_of(node))
    for prompt in prompts:
        ids = encode_prompt(tokenizer, prompt.content, config.raw)
        check_prompt(ids, prompt.where, model.max_position_embeddings, tokenizer.vocab_size)


def open_model(parent: Any, field: str) -> tuple[Origin, Tokenizer]:
    """Where a model lies and its tokenizer, which fits it. Raises UserError."""
    source = origin(parent, field)
    source.model.check_predicts(field)
    tokenizer = load_tokenizer(source.tokenizer)
    check_tokenizer(source.model, tokenizer.vocab_size, field)
    return source, tokenizer


def run(node: "Node") -> None:
    """Loads the model, decodes all prompts, and writes a line per sample."""
    from llm_jax.adapters.loading import load_merged
    from llm_jax.inference.generator import Generator

    config: GenerateConfig = node.config
    source, tokenizer = open_model(node.parents["init_from"], "init_from")
    prompts = read_prompts(config, data_of(node))
    ids = [encode_prompt(tokenizer, prompt.content, config.raw) for prompt in prompts]
    model = load_merged(source.path, mesh=config.mesh)
    generator = Generator(
        model,
        tokenizer,
        max_batch=config.batch_size * config.sampling.n,
        stop_ids=read_end_ids(source.tokenizer),
        plan=model.plan,
    )
    lines = []
    for done in generator.generate(ids, config.sampling):
        prompt = prompts[done.prompt]
        line = sample_line(prompt, done, tokenizer)
        if prompt.problem is not None:
            from llm_jax.data.embedded.problems import is_correct

            line |= {"answer": prompt.problem.answer, "correct": is_correct(prompt.problem, done.text)}
        lines.append(line)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(node.workdir.samples, text)
    checked = [line["correct"] for line in lines if "correct" in line]
    share = f", {sum(checked) / len(checked):.3f} correct" if checked else ""
    log(f"{len(lines)} samples of {len(prompts)} prompts in {node.workdir.samples}{share}")


def sample_line(prompt: Prompt, done: "Completion", tokenizer: Tokenizer) -> dict[str, Any]:
    """What is written of a sample. `tokens` where log-probabilities were asked for: each token with its own and the
    likeliest ones' at its place, in nats, under the model's own distribution."""
    line: dict[str, Any] = {
        "prompt": prompt.content,
        "sample": done.sample,
        "completion": done.text,
        "finish_reason": done.finish_reason,
        "num_tokens": len(done.tokens),
        "sum_logprobs": sum(done.logprobs),
    }
    if prompt.adapter is not None:
        line["adapter"] = prompt.adapter

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"id": token, "token": tokenizer.decode([token]), "logprob": logprob}

    if done.top_logprobs:
        line["tokens"] = [
            entry(token, logprob) | {"top": [entry(*pair) for pair in top]}
            for token, logprob, top in zip(done.tokens, done.logprobs, done.top_logprobs, strict=True)
        ]
    return line


def data_of(node: "Node") -> DataConfig:
    """Settings of the word problems: those the model was trained on, where it comes from a run that has them."""
    parent = node.parents["init_from"]
    if not isinstance(parent, str | os.PathLike):
        return getattr(parent.config, "data", None) or DataConfig()
    if not is_workdir(parent):
        return DataConfig()
    workdir = Workdir(parent)
    data = workdir.read_config()["config"].get("data")
    return DataConfig() if data is None else bind(DataConfig, data, where=f"{workdir.config}: data")


def read_prompts(config: GenerateConfig, data: DataConfig) -> list[Prompt]:
    """The prompts of the file, or held-out word problems (128 where max_prompts is None)."""
    if config.prompts is not None:
        return file_prompts(config.prompts, config.max_prompts)
    from llm_jax.data.corpus import held_out_problems

    problems = held_out_problems(data, config.max_prompts or 128)
    return [Prompt(f"problem {i}", [{"role": "user", "content": p.prompt}], p) for i, p in enumerate(problems)]


def file_prompts(path: str, max_prompts: int | None, adapters: Sequence[str] = ()) -> list[Prompt]:
    """Reads `{"prompt": text or messages}`, `{"messages": [...]}` and `{"prompt_ids": [...]}`.

    With several `adapters` each record has one of their names as its `adapter`, or null for the model alone; a single
    one is that of records that name none. Raises UserError naming file and line.
    """
    prompts = []
    for where, record in read_records(path, max_prompts):
        if not isinstance(record, dict) or not ({"prompt", "messages", "prompt_ids"} & record.keys()):
            raise UserError(f"{where}: a prompt has to be a JSON object with `prompt`, `messages` or `prompt_ids`")
        refuse_unread(record, where)
        if record.get("tools"):
            raise UserError(f"{where}: `tools` is not supported in prompts, and would be lost")
        if record.get("system"):
            raise UserError(f"{where}: `system` is not read here: make it the first of the messages")
        adapter = _adapter(record, where, adapters)
        if "prompt_ids" in record:
            ids = record["prompt_ids"]
            if not isinstance(ids, list) or not all(type(i) is int for i in ids):
                raise UserError(f"{where}: `prompt_ids` is not a list of integers")
            prompts.append(Prompt(where, TokenIds(ids), adapter=adapter))
            continue
        name = "prompt" if "prompt" in record else "messages"
        content = record[name]
        text = name == "prompt" and isinstance(content, str) and content
        messages = isinstance(content, list) and content and all(map(_is_message, content))
        if text or messages:
            prompts.append(Prompt(where, content, adapter=adapter))
        else:
            raise UserError(f"{where}: `{name}` is neither text nor a list of messages with `role` and `content`")
    return prompts


def _adapter(record: dict[str, Any], where: str, adapters: Sequence[str]) -> str | None:
    if "adapter" not in record:
        if len(adapters) > 1:
            raise UserError(
                f"{where}: no `adapter`, and there are {', '.join(adapters)}: name one, or null for the model alone"
            )
        return next(iter(adapters), None)
    name = record["adapter"]
    if not adapters:
        raise UserError(f"{where}: `adapter` is {name!r}, and no adapters are given")
    if name is not None and name not in adapters:
        raise UserError(f"{where}: there is no adapter {name!r}; there are {', '.join(adapters)}")
    return name


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def encode_prompt(tokenizer: Tokenizer, content: str | Messages | TokenIds, raw: bool) -> list[int]:
    """Ids of a prompt as the model expects it: its chat template around it where it has one; ids as they are.

    `raw`, or a tokenizer without a template: the text itself, with what the tokenizer puts before a text (a bos).
    Messages then are their contents, a line each.
    """
    if isinstance(content, TokenIds):
        return list(content)
    if raw or tokenizer.chat_template is None:
        text = content if isinstance(content, str) else "\n".join(m["content"] for m in content)
        return tokenizer.encode(text, add_special_tokens=True)
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    return chat.render(tokenizer, messages, add_generation_prompt=True)[0]
