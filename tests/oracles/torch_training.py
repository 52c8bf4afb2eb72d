"""Makes tests/golden/training.json: 200 steps of a plain PyTorch loop over transformers' Llama, loss by loss.

Also three AdamW steps on two tensors, values in full. Run with torch and transformers 5.23:
`python tests/oracles/torch_training.py`.
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from recipe import draw
from training_recipe import CONFIG, OPTIMIZER, STEPS, batch, weights
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup


def adamw(parameters, decays: list[bool]) -> torch.optim.AdamW:
    groups = [
        {
            "params": [p for p, d in zip(parameters, decays) if d == decay],
            "weight_decay": OPTIMIZER["weight_decay"] * decay,
        }
        for decay in (True, False)
    ]
    betas = (OPTIMIZER["beta1"], OPTIMIZER["beta2"])
    return torch.optim.AdamW(groups, lr=OPTIMIZER["learning_rate"], betas=betas, eps=OPTIMIZER["eps"])


def train() -> dict[str, list[float]]:
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="eager"))
    missing = model.load_state_dict({k: torch.tensor(v) for k, v in weights(draw).items()}, strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys, missing
    named = list(model.named_parameters())
    optimizer = adamw([p for _, p in named], [p.ndim == 2 for _, p in named])
    schedule = get_cosine_schedule_with_warmup(optimizer, OPTIMIZER["warmup_steps"], STEPS)
    losses, norms = [], []
    for step in range(STEPS):
        tokens = torch.tensor(batch(step), dtype=torch.long)
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["clip_norm"])))
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "grad_norms": norms}


def three_steps() -> dict[str, list]:
    """A matrix that decays and a vector that does not, gradients given and clipped together, constant rate."""
    parameters = [torch.nn.Parameter(torch.tensor(draw(f"adamw.{n}", s, 0))) for n, s in (("w", (3, 4)), ("b", (4,)))]
    optimizer = adamw(parameters, [True, False])
    out: dict[str, list] = {"norms": [], "w": [], "b": []}
    for step in range(3):
        for name, p in zip(("w", "b"), parameters):
            p.grad = torch.tensor(draw(f"adamw.{name}.grad{step}", tuple(p.shape), 0) * (10.0 if step == 1 else 0.1))
        out["norms"].append(float(torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER["clip_norm"])))
        optimizer.step()
        for name, p in zip(("w", "b"), parameters):
            out[name].append(np.asarray(p.detach()).tolist())
    return out


def main() -> None:
    torch.manual_seed(0)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    path = pathlib.Path(__file__).parents[1] / "golden" / "training.json"
    path.write_text(json.dumps({"versions": versions, "adamw": three_steps(), **train()}) + "\n")


if __name__ == "__main__":
    main()
