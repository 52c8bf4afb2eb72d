"""Golden files of tiny state-space mixers, from transformers 5.23 and torch 2.13 on a CPU, in float32.

    python tests/oracles/transformers_mixers.py       # writes tests/golden/mixers/CASE.npz

Each file: `out`, the gradient `d_input`, and `grad/NAME` per tensor. Weights are not in it.
"""

import importlib
import pathlib

import mixers_recipe as recipe
import numpy as np
import torch
from transformers import AutoConfig

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "mixers"
MIXERS = {
    "mamba": "MambaMixer",
    "falcon_mamba": "FalconMambaMixer",
    "jamba": "JambaMambaMixer",
    "mamba2": "Mamba2Mixer",
    "bamba": "BambaMixer",
    "granitemoehybrid": "GraniteMoeHybridMambaLayer",
    "nemotron_h": "NemotronHMamba2Mixer",
}


def golden(case: str) -> dict[str, np.ndarray]:
    kind, fields = recipe.CASES[case]
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    # Its own initialisation is not asked for: Falcon-Mamba's runs before its norms are there.
    options = {} if kind == "jamba" else {"initialize_mixer_weights": False}
    mixer = getattr(module, MIXERS[kind])(AutoConfig.for_model(kind, **fields), layer_idx=0, **options).float().eval()
    tensors = {n: torch.from_numpy(recipe.weight(case, n, tuple(p.shape))) for n, p in mixer.named_parameters()}
    mixer.load_state_dict(tensors, strict=True)
    x, weights = (torch.from_numpy(a) for a in recipe.inputs(case))
    x.requires_grad_()
    out = mixer(x)
    (weights * out).sum().backward()
    grads = {f"grad/{name}": p.grad.numpy() for name, p in mixer.named_parameters()}
    return {"out": out.detach().numpy(), "d_input": x.grad.numpy(), **grads}


def main() -> None:
    torch.set_num_threads(1)
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for case in recipe.CASES:
        np.savez_compressed(GOLDEN / f"{case}.npz", **golden(case))
        print(case, (GOLDEN / f"{case}.npz").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
