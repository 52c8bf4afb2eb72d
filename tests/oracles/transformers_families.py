"""Golden files of tiny models of every family, from transformers 5.23 and torch 2.13 on a CPU, in float32.

    python -m tests.oracles.transformers_families FAMILY...    # writes tests/golden/families/FAMILY.npz; all by default

A file holds, under `NAME/` for each configuration: `tokens`, `logits` at the recipe's positions, and for decoders
`greedy` tokens of `generate` with its cache with the `gaps` between the two largest logits of each step, and
`full_greedy`, `full_gaps` of full forwards where those differ; `short_logits`, the prompt's last, where frequencies
depend on the length; `aux_loss` of experts; `grad/TENSOR` for some; `classes` of an encoder. `meta` is JSON: versions,
and of each configuration config.json as transformers writes it (`new`) and as published folders carry it (`old`), names
and shapes of the tensors in the folder (`shapes`) and, where a running model has others, of those (`fused`). Weights
are not in it (`family_recipe.py`).
"""

import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from tests.oracles import family_recipe as recipe
from tests.oracles.family_spelling import published

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "families"
HEADS = {"modernbert": AutoModelForMaskedLM}


def options(family: str) -> dict[str, str]:
    """Eager attention adds ALiBi's bias twice in Falcon, and is not a number for padding in float64."""
    attention = "sdpa" if family in ("falcon", "modernbert") else "eager"
    return {"attn_implementation": attention, "experts_implementation": "eager"}


def write(folder: pathlib.Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> pathlib.Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(family: str, folder: pathlib.Path, head: Any = None) -> Any:
    """The model of a folder whose every tensor it takes."""
    head = head or HEADS.get(family, AutoModelForCausalLM)
    model, info = head.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options(family))
    info.pop("conversion_errors", None)
    assert not any(info.values()), (family, info)
    return model.eval()


def saved(model: Any, folder: pathlib.Path) -> dict[str, np.ndarray]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def forward(model: Any, tokens: torch.Tensor, **more: Any) -> Any:
    """A full forward pass, with frequencies of dynamic NTK as a new model has them."""
    with torch.no_grad():
        model(tokens[:, :1])
        return model(tokens, **more)


def logits(model: Any, tokens: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Zero where an encoder's row is padding."""
    mask = {} if seen.all() else {"attention_mask": seen[..., 0].long()}
    return torch.where(seen, forward(model, tokens, **mask).logits, 0.0)


def by_cache(model: Any, prompt: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    done = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=recipe.NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    top = torch.stack(done.logits, 1).topk(2).values
    return done.sequences[:, recipe.PROMPT :].numpy().astype(np.uint8), (top[..., 0] - top[..., 1]).numpy()


def by_forwards(model: Any, prompt: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    sequence, gaps = prompt, []
    for _ in range(recipe.NEW_TOKENS):
        top = forward(model, sequence, use_cache=False).logits[:, -1].topk(2)
        gaps.append(top.values[:, 0] - top.values[:, 1])
        sequence = torch.cat([sequence, top.indices[:, :1]], 1)
    return sequence[:, recipe.PROMPT :].numpy().astype(np.uint8), torch.stack(gaps, 1).numpy()


def gradients(model: Any, tokens: torch.Tensor, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Of the mean cross-entropy of the next token, under the names of the folder's tensors."""
    logits = model(tokens).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    buffers = {name for name, _ in model.named_buffers()}
    return {f"grad/{k}": v for k, v in saved(model, folder).items() if k not in buffers}


def golden(family: str, name: str, folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    config = AutoConfig.for_model(**recipe.CONFIGS[family][name])
    head = HEADS.get(family, AutoModelForCausalLM)
    empty = head.from_config(config, dtype=torch.float32, **options(family))
    shapes = {k: v.shape for k, v in saved(empty, folder / "empty").items()}
    new = json.loads((folder / "empty" / "config.json").read_text())
    weights = recipe.weights(family, shapes)
    model = load(family, write(folder / "new", new, weights))
    again = saved(model, folder / "again")
    assert again.keys() == weights.keys() and all(np.array_equal(again[k], weights[k]) for k in weights)
    tokens = torch.from_numpy(recipe.tokens(family, name)).long()
    seen = torch.from_numpy(recipe.seen(family))[..., None]
    full = logits(model, tokens, seen)
    out = {"tokens": tokens.numpy().astype(np.uint8), "logits": full[:, recipe.POSITIONS].numpy()}
    # Another spelling is the same model.
    old = published(new, json.loads(type(config)().to_json_string(use_diff=False)))
    other = load(family, write(folder / "old", old, recipe.published(family, weights)))
    assert torch.equal(logits(other, tokens, seen), full), (family, name, old)
    meta = {"new": new, "old": old, "shapes": shapes}
    tied = [] if any(k in shapes for k in recipe.HEADS) else recipe.HEADS
    running = {k: v.numpy() for k, v in model.state_dict().items() if k not in tied}
    if running.keys() != shapes.keys():
        meta["fused"] = {k: v.shape for k, v in running.items()}
        fused = recipe.fused(family, weights, meta["fused"])
        assert all(np.array_equal(fused[k], running[k]) for k in running), (family, name)
        other = load(family, write(folder / "fused", new, fused))
        assert torch.equal(logits(other, tokens, seen), full), (family, name)
    for module in model.modules():
        module.reorder_and_upcast_attn = False  # GPT-2's refuses to compute in anything but float32.
    exact = logits(model.double(), tokens, seen)
    error = ((exact - full).abs().max() / max(1.0, full.abs().max())).item()
    assert error < 1e-5, (family, name, error)
    model.float()
    if family == "modernbert":
        return out | classification(new, weights, tokens, folder), meta
    if any("experts" in k for k in shapes) and "output_router_logits" in new:
        aux = forward(model, tokens, output_router_logits=True).get("aux_loss")
        out |= {} if aux is None else {"aux_loss": aux.numpy()}
    prompt = tokens[:, : recipe.PROMPT]
    short = forward(model, prompt).logits[:, -1]
    if (short - full[:, recipe.PROMPT - 1]).abs().max() > 1e-4:
        out["short_logits"] = short.numpy()
    out["greedy"], out["gaps"] = by_cache(model, prompt)
    greedy, gaps = by_forwards(model, prompt)
    if np.abs(gaps - out["gaps"]).max() > 1e-3:
        out |= {"full_greedy": greedy, "full_gaps": gaps}
    for key in ("gaps", "full_gaps"):
        clear = np.logical_and.accumulate(out.get(key, gaps) > 1e-3, axis=1)
        assert clear.sum() > recipe.NEW_TOKENS, (family, name, key)
    print(
        f"{family}/{name}: max |logit| {full.abs().max():.1f}, error {error:.1e}, {len(np.unique(greedy))} tokens,"
        f" least gap {out['gaps'].min():.1e}{', cache differs' if 'full_greedy' in out else ''}",
        f"{[k for k in old if k not in new]}",
    )
    if recipe.GRADIENTS.get(family) == name:
        out |= gradients(model, tokens, folder / "grad")
    return out, meta


def classification(new: Any, weights: Any, tokens: torch.Tensor, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Logits of the encoder with a head of `num_labels` classes in place of the vocabulary."""
    shapes = {"classifier.weight": (3, new["hidden_size"]), "classifier.bias": (3,)}
    body = {k: v for k, v in weights.items() if not k.startswith("decoder.")} | recipe.weights("modernbert", shapes)
    model = load("modernbert", write(folder / "class", new, body), AutoModelForSequenceClassification)
    mask = torch.from_numpy(recipe.seen("modernbert")).long()
    return {"classes": forward(model, tokens, attention_mask=mask).logits.numpy()}


def main() -> None:
    torch.set_num_threads(1)
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for family in sys.argv[1:] or recipe.CONFIGS:
        arrays, configs = {}, {}
        for name in recipe.CONFIGS[family]:
            with tempfile.TemporaryDirectory() as folder:
                found, configs[name] = golden(family, name, pathlib.Path(folder))
            arrays |= {f"{name}/{key}": value for key, value in found.items()}
        meta = {"transformers": transformers.__version__, "torch": torch.__version__, "configs": configs}
        arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        np.savez_compressed(GOLDEN / f"{family}.npz", **arrays)
        print(family, (GOLDEN / f"{family}.npz").stat().st_size, "bytes", flush=True)


if __name__ == "__main__":
    main()
