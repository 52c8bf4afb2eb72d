"""The methods that score whole answers: which samples of a prompt become pairs, and what a pair carries."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llm_jax.data.tokenizers import Tokenizer
from llm_jax.inference.generator import Completion
from llm_jax.jobs.alignment.choice import (
    Pair,
    above_over_below,
    best_over_worst,
    every_pair,
    some_of,
    spo_rewards,
    sppo_win_rates,
    win_probabilities,
)
from llm_jax.jobs.alignment.making import Made, PairMaker, prompt_seed
from llm_jax.jobs.alignment.prompts import Prompt, preference_record
from llm_jax.jobs.alignment.sampler import Sampler, encode
from llm_jax.jobs.alignment.scorers import Scorer
from llm_jax.jobs.config import PairsConfig, RoundsConfig


@dataclass(frozen=True)
class Method:
    """How the job `rounds` gets at the pairs of a method."""

    maker: str
    """`MODULE:NAME` of what makes a PairMaker of (config, tokenizer, scorer)."""
    scored: bool = True
    """Whether samples are scored; else no scorer is opened, and `scorer` and `pairs` have to be left alone."""
    samples: int = 2
    """Least number of samples per prompt."""
    written: bool = False
    """Whether each prompt has to come with an answer that somebody wrote."""
    answers: bool = False
    """Whether each prompt has to come with its right answer, whoever scores."""
    losses: tuple[str, ...] = ()
    """One of these has to be in `preference.loss_type`; none: whatever it names."""
    probabilities: bool = False
    """Whether its scores of the two answers are probabilities to win, as the loss `sppo` takes them."""


_HERE = "llm_jax.jobs.alignment.methods"
METHODS = {
    "iterative_dpo": Method(f"{_HERE}:ScoredPairs"),
    "iterative_rpo": Method(f"{_HERE}:ScoredPairs", losses=("rpo", "sft")),
    "online_dpo": Method(f"{_HERE}:ScoredPairs"),
    "spo": Method(f"{_HERE}:SelfPlayPairs"),
    "sppo": Method(f"{_HERE}:WinRatePairs", losses=("sppo", "sppo_hard"), probabilities=True),
    "step_dpo": Method("llm_jax.jobs.alignment.stepwise:StepPairs", scored=False, answers=True, samples=1),
    "mcts_dpo": Method("llm_jax.jobs.alignment.tree_search:TreePairs"),
    "spin": Method(f"{_HERE}:WrittenOverSampled", scored=False, samples=1, written=True, losses=("spin", "sigmoid")),
}


def scored(config: RoundsConfig) -> bool:
    """Whether anything is asked of the scorer: a tree that goes by the policy's own opinion alone has none."""
    return METHODS[config.method].scored and not (config.method == "mcts_dpo" and config.tree.value == "self")


def pair_maker(config: RoundsConfig, tokenizer: Tokenizer, scorer: Scorer | None) -> PairMaker:
    """The maker of `config.method`."""
    module, _, name = METHODS[config.method].maker.partition(":")
    return getattr(importlib.import_module(module), name)(config, tokenizer, scorer)


@dataclass(frozen=True)
class Answered:
    """A prompt with the samples of it that may be part of a pair."""

    prompt: Prompt
    answers: list[str]


class _Sampled(ABC):
    """Samples, scores and chooses; a method says how from the scores of one prompt."""

    def __init__(self, config: RoundsConfig, tokenizer: Tokenizer, scorer: Scorer | None):
        assert scorer is not None, "the job opens the scorer of a method that scores"
        self.config, self.tokenizer, self.scorer = config, tokenizer, scorer

    def __call__(self, chunk: Sequence[Prompt], sampler: Sampler, seed: int) -> Made:
        answered, counts = draw(chunk, sampler, seed, self.config, self.tokenizer)
        scores = self.scorer([one.prompt for one in answered], [one.answers for one in answered])
        counts |= dict.fromkeys(("scored", "score_sum", "skipped", "ties", "equal_answers"), 0)
        records = []
        for one, scored in zip(answered, scores, strict=True):
            if scored is None:
                counts["skipped"] += 1
                continue
            values, columns = self.judged(scored)
            counts["scored"] += len(values)
            counts["score_sum"] += float(values.sum())
            pairs = self.choose(values, prompt_seed(seed, one.prompt.number, "pairs"))
            different = [(i, j) for i, j in pairs if one.answers[i] != one.answers[j]]
            counts["ties"] += not pairs
            counts["equal_answers"] += len(pairs) - len(different)
            for i, j in different:
                record = preference_record(one.prompt, one.answers[i], one.answers[j], **columns(values, i, j))
                records.append(record)
        return Made(records, counts)

    @abstractmethod
    def judged(self, scored: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray, int, int], dict[str, float]]]:
        """Values [k] that pairs are chosen by, and the columns of a pair of them."""

    def choose(self, values: np.ndarray, seed: int) -> list[Pair]:
        return best_over_worst(values)

    def wins(self, scored: np.ndarray) -> np.ndarray:
        """P(y_i > y_j) of scores [k], or as a preference model gave it [k, k]."""
        return scored if scored.ndim == 2 else win_probabilities(scored, self.config.scorer.win_probability)


class ScoredPairs(_Sampled):
    """Pairs by score, as `pairs.choose` says: iterative DPO (Dong et al. 2024, Online-RLHF: the best over the worst of
    K), iterative RPO (Pang et al. 2024, arXiv:2404.19733: right over wrong ones), and online DPO (Guo et al. 2024,
    arXiv:2402.04792). A preference model's score of an answer is its mean probability to beat another.

    TRL's OnlineDPOTrainer has two samples and calls the first of equal ones chosen; here equal ones make no pair.
    """

    def judged(self, scored: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray, int, int], dict[str, float]]]:
        return spo_rewards(scored) if scored.ndim == 2 else scored, _two_scores

    def choose(self, values: np.ndarray, seed: int) -> list[Pair]:
        return chosen_pairs(values, self.config.pairs, seed)


class SelfPlayPairs(_Sampled):
    """SPO (Swamy et al. 2024, arXiv:2401.04056): the reward of a sample is how often it is preferred to the policy's
    other samples; the best over the worst, weighted by the difference of their rewards. The paper's own step is a
    policy gradient on these rewards."""

    def judged(self, scored: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray, int, int], dict[str, float]]]:
        def columns(values: np.ndarray, i: int, j: int) -> dict[str, float]:
            return {"weight": float(values[i] - values[j])} | _two_scores(values, i, j)

        return spo_rewards(self.wins(scored)), columns


class WinRatePairs(_Sampled):
    """SPPO (Wu et al. 2024, arXiv:2405.00675): the sample that wins most over the one that wins least, each with the
    probability that it beats the policy, which its loss regresses on."""

    def judged(self, scored: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray, int, int], dict[str, float]]]:
        return sppo_win_rates(self.wins(scored)), _two_scores


class WrittenOverSampled:
    """SPIN (Chen et al. 2024, arXiv:2401.01335): what somebody wrote over what the policy says; with several samples a
    pair each."""

    def __init__(self, config: RoundsConfig, tokenizer: Tokenizer, scorer: Scorer | None):
        self.config, self.tokenizer = config, tokenizer

    def __call__(self, chunk: Sequence[Prompt], sampler: Sampler, seed: int) -> Made:
        answered, counts = draw(chunk, sampler, seed, self.config, self.tokenizer, least=1)
        records, counts["equal_answers"] = [], 0
        for one in answered:
            written = one.prompt.written
            assert written is not None, "the job has checked that each prompt has one"
            different = [answer for answer in one.answers if answer.strip() != written.strip()]
            counts["equal_answers"] += len(one.answers) - len(different)
            records += [preference_record(one.prompt, written, answer) for answer in different]
        return Made(records, counts)


def draw(
    chunk: Sequence[Prompt], sampler: Sampler, seed: int, config: RoundsConfig, tokenizer: Tokenizer, least: int = 2
) -> tuple[list[Answered], dict[str, float]]:
    """`sampling.n` samples of each prompt, and counts: `samples`, `tokens`, `truncated`, `empty`, and `too_few`, the
    prompts left out since fewer than `least` samples of them say something and had come to an end."""
    params = [replace(config.sampling, seed=prompt_seed(seed, prompt.number)) for prompt in chunk]
    done = sampler.generate([encode(tokenizer, prompt) for prompt in chunk], params)
    drop = config.pairs.truncated == "drop"
    counts: dict[str, float] = {
        "samples": len(done),
        "tokens": sum(len(one.tokens) for one in done),
        "truncated": sum(is_truncated(one) for one in done),
        "empty": sum(not one.text.strip() for one in done),
    }
    by_prompt: dict[int, list[str]] = {}
    for one in done:
        if one.text.strip() and not (drop and is_truncated(one)):
            by_prompt.setdefault(one.prompt, []).append(one.text)
    answered = [Answered(prompt, by_prompt.get(i, [])) for i, prompt in enumerate(chunk)]
    kept = [one for one in answered if len(one.answers) >= least]
    return kept, counts | {"too_few": len(answered) - len(kept)}


def is_truncated(done: Completion) -> bool:
    """Whether `max_tokens` or the model's positions ended a sample."""
    return done.finish_reason == "length"


def chosen_pairs(scores: np.ndarray, config: PairsConfig, seed: int) -> list[Pair]:
    """Pairs of one prompt's samples as the configuration says."""
    if config.choose == "max_min":
        return best_over_worst(scores)
    if config.choose == "thresholds":
        assert config.above is not None and config.below is not None
        return some_of(above_over_below(scores, config.above, config.below), config.most, seed)
    return some_of(every_pair(scores), config.most, seed)


def _two_scores(values: np.ndarray, i: int, j: int) -> dict[str, Any]:
    return {"chosen_score": float(values[i]), "rejected_score": float(values[j])}
