"""Golden file of multi-token prediction: transformers' DeepSeek-V3 modules put together by the paper's equations.

    python -m tests.oracles.transformers_mtp    # writes tests/golden/mtp.npz

transformers 5.23 has the layers of DeepSeek-V3 and leaves those of further tokens out. Here they are added by
arXiv:2412.19437, section 2.2: eq. 21 (norms, concatenation, projection), eq. 22 (a layer), eq. 23 (the shared head).
What goes in at depth 1 is the model's last hidden state. Weights are drawn by name (`family_recipe.draw`).
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

from tests.oracles import family_recipe as recipe

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "mtp.npz"
FAMILY, NAME, DEPTH = "deepseek_v3", "groups", 2


def draw(prefix: str, module: torch.nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Fills a module; experts are drawn one by one, as files hold them."""
    with torch.no_grad():
        for name, value in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
            stem, _, kind = name.rpartition(".")
            if kind.endswith("inv_freq"):
                continue
            parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(kind)
            if parts is None:
                shapes[prefix + name] = tuple(value.shape)
                value.copy_(torch.from_numpy(recipe.draw(FAMILY, prefix + name, tuple(value.shape))))
                continue
            rows = value.shape[1] // len(parts)
            for e in range(value.shape[0]):
                each = {f"{prefix}{stem}.{e}.{part}.weight": (rows, value.shape[2]) for part in parts}
                shapes.update(each)
                value[e] = torch.cat([torch.from_numpy(recipe.draw(FAMILY, n, s)) for n, s in each.items()])


def main() -> None:
    torch.set_num_threads(2)
    config = AutoConfig.for_model(**{**recipe.CONFIGS[FAMILY][NAME], "num_nextn_predict_layers": DEPTH})
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options).eval()
    shapes: dict[str, tuple[int, ...]] = {}
    draw("", model, shapes)
    tokens = torch.from_numpy(recipe.tokens(FAMILY, NAME)).long()
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state
        out = {"tokens": tokens.numpy().astype(np.uint8), "logits": model.lm_head(hidden).numpy()}
        for k in range(1, DEPTH + 1):
            index = config.num_hidden_layers + k - 1
            prefix, D, eps = f"model.layers.{index}.", config.hidden_size, config.rms_norm_eps
            own = torch.nn.ModuleDict(
                {"enorm": DeepseekV3RMSNorm(D, eps), "hnorm": DeepseekV3RMSNorm(D, eps)}
                | {"eh_proj": torch.nn.Linear(2 * D, D, bias=False)}
                | {"shared_head": torch.nn.ModuleDict({"norm": DeepseekV3RMSNorm(D, eps)})}
            )
            layer = DeepseekV3DecoderLayer(config, index).eval()
            draw(prefix, own, shapes)
            draw(prefix, layer, shapes)
            hidden = hidden[:, : tokens.shape[1] - k]
            embedded = model.model.embed_tokens(tokens[:, k:])
            x = own["eh_proj"](torch.cat([own["enorm"](embedded), own["hnorm"](hidden)], -1))
            positions = torch.arange(x.shape[1])[None]
            mask = create_causal_mask(
                config=model.config, inputs_embeds=x, attention_mask=None, past_key_values=None, position_ids=positions
            )
            turn = model.model.rotary_emb(x, position_ids=positions)
            hidden = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=turn)
            out[f"further_{k}"] = model.lm_head(own["shared_head"]["norm"](hidden)).numpy()
    new = json.loads(config.to_json_string(use_diff=False))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    meta = {"versions": versions, "config": {**new, "architectures": ["DeepseekV3ForCausalLM"]}, "shapes": shapes}
    np.savez_compressed(GOLDEN, **out, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8))


if __name__ == "__main__":
    main()
