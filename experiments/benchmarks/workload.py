"""Models and batches that both sides of a comparison run: drawn by NumPy's frozen generator, so equal everywhere."""

from typing import Any

import numpy as np

MODELS: dict[str, dict[str, Any]] = {
    # 6.8 million parameters.
    "6.8M": dict(vocab=4096, width=256, inner=688, layers=6, heads=8),
    # 30 million.
    "30M": dict(vocab=8192, width=512, inner=1376, layers=7, heads=8),
    # 0.2 million: what a change is tried on.
    "tiny": dict(vocab=512, width=64, inner=160, layers=2, heads=2),
}
OPTIMIZER = dict(learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, clip_norm=1.0)
BETA = 0.1
LORA: dict[str, Any] = dict(r=8, lora_alpha=16, target_modules="all-linear")
"""Fields of PEFT's `LoraConfig` and of ours."""
PAIRS = 16
"""Preference pairs of a batch, with answers of 16 to 128 tokens."""


def tokens(model: str, rows: int, length: int) -> np.ndarray:
    """int32[rows, length]."""
    return random_tokens(MODELS[model]["vocab"], rows, length)


def random_tokens(vocab: int, rows: int, length: int) -> np.ndarray:
    """int32[rows, length]."""
    return np.random.RandomState(0).randint(3, vocab, (rows, length)).astype(np.int32)


def documents(model: str, rows: int, length: int) -> list[list[tuple[np.ndarray, int]]]:
    """For each row, full to the last token, its documents: (ids, how many of them are the prompt)."""
    draw = np.random.RandomState(1)
    out = []
    for _ in range(rows):
        row, left = [], length
        while left:
            size = min(left, int(draw.randint(40, 121)))
            size = left if left - size < 40 else size
            row.append((draw.randint(3, MODELS[model]["vocab"], size).astype(np.int32), size // 3))
            left -= size
        out.append(row)
    return out


def pairs(model: str, prompts: list[int]) -> list[dict[str, list[int]]]:
    """Records with TRL's names: `prompt_ids`, `chosen_ids`, `rejected_ids`. `prompts`: their least and most tokens."""
    draw = np.random.RandomState(2)

    def ids(low: int, high: int) -> list[int]:
        return draw.randint(3, MODELS[model]["vocab"], draw.randint(low, high + 1)).tolist()

    return [
        {"prompt_ids": ids(*prompts), "chosen_ids": ids(16, 128), "rejected_ids": ids(16, 128)} for _ in range(PAIRS)
    ]


def answers(model: str, prompts: list[int]) -> list[dict[str, Any]]:
    """The same answers unpaired, with TRL's names: `prompt_ids`, `completion_ids`, `label`, and
    `KL_completion_ids`, the last answer to the prompt before."""
    out, records = [], pairs(model, prompts)
    for number, pair in enumerate(records):
        for label, side in ((True, "chosen_ids"), (False, "rejected_ids")):
            other = records[number - 1]["rejected_ids"]
            prompt = pair["prompt_ids"]
            out.append({"prompt_ids": prompt, "completion_ids": pair[side], "label": label, "KL_completion_ids": other})
    return out
