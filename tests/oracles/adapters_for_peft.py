"""Adapters that llm_jax makes and writes, for PEFT to load. Run by this project's Python, then by the oracles':

    python -m tests.oracles.adapters_for_peft FOLDER
    HF_HUB_OFFLINE=1 python -m tests.oracles.peft_adapters --load FOLDER/CASE...

In each `FOLDER/CASE`: `base/` (a Hugging Face folder), `adapter/` (a PEFT folder as `llm_jax.save` writes it, or as one
of its runs exports it), `tokens.npy` and `ours.npy`, the logits or scores here.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

import llm_jax
from llm_jax.adapters.config import LoraConfig
from llm_jax.adapters.loading import AdaptedModel
from llm_jax.adapters.peft_files import Adapter
from llm_jax.adapters.scores import with_projection
from llm_jax.adapters.sites import Adaptation
from llm_jax.adapters.start import init_adapter
from llm_jax.models import HeadConfig, with_head
from tests.adapters.conftest import write_model
from tests.oracles import family_recipe

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
CASES: dict[str, tuple[str, str, LoraConfig]] = {
    "all": ("llama", "biases", LoraConfig(r=3, lora_alpha=7.0)),
    "dora": (
        "llama",
        "tied",
        LoraConfig(r=4, use_dora=True, target_modules=("q_proj", "embed_tokens"), use_rslora=True),
    ),
    "orthogonal": ("qwen3", "full", LoraConfig(r=4, init_lora_weights="orthogonal")),
    "pissa": (
        "llama",
        "biases",
        LoraConfig(r=3, lora_alpha=5.0, init_lora_weights="pissa", target_modules=("v_proj",)),
    ),
    "layers": (
        "llama",
        "tied",
        LoraConfig(r=2, target_modules=("up_proj", "k_proj"), layers_to_transform=(0, 2), rank_pattern={"k_proj": 5}),
    ),
    "saved": ("llama", "biases", LoraConfig(r=2, modules_to_save=("norm", "lm_head"), bias="all")),
    "conv1d": ("gpt2", "plain", LoraConfig(r=3, lora_alpha=5.0)),
    "fused": ("phi3", "window", LoraConfig(r=3, lora_alpha=5.0)),
    "experts": ("mixtral", "full", LoraConfig(r=2, target_modules=("q_proj",), target_parameters=EXPERTS)),
    "reward": ("llama", "tied", LoraConfig(r=3)),
    "steps": ("gpt2", "plain", LoraConfig(r=3, target_modules=("c_attn",))),
    "turned": ("llama4_text", "chunks", LoraConfig(r=2, target_modules=None, target_parameters=EXPERTS)),
}
HEADS = {"reward": HeadConfig(1), "steps": HeadConfig(2, "none", bias=True)}
"""Scores that the adapter brings."""


def main() -> None:
    for case, (family, name, config) in CASES.items():
        folder = Path(sys.argv[1]) / case
        write_model(family, name, folder / "base")
        model, tokens = llm_jax.load(folder / "base"), family_recipe.tokens(family, name)
        if case in HEADS:
            model, config = with_head(model, HEADS[case]), with_projection(config)
        adaptation = Adaptation(model.decoder, dataclasses.replace(config))
        params = init_adapter(adaptation, model.params, seed=0)
        shift(params, np.random.RandomState(0), adaptation)
        adapted = AdaptedModel(model, {"default": (adaptation, Adapter(config, params))})
        llm_jax.save(adapted, folder / "adapter")
        np.save(folder / "tokens.npy", tokens)
        ours = adapted(tokens) if case not in HEADS else adapted.scores(tokens)
        np.save(folder / "ours.npy", np.asarray(ours[:, 0] if case == "reward" else ours))


def shift(params, random: np.random.RandomState, adaptation: Adaptation) -> None:
    """Moves every number, as training does; what fills stacks up stays zero."""
    for site in adaptation.sites:
        *keys, last = site.path.split("/")
        tree = params
        for key in keys:
            tree = tree[key]
        for i, row in site.chosen:
            at = (i,) if site.layers is not None else ()
            b = tree[last]["b"][(*at, ..., slice(row.rank), slice(None))]
            b += random.uniform(-0.3, 0.3, b.shape)


if __name__ == "__main__":
    main()
