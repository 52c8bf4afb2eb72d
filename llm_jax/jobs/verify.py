"""Whether two models are one: weights to the last bit, what they compute, and what they say."""

import numpy as np

from llm_jax.base.errors import RunError
from llm_jax.inference import Generator, SamplingParams
from llm_jax.models.loading import Model
from llm_jax.models.saving import checksum

TOKENS, GREEDY_TOKENS = 32, 16


def verify(model: Model, again: Model, exact: bool) -> str:
    """How the two compare on a few random tokens, in a line.

    Greedy tokens are of models that predict the next one; of others there are logits or scores alone.

    Raises:
        RunError: `exact`, and a weight, a logit or a greedy token differs.
    """
    config = model.config
    length = min(TOKENS, config.max_position_embeddings)
    tokens = np.random.RandomState(0).randint(0, config.vocab_size or 1, (2, length)).astype(np.int32)
    what = "logits" if config.head.labels is None else "scores"
    outputs = [each(tokens) if what == "logits" else each.scores(tokens) for each in (model, again)]
    one, two = (np.asarray(output, np.float32) for output in outputs)
    off = float(np.abs(one - two).max() / max(1.0, float(np.abs(one).max())))
    said = f"{what} differ by {off:.1e} of the largest"
    differs = off > 0
    if what == "logits" and config.causal:
        prompt = tokens[:1, : max(1, length // 2)].tolist()
        count = min(GREEDY_TOKENS, length - len(prompt[0]))
        params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        greedy = [Generator(each).generate(prompt, params)[0].tokens for each in (model, again)]
        same = sum(a == b for a, b in zip(*greedy, strict=True))
        said += f", {same} of {count} greedy tokens are equal"
        differs |= same < count
    # Layers for further tokens have no part in either; dtypes that files are to have may differ.
    if exact and (differs or checksum(model, "float32") != checksum(again, "float32")):
        raise RunError(f"verify: what was written is not the model that was read: {said}")
    return said
