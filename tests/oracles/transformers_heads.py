"""Golden file of models that end in scores, from transformers 5.23 and torch 2.13 on a CPU, in float32.

    python -m tests.oracles.transformers_heads    # writes tests/golden/heads.npz

Under `FAMILY/sequence/` (reward and sequence classification) and `FAMILY/token/` (token classification, where
transformers has it): `scores` of the recipe's padded tokens, zero where a token is padding. `meta` is JSON: versions,
of each `FAMILY/KIND` config.json as transformers writes it (`config`), names and shapes of its tensors (`shapes`); and
of every family its classes by kind, as far as there are any (`classes`).
"""

import json
import pathlib
import tempfile
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from tests.oracles import family_recipe, heads_recipe
from tests.oracles.transformers_families import load, options, saved, write

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "heads.npz"
HEADS = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}


def name(family: str, kind: str) -> str | None:
    """The class, where transformers has one."""
    mapping = HEADS[kind]._model_mapping
    config = type(AutoConfig.for_model(family))
    return mapping[config].__name__ if config in mapping else None


def golden(family: str, kind: str, folder: pathlib.Path) -> tuple[np.ndarray, dict[str, Any]]:
    config = AutoConfig.for_model(**heads_recipe.config(family))
    empty = HEADS[kind].from_config(config, dtype=torch.float32, **options(family))
    shapes = {name: tensor.shape for name, tensor in saved(empty, folder / "empty").items()}
    fields = json.loads((folder / "empty" / "config.json").read_text())
    model = load(family, write(folder / "new", fields, family_recipe.weights(family, shapes)), HEADS[kind])
    seen = heads_recipe.segment_ids()
    with torch.no_grad():
        tokens = torch.from_numpy(heads_recipe.tokens(family)).long()
        scores = model(tokens, attention_mask=torch.from_numpy(seen).long()).logits.numpy()
    scores = scores if kind == "sequence" else np.where(seen[..., None] > 0, scores, 0.0)
    print(family, kind, fields["architectures"], scores.shape, np.abs(scores).max())
    return scores, {"config": fields, "shapes": shapes}


def main() -> None:
    torch.set_num_threads(1)
    arrays, found = {}, {}
    for family in heads_recipe.CASES:
        for kind in heads_recipe.KINDS:
            if type(AutoConfig.for_model(family)) not in HEADS[kind]._model_mapping:
                continue
            with tempfile.TemporaryDirectory() as folder:
                arrays[f"{family}/{kind}/scores"], found[f"{family}/{kind}"] = golden(
                    family, kind, pathlib.Path(folder)
                )
    classes = {family: {kind: name(family, kind) for kind in HEADS} for family in family_recipe.CONFIGS}
    meta = {"transformers": transformers.__version__, "torch": torch.__version__, "cases": found, "classes": classes}
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    np.savez_compressed(GOLDEN, **arrays)
    print(GOLDEN.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
