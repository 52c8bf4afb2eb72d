"""Golden files of multi-token prediction: transformers' modules put together by DeepSeek-V3's equations.

    python -m tests.oracles.transformers_mtp FAMILY...    # writes tests/golden/mtp/FAMILY.npz; all by default

transformers 5.23 has the layers of these families and leaves those of further tokens out. Here they are added by
arXiv:2412.19437, section 2.2: eq. 21 (norms, concatenation, projection), eq. 22 (a layer), eq. 23 (the shared head).
What goes in at depth 1 is the model's last hidden state. In Nemotron-H a layer is attention and, with a norm of its
own, experts (`mtp_hybrid_override_pattern` "*E"), two blocks of transformers; names of tensors are those of NVIDIA's
folders, as vLLM's nemotron_h_mtp.py reads them. Weights are drawn by name (`family_recipe.draw`).
"""

import copy
import json
import pathlib
import sys
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHBlock, NemotronHRMSNorm

from tests.oracles import family_recipe as recipe

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "mtp"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("groups", {"num_nextn_predict_layers": 2}),
    "nemotron_h": ("experts", {"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["full_attention", "moe"]}),
}
"""Family -> the configuration, and what more it says."""
EACH = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
"""Parameters of all experts -> those of one, as files hold them."""


def draw(family: str, prefix: str, module: torch.nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Fills a module; experts are drawn one by one, as files hold them."""
    with torch.no_grad():
        for name, value in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
            stem, _, kind = name.rpartition(".")
            if kind.endswith("inv_freq"):
                continue
            if kind not in EACH:
                shapes[prefix + name] = tuple(value.shape)
                value.copy_(torch.from_numpy(recipe.draw(family, prefix + name, tuple(value.shape))))
                continue
            rows = value.shape[1] // len(EACH[kind])
            for e in range(value.shape[0]):
                each = {f"{prefix}{stem}.{e}.{part}.weight": (rows, value.shape[2]) for part in EACH[kind]}
                shapes.update(each)
                value[e] = torch.cat([torch.from_numpy(recipe.draw(family, n, s)) for n, s in each.items()])


def further_layers(config: Any, depth: int) -> dict[str, tuple[str, torch.nn.Module]]:
    """Modules of the layer of that depth, from 1, with their names' beginnings in a folder."""
    D = config.hidden_size
    project = torch.nn.Linear(2 * D, D, bias=False)
    if config.model_type == "deepseek_v3":
        eps, index = config.rms_norm_eps, config.num_hidden_layers + depth - 1
        at, norms = f"model.layers.{index}.", [DeepseekV3RMSNorm(D, eps) for _ in range(3)]
        names = {"enorm": at + "enorm.", "hnorm": at + "hnorm.", "norm": at + "shared_head.norm."}
        blocks = {"block 0": (at, DeepseekV3DecoderLayer(config, index))}
    else:
        eps, at, behind = config.layer_norm_epsilon, "mtp.layers.0.", "mtp.layers.1."
        norms = [NemotronHRMSNorm(D, eps) for _ in range(3)]
        names = {"enorm": at + "enorm.", "hnorm": at + "hnorm.", "norm": behind + "final_layernorm."}
        own = copy.deepcopy(config)
        own.layers_block_type = config.mtp_layers_block_type
        blocks = {f"block {i}": (each, NemotronHBlock(own, i)) for i, each in enumerate((at, behind))}
    own_norms = {key: (name, norm) for (key, name), norm in zip(names.items(), norms, strict=True)}
    return {**own_norms, "project": (at + "eh_proj.", project), **blocks}


def run_block(model: Any, block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(x.shape[1])[None]
    mask = create_causal_mask(
        config=model.config, inputs_embeds=x, attention_mask=None, past_key_values=None, position_ids=positions
    )
    more = {}
    if hasattr(model.model, "rotary_emb"):
        more["position_embeddings"] = model.model.rotary_emb(x, position_ids=positions)
    return block(x, attention_mask=mask, position_ids=positions, **more)


def golden(family: str) -> dict[str, np.ndarray]:
    name, more = CASES[family]
    config = AutoConfig.for_model(**{**recipe.CONFIGS[family][name], **more})
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options).eval()
    shapes: dict[str, tuple[int, ...]] = {}
    stored = {running: name for name, running in recipe.RENAMED.get(family, {}).items()}
    for child, module in model.named_children():
        draw(family, stored.get(f"{child}.", f"{child}."), module, shapes)
    tokens = torch.from_numpy(recipe.tokens(family, name)).long()
    hidden = model.model(tokens).last_hidden_state
    out = {"tokens": tokens.numpy().astype(np.uint8), "logits": model.lm_head(hidden).numpy()}
    for k in range(1, more["num_nextn_predict_layers"] + 1):
        layers = further_layers(model.config, k)
        for prefix, module in layers.values():
            draw(family, prefix, module.eval(), shapes)
        part = {key: module for key, (_, module) in layers.items()}
        hidden = hidden[:, : tokens.shape[1] - k]
        embedded = model.get_input_embeddings()(tokens[:, k:])
        hidden = part["project"](torch.cat([part["enorm"](embedded), part["hnorm"](hidden)], -1))
        for key in part:
            hidden = run_block(model, part[key], hidden) if key.startswith("block") else hidden
        out[f"further_{k}"] = model.lm_head(part["norm"](hidden)).numpy()
    new = json.loads(config.to_json_string(use_diff=False))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    meta = {"versions": versions, "config": {**new, "architectures": [type(model).__name__]}, "shapes": shapes}
    return {**out, "meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)}


def main() -> None:
    torch.set_num_threads(2)
    GOLDEN.mkdir(exist_ok=True)
    for family in sys.argv[1:] or CASES:
        with torch.no_grad():
            arrays = golden(family)
        np.savez_compressed(GOLDEN / f"{family}.npz", **arrays)
        spread = {k: float(np.abs(v).max()) for k, v in arrays.items() if k.startswith(("logits", "further"))}
        print(family, (GOLDEN / f"{family}.npz").stat().st_size, "bytes", spread)


if __name__ == "__main__":
    main()
