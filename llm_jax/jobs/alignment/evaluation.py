"""Held-out prompts, answered greedily after each round: how many are right."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from llm_jax.base.errors import UserError
from llm_jax.data.embedded.problems import is_careful
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.inference.config import SamplingParams
from llm_jax.jobs.alignment.checker import is_right
from llm_jax.jobs.alignment.prompts import Prompt, read_prompts
from llm_jax.jobs.alignment.sampler import Sampler, encode
from llm_jax.jobs.config import RoundsConfig

DEFAULT_PROMPTS = 400


def held_out(config: RoundsConfig) -> list[Prompt]:
    """The prompts that are asked after each round: those with an answer to check, `task_eval.problems` at most.

    Raises UserError where these are asked for and none has an answer.
    """
    count = config.task_eval.problems
    if count == 0:
        return []
    prompts = read_prompts(config.data, "eval", DEFAULT_PROMPTS if count is None else count)
    checkable = [prompt for prompt in prompts if prompt.answer is not None]
    if count is not None and not checkable:
        raise UserError(f"task_eval.problems={count}: no held-out prompt comes with an answer to check")
    return checkable


def evaluated(sampler: Sampler, tokenizer: Tokenizer, prompts: Sequence[Prompt], max_tokens: int) -> dict[str, Any]:
    """`metrics` and `answers`, JSON values.

    Metrics: `eval_exact_match`, the share of right final answers; `eval_length`, tokens of an answer on average;
    `eval_truncated`, the share that `max_tokens` cut off; of word problems also `eval_careful`, the share that show a
    step before they answer, and `eval_exact_match/N_steps`. Answers, one per prompt in order: `prompt`, `completion`,
    `answer`, `correct`, and of word problems `steps`, how many there are.
    """
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    done = sampler.generate([encode(tokenizer, prompt) for prompt in prompts], params)
    by_steps: dict[int, list[bool]] = defaultdict(list)
    answers = []
    for prompt, one in zip(prompts, done, strict=True):
        right = is_right(prompt, one.text)
        asked = prompt.content if isinstance(prompt.content, str) else prompt.content[-1]["content"]
        answers.append({"prompt": asked, "completion": one.text, "answer": prompt.answer, "correct": right})
        if prompt.problem is not None:
            steps = len(prompt.problem.steps)
            answers[-1]["steps"] = steps
            by_steps[steps].append(right)
    metrics = {
        "eval_exact_match": _mean(answer["correct"] for answer in answers),
        "eval_length": _mean(len(one.tokens) for one in done),
        "eval_truncated": _mean(one.finish_reason == "length" for one in done),
    }
    if by_steps:
        metrics["eval_careful"] = _mean(is_careful(answer["completion"]) for answer in answers)
    metrics |= {f"eval_exact_match/{steps}_steps": _mean(rights) for steps, rights in sorted(by_steps.items())}
    return {"metrics": metrics, "answers": answers}


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)
