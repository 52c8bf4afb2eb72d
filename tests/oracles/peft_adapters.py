"""Golden files of adapters on tiny models, from PEFT 0.21.2 with transformers 5.23 and torch 2.13 on a CPU, in float32.

    python -m tests.oracles.peft_adapters CASE...          # writes tests/golden/peft/CASE.npz; all by default
    python -m tests.oracles.peft_adapters --load FOLDER... # loads adapters that llm_jax wrote, and compares the logits

A file holds `logits` of the adapted model at the recipe's positions, or the scores of a text. `meta` is JSON: versions,
adapter_config.json as PEFT writes it, names and shapes of adapter_model.safetensors, and the SHA-256 of that file.
Numbers are not in it: the adapter's are `adapters_recipe.draw`'s, the model's `family_recipe`'s.

Folders for `--load` are written by adapters_for_peft.py.
"""

import hashlib
import importlib.metadata
import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from tests.oracles import adapters_recipe, family_recipe
from tests.oracles.transformers_families import forward, load, options, write
from tests.oracles.transformers_heads import HEADS

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "peft"
FAMILIES = GOLDEN.parent / "families"


def base(case: str, folder: pathlib.Path) -> tuple[Any, dict[str, np.ndarray]]:
    family, name, _ = adapters_recipe.CASES[case]
    meta = json.loads(np.load(FAMILIES / f"{family}.npz")["meta"].tobytes())["configs"][name]
    weights = family_recipe.weights(family, meta["shapes"])
    return opened(family, write(folder, meta["new"], weights), *adapters_recipe.LABELS.get(case, ())), weights


def opened(family: str, folder: pathlib.Path, kind: str | None = None, labels: int = 0) -> Any:
    """The model of a folder that ends in logits; with `kind` one of its weights that ends in as many new scores."""
    if kind is None:
        return load(family, folder)
    # No token is padding.
    more = {"num_labels": labels, "pad_token_id": -1, "dtype": torch.float32, **options(family)}
    return HEADS[kind].from_pretrained(folder, **more).eval()


def at_positions(logits: torch.Tensor) -> np.ndarray:
    """Of tokens those at the recipe's positions, of a text all."""
    return (logits if logits.ndim == 2 else logits[:, family_recipe.POSITIONS]).detach().numpy()


def golden(case: str, folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    family, name, fields = adapters_recipe.CASES[case]
    model, weights = base(case, folder / "base")
    labels = adapters_recipe.LABELS.get(case, ())
    adapted = get_peft_model(model, LoraConfig(**fields))
    adapted.save_pretrained(folder / "empty")
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(folder / "empty/adapter_model.safetensors").items()}
    state = dict(adapted.state_dict())
    for key, shape in shapes.items():
        fitting = [own for own in state if without_adapter(own) == key and "original_module" not in own]
        assert len(fitting) == 1, (case, key, fitting)
        values = torch.from_numpy(adapters_recipe.draw(case, key, shape, weights))
        assert state[fitting[0]].shape == values.shape, (case, key)
        if not key.endswith(".base_layer.weight"):
            state[fitting[0]].data.copy_(values)
    adapted.save_pretrained(folder / "adapter")
    stored = load_file(folder / "adapter/adapter_model.safetensors")
    for key, tensor in stored.items():
        drawn = adapters_recipe.draw(case, key, tuple(tensor.shape), weights)
        assert np.array_equal(tensor.numpy(), drawn), (case, key)
    tokens = torch.from_numpy(family_recipe.tokens(family, name)).long()
    adapted.eval()
    logits = forward(adapted, tokens).logits
    again = PeftModel.from_pretrained(opened(family, folder / "base", *labels), folder / "adapter").eval()
    difference = (forward(again, tokens).logits - logits).abs().max().item()
    assert difference < 1e-4, (case, difference)
    plain = forward(opened(family, folder / "base", *labels), tokens).logits
    assert (plain - logits).abs().max() > 0.05, (case, "the adapter changes nothing")
    raw = (folder / "adapter/adapter_model.safetensors").read_bytes()
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    meta = {"config": config, "shapes": shapes, "sha256": hashlib.sha256(raw).hexdigest()}
    return {"logits": at_positions(logits)}, meta


def without_adapter(name: str) -> str:
    """A parameter's name in a PEFT model as its file has it."""
    name = name.replace(".modules_to_save.default", "").replace(
        ".lora_magnitude_vector.default.weight", ".lora_magnitude_vector"
    )
    return name.removesuffix(".default").replace(".default.", ".")


def load_ours(folder: pathlib.Path) -> None:
    """Raises AssertionError where PEFT finds other logits than llm_jax did."""
    family = json.loads((folder / "base/config.json").read_text())["model_type"]
    task = json.loads((folder / "adapter/adapter_config.json").read_text())["task_type"]
    stored = load_file(folder / "adapter/adapter_model.safetensors")
    scores = [len(tensor) for name, tensor in stored.items() if name.endswith(("score.weight", "classifier.weight"))]
    kind = {"CAUSAL_LM": (), "SEQ_CLS": ("sequence", *scores), "TOKEN_CLS": ("token", *scores)}[task]
    adapted = PeftModel.from_pretrained(opened(family, folder / "base", *kind), folder / "adapter").eval()
    tokens, ours = torch.from_numpy(np.load(folder / "tokens.npy")).long(), np.load(folder / "ours.npy")
    difference = np.abs(forward(adapted, tokens).logits.detach().numpy() - ours).max()
    print(f"{folder.name}: {difference:.1e} of {np.abs(ours).max():.1f}")
    assert difference <= 1e-4 * max(1.0, np.abs(ours).max()), folder


def main() -> None:
    if sys.argv[1:2] == ["--load"]:
        for folder in sys.argv[2:]:
            load_ours(pathlib.Path(folder))
        return
    GOLDEN.mkdir(exist_ok=True)
    versions = {name: importlib.metadata.version(name) for name in ("peft", "transformers", "torch")}
    for case in sys.argv[1:] or adapters_recipe.CASES:
        with tempfile.TemporaryDirectory() as folder:
            arrays, meta = golden(case, pathlib.Path(folder))
        meta = json.dumps({"versions": versions, **meta})
        np.savez_compressed(GOLDEN / f"{case}.npz", meta=np.frombuffer(meta.encode(), np.uint8), **arrays)
        print(case, (GOLDEN / f"{case}.npz").stat().st_size)


if __name__ == "__main__":
    main()
