"""Held-out word problems, answered greedily: how many are right, and how many show their steps."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.adapters.loading import load_merged
from llm_jax.adapters.merging import plain_decoder
from llm_jax.base import processes
from llm_jax.data import Tokenizer, held_out_problems, load_tokenizer
from llm_jax.data.embedded.problems import Problem, is_careful, is_correct
from llm_jax.inference import Generator, SamplingParams
from llm_jax.jobs.fit import Hook, policy_of
from llm_jax.jobs.generate import encode_prompt
from llm_jax.jobs.origin import Origin
from llm_jax.jobs.setup import Setup
from llm_jax.models import Model
from llm_jax.sharding import Plan
from llm_jax.storage.atomic import write_atomically

DEFAULT_PROBLEMS = 400
MAX_BATCH = 256


def problem_hook(s: Setup, before: Origin | None = None) -> Hook:
    """Answers the held-out problems with the trained model, and the first few with the model `before` too.

    Writes `samples.jsonl` for the report. Does nothing for data without a checkable answer, unless
    `task_eval.problems` asks for it. Of several processes the first answers, on its own device, and the others wait.
    """
    task, data, count = s.config.task_eval, s.config.data, problem_count(s.config)

    def hook(state: Any) -> Mapping[str, float]:
        if not count:
            return {}
        params = policy_of(state, s.adapting)
        return processes.from_first(lambda: answered(params))

    def answered(params: Any) -> Mapping[str, Any]:
        problems = held_out_problems(data, count)
        model = trained_model(s, params)
        metrics, records = _answers(model, s.tokenizer, problems, task.max_tokens)
        shown = [
            {"prompt": r["prompt"], "answer": r["answer"], "completion": r["completion"]}
            for r in records[: task.samples]
        ]
        if before is not None and shown:
            tokenizer = load_tokenizer(before.tokenizer)
            _, earlier = _answers(load_merged(before.path), tokenizer, problems[: len(shown)], task.max_tokens)
            for row, record in zip(shown, earlier, strict=True):
                row["before"], row["after"] = record["completion"], row.pop("completion")
        write_atomically(s.workdir.samples, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in shown))
        return metrics

    return hook


def problem_count(config: Any) -> int:
    """How many held-out problems a run is to answer."""
    task, data = config.task_eval, config.data
    if task.problems is not None:
        return task.problems
    checkable = data.path is None and not data.mixture and data.embedded in ("problems", "steps")
    return DEFAULT_PROBLEMS if checkable else 0


def trained_model(s: Setup, params: Any, plan: Plan | None = None) -> Model:
    """The policy's parameters, an adapter in them, as a model: spread as `plan` says, or on one device."""
    decoder = s.decoder if s.adapting is None else plain_decoder(s.adapting.adapters, s.decoder)
    return Model(decoder, params, decoder.config, s.workdir.tokenizer, plan=plan)


def _answers(model: Model, tokenizer: Tokenizer, problems: Sequence[Problem], max_tokens: int):
    generator = Generator(model, tokenizer, max_batch=MAX_BATCH)
    return answer_problems(generator, tokenizer, problems, max_tokens)


def encode_prompts(tokenizer: Tokenizer, problems: Sequence[Problem]) -> list[list[int]]:
    """Each problem as a user's turn; for a model without a chat template as the text that it continues."""
    return [encode_prompt(tokenizer, problem.prompt, raw=False) for problem in problems]


def answer_problems(
    generator: Generator, tokenizer: Tokenizer, problems: Sequence[Problem], max_tokens: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Answers every problem greedily.

    Returns:
      `eval_exact_match` (the last `Answer: N` is right), the same by number of steps, `eval_careful` (the share that
      shows a step before it answers), and one record per problem: prompt, completion, answer, right or wrong.
    """
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    completions = generator.generate(encode_prompts(tokenizer, problems), params)
    by_steps: dict[int, list[bool]] = defaultdict(list)
    records = []
    for problem, completion in zip(problems, completions, strict=True):
        right = is_correct(problem, completion.text)
        by_steps[len(problem.steps)].append(right)
        records.append(
            {
                "prompt": problem.prompt,
                "completion": completion.text,
                "answer": problem.answer,
                "correct": right,
                "careful": is_careful(completion.text),
            }
        )
    metrics = {
        "eval_exact_match": _share(record["correct"] for record in records),
        "eval_careful": _share(record["careful"] for record in records),
    }
    for steps, rights in sorted(by_steps.items()):
        metrics[f"eval_exact_match/{steps}_steps"] = _share(rights)
    return metrics, records


def _share(flags: Any) -> float:
    flags = list(flags)
    return sum(flags) / len(flags)
