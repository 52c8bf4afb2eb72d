"""Golden files of tiny Llamas, from transformers 5.23 and torch 2.13 on a CPU, in float32.

    python tests/oracles/transformers_llama.py                 # writes tests/golden/llama/NAME.npz
    python tests/oracles/transformers_llama.py FOLDER LOGITS   # FOLDER's logits against those of LOGITS.npz

Each file: `logits` of the whole input, `greedy` tokens after the first PROMPT ones with the `gaps` between the two
largest logits of each step, and `grad/NAME` per tensor. Weights are not in it (`llama_recipe.py`).
"""

import json
import pathlib
import sys

import llama_recipe as recipe
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "llama"


def build(name: str) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**recipe.config(name), attn_implementation="eager"))
    tensors = {k: torch.from_numpy(v) for k, v in recipe.weights(name).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.float().eval()


def block_mask(segments: torch.Tensor) -> torch.Tensor:
    """Additive mask [B, 1, T, T]: causal, within a document."""
    length = segments.shape[1]
    visible = (segments[:, :, None] == segments[:, None, :]) & torch.ones(length, length).tril().bool()
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)[:, None]


def golden(name: str) -> dict[str, np.ndarray]:
    model, tokens = build(name), torch.from_numpy(recipe.tokens(name)).long()
    positions, segments = (torch.from_numpy(x).long() for x in recipe.packing(name))
    logits = model(tokens, attention_mask=block_mask(segments), position_ids=positions).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss = loss + (torch.from_numpy(recipe.logit_weights(name)) * logits).mean()
    loss.backward()
    out = {"logits": logits.detach().numpy(), "loss": loss.detach().numpy()}
    out |= {f"grad/{n}": p.grad.numpy() for n, p in model.named_parameters()}
    sequence, greedy, gaps = tokens[:, : recipe.PROMPT], [], []
    with torch.no_grad():
        for _ in range(recipe.NEW_TOKENS):
            top = model(sequence).logits[:, -1].topk(2)
            greedy.append(top.indices[:, :1])
            gaps.append(top.values[:, 0] - top.values[:, 1])
            sequence = torch.cat([sequence, greedy[-1]], 1)
    return out | {"greedy": torch.cat(greedy, 1).int().numpy(), "gaps": torch.stack(gaps, 1).numpy()}


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) == 3:
        saved = np.load(sys.argv[2])
        model = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            logits = model(torch.from_numpy(saved["tokens"]).long()).logits.numpy()
        print(
            json.dumps(
                {"max_difference": float(np.abs(logits - saved["logits"]).max()), "max": float(np.abs(logits).max())}
            )
        )
        return
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name in recipe.CONFIGS:
        arrays = golden(name)
        np.savez_compressed(GOLDEN / f"{name}.npz", **arrays)
        print(name, (GOLDEN / f"{name}.npz").stat().st_size, "bytes; smallest gap", arrays["gaps"].min())


if __name__ == "__main__":
    main()
