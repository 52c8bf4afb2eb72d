"""Makes tests/golden/optimizers.json: steps of torch's Muon and SGD and of transformers' Adafactor, layer by layer.

torch's Muon orthogonalises in bfloat16. Its values are recorded so, and once more with the cast replaced by one to
float64, which shows the formula without its rounding. Run with torch 2.13 and transformers 5.23:
`python tests/oracles/torch_optimizers.py`.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable
from unittest import mock

import torch
import transformers
from optimizers_recipe import LAYERS, LR, SHAPES, STEPS, gradient, initial
from recipe import draw

MATRICES = [name for name, shape in SHAPES.items() if len(shape) == 2]


def steps(make: Callable, names: list[str], decay: float) -> dict[str, list]:
    """Values of each parameter after each step, `[STEPS][LAYERS]`, in torch's layout `[out, in]`."""
    parameters = {
        (name, layer): torch.nn.Parameter(torch.tensor(initial(draw, name, layer)))
        for name in names
        for layer in range(LAYERS)
    }
    optimizer = make(list(parameters.values()), lr=LR, weight_decay=decay)
    out: dict[str, list] = {name: [] for name in names}
    for step in range(STEPS):
        for (name, layer), p in parameters.items():
            p.grad = torch.tensor(gradient(draw, name, layer, step))
        optimizer.step()
        for name in names:
            out[name].append([parameters[name, layer].detach().double().numpy().tolist() for layer in range(LAYERS)])
    return out


def muon(adjust: str, exact: bool) -> dict[str, list]:
    def make(parameters, **options):
        return torch.optim.Muon(parameters, adjust_lr_fn=adjust, **options)

    cast = mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.double) if exact else contextlib.nullcontext()
    with cast:
        return steps(make, MATRICES, 0.1)


def adafactor(scale_parameter: bool, decay: float) -> dict[str, list]:
    def make(parameters, **options):
        return transformers.Adafactor(parameters, relative_step=False, scale_parameter=scale_parameter, **options)

    return steps(make, list(SHAPES), decay)


def sgd(nesterov: bool) -> dict[str, list]:
    return steps(lambda p, **o: torch.optim.SGD(p, momentum=0.9, nesterov=nesterov, **o), list(SHAPES), 0.0)


def main() -> None:
    golden = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "muon": {kind: muon(kind, True) for kind in ("original", "match_rms_adamw")},
        "muon_bfloat16": muon("original", False),
        "adafactor": {"scaled": adafactor(True, 0.0), "absolute": adafactor(False, 0.1)},
        "sgd": {"plain": sgd(False), "nesterov": sgd(True)},
    }
    rounded = json.loads(json.dumps(golden), parse_float=lambda text: float(f"{float(text):.9g}"))
    path = pathlib.Path(__file__).parents[1] / "golden" / "optimizers.json"
    path.write_text(json.dumps(rounded) + "\n")


if __name__ == "__main__":
    main()
