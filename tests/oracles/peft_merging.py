"""Golden file of adapters put together, and of what PiSSA starts at, from PEFT 0.21.2 on a CPU.

    python -m tests.oracles.peft_merging      # writes tests/golden/peft_merging.npz

Of the adapters MERGED of `adapters_recipe`, on one model: `METHOD/NAME` are A and B of what `add_weighted_adapter`
makes of them in float64 (its singular vectors in float32 are 4e-5 off), in the first layer and before it. `pissa/NAME`
are A and B at the start, likewise. `meta` is JSON: versions and arguments.
"""

import importlib.metadata
import json
import pathlib
import tempfile
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from tests.oracles import adapters_recipe as recipe
from tests.oracles.peft_adapters import base, without_adapter

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "peft_merging.npz"


def arrays(model: Any, adapter: str) -> dict[str, np.ndarray]:
    state = {
        without_adapter(n.replace(f".{adapter}", ".default")): v
        for n, v in model.state_dict().items()
        if f".{adapter}" in n
    }
    return {
        name: value.numpy().astype(np.float32)
        for name, value in state.items()
        if "lora_" in name and ".layers.1" not in name and ".layers.2" not in name
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, weights = base(*recipe.MERGED_BASE, pathlib.Path(folder) / "base")
    model.eval()
    adapted: Any = None
    for name, fields in recipe.MERGED.items():
        config = LoraConfig(**fields)
        if adapted is None:
            adapted = get_peft_model(model, config, adapter_name=name)
        else:
            adapted.add_adapter(name, config)
        for key, value in adapted.state_dict().items():
            if f".{name}" in key and "lora_" in key:
                stored = without_adapter(key.replace(f".{name}", ".default"))
                value.copy_(torch.from_numpy(recipe.draw(name, stored, tuple(value.shape), weights)))
    adapted.double()
    out: dict[str, np.ndarray] = {}
    for method, arguments in recipe.METHODS.items():
        adapted.add_weighted_adapter(
            list(recipe.MERGED), recipe.MERGED_WEIGHTS, f"to_{method}", combination_type=method, **arguments
        )
        out |= {f"{method}/{name}": value for name, value in arrays(adapted, f"to_{method}").items()}
    family, name, fields = recipe.CASES["llama_pissa"]
    with tempfile.TemporaryDirectory() as folder:
        model, _ = base(family, name, pathlib.Path(folder) / "base")
    out |= {f"pissa/{n}": v for n, v in arrays(get_peft_model(model, LoraConfig(**fields)), "default").items()}
    versions = {name: importlib.metadata.version(name) for name in ("peft", "transformers", "torch")}
    meta = json.dumps({"versions": versions, "methods": recipe.METHODS, "weights": recipe.MERGED_WEIGHTS})
    np.savez_compressed(GOLDEN, meta=np.frombuffer(meta.encode(), np.uint8), **out)
    print(GOLDEN.stat().st_size)


if __name__ == "__main__":
    main()
