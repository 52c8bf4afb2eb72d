"""Makes tests/golden/logits_processors.json with transformers' logits processors, in the order that llm_jax documents.

Run with torch and transformers 5.23: `python tests/oracles/logits_processors.py`.
"""

import json
import pathlib

import torch
import transformers
from recipe import draw, draw_tokens
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCAB, SEEN = 24, 6
CASES = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.8},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 24},
    {"top_p": 0.9},
    {"top_p": 0.35},
    {"min_p": 0.1},
    {"min_p": 0.6},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"temperature": 0.5, "top_p": 0.85},
    {"temperature": 1.5, "top_k": 7, "top_p": 0.8},
    {"temperature": 2.0, "min_p": 0.3},
    {"temperature": 1.3, "min_p": 0.08, "top_k": 6, "top_p": 0.9},
    {"temperature": 0.6, "min_p": 0.05, "top_k": 10, "top_p": 0.95, "repetition_penalty": 1.2},
    {"temperature": 1.4, "min_p": 0.02, "top_k": 4, "top_p": 0.7, "repetition_penalty": 2.0},
]


def expected(case: dict, number: int) -> list[float]:
    """Probabilities that transformers would sample from."""
    logits = torch.tensor(3.0 * draw(f"logits.{number}.embed", (1, VOCAB), seed=3))
    seen = torch.tensor(draw_tokens(f"seen.{number}", (1, SEEN), VOCAB, seed=3)).long()
    steps = LogitsProcessorList()
    if "repetition_penalty" in case:
        steps.append(RepetitionPenaltyLogitsProcessor(case["repetition_penalty"]))
    if "temperature" in case:
        steps.append(TemperatureLogitsWarper(case["temperature"]))
    if "min_p" in case:
        steps.append(MinPLogitsWarper(case["min_p"]))
    if "top_k" in case:
        steps.append(TopKLogitsWarper(case["top_k"]))
    if "top_p" in case:
        steps.append(TopPLogitsWarper(case["top_p"]))
    return torch.softmax(steps(seen, logits), dim=-1)[0].tolist()


def main() -> None:
    rows = [{"params": case, "probs": expected(case, number)} for number, case in enumerate(CASES)]
    golden = {"transformers": transformers.__version__, "vocab": VOCAB, "seen": SEEN, "seed": 3, "cases": rows}
    path = pathlib.Path(__file__).parents[1] / "golden" / "logits_processors.json"
    path.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
