"""What a reward model, a classifier, a preference model or a process reward model says of answers.

    scores = llm_jax.score("runs/reward-…", ["2 + 2?"], ["4"])

Answers are rendered as they were for training, each in a row of its own; equal calls give equal bits.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float

from llm_jax.adapters.loading import load_merged
from llm_jax.base.errors import UserError
from llm_jax.data.chat import with_template
from llm_jax.data.encode import Encoded, encode_examples
from llm_jax.data.examples import Completion, Example, Pair
from llm_jax.data.judged import Steps
from llm_jax.data.tokenizers import Tokenizer, load_tokenizer
from llm_jax.jobs.reward_terms import scored_segments
from llm_jax.models.families.heads import PAIRWISE
from llm_jax.models.loading import Model

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or messages."""
ROUNDED = 64
"""Rows are as long as a multiple of this, so that few shapes are compiled."""


def score(
    model: Model | epath.PathLike | Sequence[Model | epath.PathLike],
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    *,
    batch_size: int = 16,
) -> Float[np.ndarray, "n"] | Float[np.ndarray, "n labels"]:
    """Scores of `answers[i]` to `prompts[i]`: float32[n] of a reward model, float32[n, labels] of a classifier.

    Args:
        model: a model, or where it lies; or several of one kind (an ensemble, trained with different `train.seed`s):
            then every result has a leading axis of members, whose mean, spread or minimum is the caller's choice.
        prompts: texts, or messages, which the model's chat template renders with the answer as the assistant's turn.
        answers: as many.
        batch_size: rows that are run together.

    Raises:
        UserError: the model has no scores of texts, it compares (see `compare`) or judges steps (`step_scores`), an
            answer is empty, or a text is longer than the model's positions.
    """
    if isinstance(model, Sequence) and not isinstance(model, str):
        if not model:
            raise UserError("score: an ensemble of no model")
        return np.stack([score(member, prompts, answers, batch_size=batch_size) for member in model])
    opened = _open(model, "score")
    if opened.extra.get(PAIRWISE):
        raise UserError("score: the model compares two answers (pairwise=True); llm_jax.compare says which is better")
    _alike("score", prompts=prompts, answers=answers)
    found = _pooled(opened, _encoded(opened, map(_completion, prompts, answers), "sft"), batch_size)
    return found[:, 0] if found.shape[-1] == 1 else found


def compare(
    model: Model | epath.PathLike,
    prompts: Sequence[Prompt],
    first: Sequence[str],
    second: Sequence[str],
    *,
    batch_size: int = 16,
) -> Float[np.ndarray, "n"]:
    """P(first[i] is better than second[i] | prompts[i]), float32[n].

    Of a model trained with `pairwise=True`: σ(s(x, y₁, y₂) - s(x, y₂, y₁)), so that both orders add up to 1; the
    preferences need not be transitive. Of a reward model Bradley-Terry's σ(r₁ - r₂). Raises UserError as `score`.
    """
    opened = _open(model, "compare")
    if opened.config.head.labels != 1:
        raise UserError(f"compare: the model has {opened.config.head.labels} classes, and no one score of an answer")
    _alike("compare", prompts=prompts, first=first, second=second)
    if not opened.extra.get(PAIRWISE):
        one, other = (score(opened, prompts, side, batch_size=batch_size) for side in (first, second))
        return _sigmoid(one - other)
    pairs = (Pair(_prompt(x), _answer(x, a), _answer(x, b)) for x, a, b in zip(prompts, first, second, strict=True))
    scores = _pooled(opened, _encoded(opened, pairs, "compared"), batch_size)[:, 0].reshape(-1, 2)
    return _sigmoid(scores[:, 0] - scores[:, 1])


def step_scores(
    model: Model | epath.PathLike, prompts: Sequence[Prompt], steps: Sequence[Sequence[str]], *, batch_size: int = 16
) -> list[Float[np.ndarray, "steps labels"]]:
    """A process reward model's scores of every step of answers, read at the steps' ends: float32, before the softmax.

    A step's score depends on the prompt and the steps up to it, not on those after. Raises UserError as `score`.
    """
    opened = _open(model, "step_scores", pooled=False)
    _alike("step_scores", prompts=prompts, steps=steps)
    examples = [Steps(_prompt(x), tuple(s), (0,) * len(s)) for x, s in zip(prompts, steps, strict=True)]
    encoded = list(_encoded(opened, examples, "steps"))
    rows = _run(opened, encoded, batch_size, lambda tokens, segments: opened.scores(tokens, None, segments))
    return [row[np.flatnonzero(one.sequences[0].mask)] for row, one in zip((r for b in rows for r in b), encoded)]


def _open(model: Model | epath.PathLike | Any, what: str, pooled: bool = True) -> Model:
    opened = model if isinstance(model, Model) else load_merged(model)
    head = opened.config.head
    if head.labels is None:
        raise UserError(f"{what}: the model ends in logits of tokens and has no scores (see the job reward)")
    if pooled and head.pooling == "none":
        raise UserError(f"{what}: the model scores tokens, not texts; llm_jax.step_scores reads it at steps' ends")
    if not pooled and head.pooling != "none":
        raise UserError(f"{what}: the model scores whole texts, not steps; llm_jax.score reads it")
    return opened


def _tokenizer(model: Model) -> Tokenizer:
    if model.tokenizer_dir is None:
        raise UserError("the model's folder has no tokenizer, so texts cannot be scored")
    return load_tokenizer(model.tokenizer_dir)


def _alike(what: str, **lists: Sequence[Any]) -> None:
    if len({len(values) for values in lists.values()}) > 1:
        counts = ", ".join(f"{len(values)} {name}" for name, values in lists.items())
        raise UserError(f"{what}: there are {counts}; each prompt has one")


def _prompt(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else tuple(prompt)


def _answer(prompt: Prompt, answer: str) -> Any:
    return answer if isinstance(prompt, str) else ({"role": "assistant", "content": answer},)


def _completion(prompt: Prompt, answer: str) -> Completion:
    return Completion(_prompt(prompt), _answer(prompt, answer))


def _encoded(model: Model, examples: Iterable[Example], kind: Any) -> Iterable[Encoded]:
    tokenizer = _tokenizer(model)
    located = [(f"answer {i}", example) for i, example in enumerate(examples)]
    if any(not isinstance(getattr(example, "prompt", ""), str) for _, example in located):
        tokenizer = with_template(tokenizer, None)
    return encode_examples(kind, located, tokenizer)


def _pooled(model: Model, encoded: Iterable[Encoded], batch_size: int) -> Float[np.ndarray, "n labels"]:
    pad, pooling = _tokenizer(model).pad_id, model.config.head.pooling

    def scores(tokens: np.ndarray, segments: np.ndarray) -> Any:
        own = scored_segments(jnp.asarray(tokens), jnp.asarray(segments), pooling, pad)
        return model.scores(tokens, None, own)[:, 0]

    found = _run(model, list(encoded), batch_size, scores)
    return np.concatenate(found) if found else np.zeros((0, model.config.head.labels or 1), np.float32)


def _run(model: Model, encoded: Sequence[Encoded], batch_size: int, scores: Any) -> list[np.ndarray]:
    """`scores(tokens, segments)` of all sequences in order, a row each, batch by batch."""
    most = model.config.max_position_embeddings
    sequences = [(one.where, sequence.ids) for one in encoded for sequence in one.sequences]
    for where, ids in sequences:
        if len(ids) > most:
            raise UserError(f"{where}: with its prompt {len(ids)} tokens; the model has {most} positions")
    found = []
    for first in range(0, len(sequences), batch_size):
        chosen = [ids for _, ids in sequences[first : first + batch_size]]
        length = min(-(-max(map(len, chosen)) // ROUNDED) * ROUNDED, most)
        tokens, segments = np.zeros((2, batch_size, length), np.int32)
        for row, ids in enumerate(chosen):
            tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        found.append(np.asarray(scores(tokens, segments), np.float32)[: len(chosen)])
    return found


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + jnp.exp(-jnp.asarray(x, jnp.float32))))
