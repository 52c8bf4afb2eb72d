"""Step-DPO's pairs from the policy's own answers: the first wrong step, and one that leads to the right answer.

Lai et al. 2024 (arXiv:2406.18629), section 3.2: of an answer that comes to a wrong result the first wrong step is
located, the policy goes on from the right steps before it, and the first step of a continuation that comes to the right
result is preferred to it. The authors had GPT-4 or people locate the step; here its equations do, or the continuations
themselves (Wang et al. 2023, arXiv:2312.08935: a step is right that leads to a right answer).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llm_jax.data.embedded import stepwise
from llm_jax.data.steps import first_false_mark, split_steps
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.inference.generator import Completion
from llm_jax.jobs.alignment.checker import is_right
from llm_jax.jobs.alignment.making import Made, prompt_seed
from llm_jax.jobs.alignment.methods import is_truncated
from llm_jax.jobs.alignment.prompts import Prompt, step_record
from llm_jax.jobs.alignment.sampler import Sampler, encode
from llm_jax.jobs.alignment.scorers import Scorer
from llm_jax.jobs.config import RoundsConfig


@dataclass(frozen=True)
class _Wrong:
    """A wrong answer, and how many of its steps are right; None while that is not known."""

    prompt: Prompt
    steps: list[str]
    right: int | None

    def prefix(self, count: int) -> str:
        return "".join(self.steps[:count])


def first_wrong_step(prompt: Prompt, steps: Sequence[str]) -> int | None:
    """The first step whose equations are wrong; None where none is, or none can be read."""
    if prompt.problem is not None:
        return stepwise.first_wrong_step(prompt.problem, steps)
    return first_false_mark(steps)


class StepPairs:
    """The maker of `method=step_dpo`."""

    def __init__(self, config: RoundsConfig, tokenizer: Tokenizer, scorer: Scorer | None):
        del scorer  # an answer's result is checked, and so are its steps
        self.config, self.tokenizer = config, tokenizer

    def __call__(self, chunk: Sequence[Prompt], sampler: Sampler, seed: int) -> Made:
        counts: dict[str, float] = dict.fromkeys(COUNTS, 0)
        drawn = self._continued([(prompt, "") for prompt in chunk], sampler, seed, counts)
        wrong: list[_Wrong] = []
        for prompt, answers in zip(chunk, drawn, strict=True):
            texts = [done.text for done in answers if not is_truncated(done) and done.text.strip()]
            counts["right"] += sum(is_right(prompt, text) for text in texts)
            own = self._located(prompt, [text for text in dict.fromkeys(texts) if not is_right(prompt, text)], counts)
            wrong += own[: self.config.steps.most]
        return Made(self._corrected(wrong, sampler, seed, counts), counts)

    def _located(self, prompt: Prompt, texts: Sequence[str], counts: dict[str, float]) -> list[_Wrong]:
        """Wrong answers with the place of their first wrong step, one of those that differ in nothing before it."""
        found: dict[tuple[str, ...], _Wrong] = {}
        for text in texts:
            steps = split_steps(text)
            if self.config.steps.locate == "continuations":
                found.setdefault(tuple(steps), _Wrong(prompt, steps, None))
                continue
            first = first_wrong_step(prompt, steps)
            if first is None:
                counts["not_located"] += 1
            else:
                found.setdefault(tuple(steps[: first + 1]), _Wrong(prompt, steps, first))
        return list(found.values())

    def _corrected(
        self, wrong: Sequence[_Wrong], sampler: Sampler, seed: int, counts: dict[str, float]
    ) -> list[dict[str, object]]:
        """Goes on from the right steps of each answer, where these are not known from any of its steps."""
        begun: list[tuple[int, int]] = []
        for number, one in enumerate(wrong):
            begun += [(number, count) for count in (range(len(one.steps)) if one.right is None else (one.right,))]
        asked = [(wrong[number].prompt, wrong[number].prefix(count)) for number, count in begun]
        drawn = self._continued(asked, sampler, prompt_seed(seed, 0, "resampled"), counts) if asked else []
        better = {
            place: self._right_continuation(wrong[place[0]], place[1], answers)
            for place, answers in zip(begun, drawn, strict=True)
        }
        records = []
        for number, one in enumerate(wrong):
            right = one.right
            if right is None:
                # The last place from which a right answer was still reached; the step taken there is the wrong one.
                right = max((c for c in range(len(one.steps)) if better[number, c] is not None), default=0)
            text = better[number, right]
            if text is None:
                counts["not_corrected"] += 1
                continue
            continued = split_steps(text)
            if continued[0].strip() == one.steps[right].strip():
                counts["equal_steps"] += 1
                continue
            ends = (len(continued) == 1, right == len(one.steps) - 1)
            records.append(step_record(one.prompt, one.prefix(right), continued[0], one.steps[right], ends))
        return records

    def _right_continuation(self, one: _Wrong, count: int, answers: Sequence[Completion]) -> str | None:
        """The first continuation behind so many steps that comes to the right result by steps that are not wrong."""
        before = one.steps[:count]
        for done in answers:
            if is_truncated(done) or not done.text.strip() or not is_right(one.prompt, "".join(before) + done.text):
                continue
            if first_wrong_step(one.prompt, [*before, *split_steps(done.text)]) is None:
                return done.text
        return None

    def _continued(
        self, asked: Sequence[tuple[Prompt, str]], sampler: Sampler, seed: int, counts: dict[str, float]
    ) -> list[list[Completion]]:
        """`sampling.n` continuations of each prompt and prefix, in one call."""
        ids = [encode(self.tokenizer, prompt, prefix) for prompt, prefix in asked]
        seeds = [prompt_seed(seed, prompt.number, prefix) for prompt, prefix in asked]
        done = sampler.generate(ids, [replace(self.config.sampling, seed=one) for one in seeds])
        counts["samples"] += len(done)
        counts["tokens"] += sum(len(one.tokens) for one in done)
        counts["truncated"] += sum(map(is_truncated, done))
        drawn: list[list[Completion]] = [[] for _ in asked]
        for one in done:
            drawn[one.prompt].append(one)
        return drawn


COUNTS = ("samples", "tokens", "truncated", "right", "not_located", "not_corrected", "equal_steps")
