"""Which layers a model has, in a line that a person reads: `10 × (5 sliding 1024, 1 full), 2 sliding 1024`."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from llm_jax.models.config import ModelConfig
from llm_jax.models.segments import LayerSpec, layer_specs

MOST_RUNS = 12
"""Beyond as many, an irregular order is told by counts alone."""


def mixers(config: ModelConfig) -> str:
    """What mixes the tokens, layer by layer, and what attention sees: all before, a window, its chunk."""
    config = config.resolved()
    return in_words([_mixer(config, spec) for spec in layer_specs(config)])


def feed_forwards(config: ModelConfig) -> str:
    """What each layer does with a token alone."""
    config, experts = config.resolved(), config.experts
    shared = " and shared" if experts.shared_size else ""
    words = {
        "dense": f"dense {config.intermediate_size}",
        "experts": f"experts ({experts.top_k} of {experts.num}{shared})",
        "none": "none",
    }
    return in_words([words[spec.feed_forward] for spec in layer_specs(config)])


def _mixer(config: ModelConfig, spec: LayerSpec) -> str:
    if spec.mixer not in ("attention", "latent"):
        return spec.mixer
    # An encoder's window shows as many tokens on the other side.
    window = config.window if config.causal or config.window is None else f"±{config.window - 1}"
    sees = {"full": "full", "sliding": f"sliding {window}", "chunked": f"chunked {config.chunk}"}[spec.sees]
    latent = "latent " if spec.mixer == "latent" else ""
    unturned = " without positions" if spec.rope == "none" and config.positions == "rope" else ""
    return f"{latent}{sees}{unturned}"


def in_words(labels: Sequence[str]) -> str:
    """A shortest period where there is one, runs where not: `a a b a a b a` is `2 × (2 a, 1 b), 1 a`."""
    count = len(labels)
    for period in range(1, count // 2 + 1):
        if all(label == labels[i % period] for i, label in enumerate(labels)):
            if period == 1:
                break
            rest = labels[count - count % period :]
            return f"{count // period} × ({_runs(labels[:period])})" + (f", {_runs(rest)}" if rest else "")
    runs = _runs(labels)
    if runs.count(",") < MOST_RUNS:
        return runs
    return ", ".join(f"{number} {label}" for label, number in Counter(labels).items()) + ", in no regular order"


def _runs(labels: Sequence[str]) -> str:
    return ", ".join(f"{len(list(run))} {label}" for label, run in groupby(labels))
