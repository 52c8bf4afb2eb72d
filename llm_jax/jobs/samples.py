"""What a trained policy says to held-out prompts, beside what it said before: for a person to read, in the report."""

import itertools
import json
from collections.abc import Mapping
from typing import Any

import jax

from llm_jax.adapters.loading import load_merged
from llm_jax.base import processes
from llm_jax.base.logging import log
from llm_jax.data.corpus import examples
from llm_jax.data.examples import Kind, Pair, Unpaired
from llm_jax.data.stepwise import StepPair
from llm_jax.inference import Generator, SamplingParams
from llm_jax.jobs.alignment.prompts import Prompt
from llm_jax.jobs.alignment.sampler import encode
from llm_jax.jobs.fit import Hook
from llm_jax.jobs.origin import Origin
from llm_jax.jobs.setup import Setup
from llm_jax.jobs.word_problems import problem_count, trained_model
from llm_jax.models import Model
from llm_jax.storage.atomic import write_atomically
from llm_jax.training import weights_in_use

LOOKED_AT = 100
"""Held-out records of each source among which prompts are looked for that leave room for an answer."""


def sample_hook(s: Setup, before: Origin, kind: Kind) -> Hook:
    """Writes `samples.jsonl`: the first `task_eval.samples` held-out prompts, and what the models say to them greedily.

    The models stay where the run's mesh has them. Does nothing for a run that answers word problems, which are shown
    instead, nor where it is told to answer none (`task_eval.problems` 0); and says so where it is one of several
    processes.
    """
    asks = s.config.task_eval.problems is None and not problem_count(s.config)
    count = s.config.task_eval.samples if asks else 0

    def hook(state: Any) -> Mapping[str, float]:
        if count and processes.several():
            log(f"{s.node.name}: no samples, which one process alone draws")
        elif count:
            written(state)
        return {}

    def written(state: Any) -> None:
        asked, weights = _asked(s, kind, count), weights_in_use(state)
        said = [_said(load_merged(before.path, s.config.train.compute_dtype, s.config.mesh), s, asked)]
        adapting = s.adapting
        params = weights["policy"] if adapting is None else jax.jit(adapting.merged)(weights, state["frozen"])
        said.append(_said(trained_model(s, params, s.plan), s, asked))
        rows = [
            {"prompt": shown, "before": one, "after": two} for (shown, _), one, two in zip(asked, *said, strict=True)
        ]
        write_atomically(s.workdir.samples, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    return hook


def _asked(s: Setup, kind: Kind, count: int) -> list[tuple[str, list[int]]]:
    """Prompts as they are shown and as ids: of each source in turn, those that leave room and need no tools."""
    found: dict[str, list[int]] = {}
    sources = [itertools.islice(one, LOOKED_AT) for one in examples(kind, s.config.data, "eval").values()]
    for where, example in itertools.chain.from_iterable(zip(*sources, strict=False)):
        if not isinstance(example, Pair | Unpaired | StepPair) or example.tools:
            continue
        prefix = example.prefix if isinstance(example, StepPair) else ""
        ids = encode(s.tokenizer, Prompt(0, where, example.prompt), prefix)
        if len(ids) + s.config.task_eval.max_tokens <= s.decoder.config.max_position_embeddings:
            text = (
                example.prompt if isinstance(example.prompt, str) else "\n".join(m["content"] for m in example.prompt)
            )
            found.setdefault(text + prefix, ids)
    return list(found.items())[:count]


def _said(model: Model, s: Setup, asked: list[tuple[str, list[int]]]) -> list[str]:
    if not asked:
        return []
    params = SamplingParams(max_tokens=s.config.task_eval.max_tokens, temperature=0.0)
    done = Generator(model, s.tokenizer, max_batch=len(asked)).generate([ids for _, ids in asked], params)
    return [one.text for one in done]
