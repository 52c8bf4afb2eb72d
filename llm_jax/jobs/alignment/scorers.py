"""What says which answers are good: a checker, a reward model, a preference model, or anybody's function."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from llm_jax.adapters.loading import load_merged
from llm_jax.base.errors import UserError
from llm_jax.base.logging import warn
from llm_jax.data.turns import Messages
from llm_jax.jobs.alignment.checker import is_right
from llm_jax.jobs.alignment.functions import CallFailed, FunctionProcess
from llm_jax.jobs.alignment.prompts import Prompt
from llm_jax.jobs.answer_scores import compare, score
from llm_jax.jobs.config import ScorerConfig
from llm_jax.jobs.origin import Origin
from llm_jax.models.families.heads import PAIRWISE

Scores = list[np.ndarray | None]


class Scorer(Protocol):
    """Judges the answers to each of several prompts."""

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> Scores:
        """For each prompt, which has k answers: scores float64[k]; or of a pairwise judge float64[k, k], the
        probability that answer i is better than answer j, 1/2 on the diagonal; or None, where it has none.

        Raises UserError that names the prompt where it fails.
        """
        ...


@contextlib.contextmanager
def open_scorer(config: ScorerConfig, model: Origin | None) -> Iterator[Scorer]:
    """The scorer that a configuration names; `model` is where its reward model lies."""
    if config.kind == "answer":
        yield answer_scores
    elif config.kind == "function":
        assert config.function is not None
        with FunctionProcess(config.function, config.timeout) as process:
            yield FunctionScorer(process, config)
    else:
        assert model is not None
        yield RewardScorer(model)


def check_scorer(config: ScorerConfig) -> None:
    """Raises UserError for fields that contradict each other, and for a function that cannot be imported."""
    needs = {"reward": "model", "function": "function"}.get(config.kind)
    for name in ("model", "function"):
        value = getattr(config, name)
        if name == needs and value is None:
            raise UserError(f"scorer.{name} is not set: scorer.kind={config.kind} needs it")
        if name != needs and value is not None:
            raise UserError(f"scorer.{name}={value} is not read by scorer.kind={config.kind}")
    if not (config.timeout > 0 and math.isfinite(config.timeout)):
        raise UserError(f"scorer.timeout is {config.timeout}; it must be above 0")
    if config.kind != "function":
        for name in ("pairwise", "on_error"):
            if getattr(config, name) != getattr(ScorerConfig, name):
                raise UserError(f"scorer.{name}={getattr(config, name)} is not read by scorer.kind={config.kind}")
        return
    assert config.function is not None
    with FunctionProcess(config.function, config.timeout) as process:
        process.start()


def answer_scores(prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> Scores:
    """1 for each answer that ends in the right one, else 0."""
    return [
        np.array([float(is_right(prompt, text)) for text in texts])
        for prompt, texts in zip(prompts, answers, strict=True)
    ]


class RewardScorer:
    """A reward model's scores, as `llm_jax.score` has them; of a model that was trained with `pairwise` the
    probabilities of `llm_jax.compare`."""

    def __init__(self, source: Origin):
        self._model = load_merged(source.path)

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> Scores:
        pairwise = self._model.extra.get(PAIRWISE)
        return [(self._wins if pairwise else self._scores)(*asked) for asked in zip(prompts, answers, strict=True)]

    def _scores(self, prompt: Prompt, texts: Sequence[str]) -> np.ndarray:
        return score(self._model, [prompt.content] * len(texts), texts).astype(np.float64)

    def _wins(self, prompt: Prompt, texts: Sequence[str]) -> np.ndarray:
        wins = np.full((len(texts), len(texts)), 0.5)
        upper = [(i, j) for i in range(len(texts)) for j in range(i + 1, len(texts)) if texts[i] != texts[j]]
        sides = ([texts[pair[side]] for pair in upper] for side in (0, 1))
        found = compare(self._model, [prompt.content] * len(upper), *sides) if upper else []
        for (i, j), value in zip(upper, found, strict=True):
            wins[i, j], wins[j, i] = value, 1 - float(value)
        return wins


class FunctionScorer:
    """A Python function in a process of its own; see `ScorerConfig.function` for how it is called."""

    def __init__(self, process: FunctionProcess, config: ScorerConfig):
        self._process, self._config = process, config

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> Scores:
        return [self._one(prompt, texts) for prompt, texts in zip(prompts, answers, strict=True)]

    def _one(self, prompt: Prompt, texts: Sequence[str]) -> np.ndarray | None:
        k, pairwise = len(texts), self._config.pairwise
        places = [(i, j) for i in range(k) for j in range(i + 1, k)] if pairwise else [(i, i) for i in range(k)]
        sides = [text if isinstance(prompt.content, str) else list(said(text)) for text in texts]
        completions: list[Any] = [[sides[i], sides[j]] for i, j in places] if pairwise else sides
        asked = prompt.content if isinstance(prompt.content, str) else list(map(dict, prompt.content))
        columns = {name: [value] * len(places) for name, value in prompt.columns.items()}
        try:
            values = self._process.call(columns | {"prompts": [asked] * len(places), "completions": completions})
            found = _numbers(values, len(places), 1.0 if pairwise else math.inf)
        except CallFailed as failure:
            message = f"{prompt.where}: scorer.function={self._config.function} {failure}"
            if self._config.on_error == "error":
                raise UserError(f"{message}; scorer.on_error=skip would leave such prompts out") from None
            warn(f"{message}; the prompt is left out")
            return None
        if found is None or not pairwise:
            return found
        wins = np.full((k, k), 0.5)
        for (i, j), value in zip(places, found, strict=True):
            wins[i, j], wins[j, i] = value, 1 - value
        return wins


def said(text: str) -> Messages:
    """An answer as the assistant's turn, which is what stands behind messages."""
    return ({"role": "assistant", "content": text},)


def _numbers(values: Any, count: int, most: float) -> np.ndarray | None:
    """What a function returned as float64[count]; None where it has no score for one of them."""
    if not isinstance(values, list) or len(values) != count:
        raise CallFailed(f"returned {_shown(values)}, not a list of {count} numbers")
    if any(value is None for value in values):
        return None
    low = -math.inf if most == math.inf else 0.0
    for value in values:
        if isinstance(value, str | list | dict) or not math.isfinite(value) or not low <= value <= most:
            wanted = "a finite number" if most == math.inf else "a probability"
            raise CallFailed(f"returned {_shown(value)}, which is not {wanted}")
    return np.array(values, np.float64)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
