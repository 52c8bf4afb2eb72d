"""Models of `family_configs` that end in scores, what of their config.json differs, and their padded tokens."""

from typing import Any

import numpy as np

from tests.oracles import family_recipe

PAD = 0
CASES: dict[str, tuple[str, int]] = {
    "llama": ("biases", 1),
    "gemma2": ("caps", 3),
    "gemma3_text": ("pattern", 3),
    "mixtral": ("window", 2),
    "gpt2": ("plain", 4),
    "gpt_neox": ("parallel", 3),
    "modernbert": ("biases", 3),
}
"""Family -> the configuration, and how many labels."""
KINDS = ("sequence", "token")
LENGTHS = (family_recipe.LENGTH, family_recipe.LENGTH - 9)


def config(family: str) -> dict[str, Any]:
    """Fields of config.json."""
    name, labels = CASES[family]
    return {**family_recipe.CONFIGS[family][name], "pad_token_id": PAD, "num_labels": labels}


def segment_ids() -> np.ndarray:
    """int32[2, LENGTH]: the second row ends in padding."""
    return (np.arange(family_recipe.LENGTH) < np.array(LENGTHS)[:, None]).astype(np.int32)


def tokens(family: str) -> np.ndarray:
    """int32[2, LENGTH], with `PAD` where a row has ended and nowhere else."""
    drawn = np.maximum(family_recipe.tokens(family, CASES[family][0]), PAD + 1)
    return np.where(segment_ids() > 0, drawn, PAD).astype(np.int32)
