"""Golden files of tiny mixtures of experts, from transformers 5.23 and torch 2.13 on a CPU, in float32.

    python tests/oracles/transformers_experts.py               # writes tests/golden/experts/NAME.npz

Each file: the block's output `out`, and of Σ out · probe the gradients `grad/x` and `grad/TENSOR`. `losses.npz` holds
balancing losses of router logits. Weights and inputs are not in it (`experts_recipe.py`).
"""

import importlib
import pathlib

import experts_recipe as recipe
import numpy as np
import torch

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "experts"


def golden(name: str) -> dict[str, np.ndarray]:
    case = recipe.CASES[name]
    module = importlib.import_module(f"transformers.models.{case['model']}.modeling_{case['model']}")
    fields = case["fields"] | ({} if name == "switch" else {"hidden_size": recipe.D, "num_attention_heads": 2})
    config = getattr(importlib.import_module("transformers"), case["config"])(**fields)
    config._experts_implementation = "eager"
    block = getattr(module, case["block"])(config).float().eval()
    block.load_state_dict({key: torch.from_numpy(value) for key, value in recipe.weights(name).items()})
    x, probe = (torch.from_numpy(array) for array in recipe.inputs(name))
    x.requires_grad_()
    out = block(x)
    out = (out[0] if isinstance(out, tuple) else out).reshape(x.shape)
    (out * probe).sum().backward()
    made = {"out": out.detach().numpy(), "grad/x": x.grad.numpy()}
    return made | {f"grad/{key}": p.grad.numpy() for key, p in block.named_parameters() if p.grad is not None}


def losses() -> dict[str, np.ndarray]:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as pooled
    from transformers.models.switch_transformers import modeling_switch_transformers as switch

    logits, mask = (torch.from_numpy(array) for array in recipe.logits())
    layers = tuple(layer.flatten(0, 1) for layer in logits)
    probs = logits[0].softmax(-1)
    return {
        "pooled": pooled(layers, recipe.E, 2).numpy(),
        "pooled_masked": pooled(layers, recipe.E, 2, mask.long()).numpy(),
        "switch_per_row": np.array([switch.load_balancing_loss_func(p[None], p.argmax(-1)[None]) for p in probs]),
        "z": switch.router_z_loss_func(logits[0]).numpy(),
    }


def main() -> None:
    torch.set_num_threads(1)
    GOLDEN.mkdir(exist_ok=True)
    for name in recipe.CASES:
        np.savez(GOLDEN / f"{name}.npz", **golden(name))
    np.savez(GOLDEN / "losses.npz", **losses())


if __name__ == "__main__":
    main()
