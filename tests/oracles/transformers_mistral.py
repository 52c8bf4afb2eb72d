"""Golden file of a tiny Mistral whose window is shorter than its input, from transformers 5.23 and torch 2.13 on a CPU.

    python tests/oracles/transformers_mistral.py               # writes tests/golden/mistral.npz

`logits` of the whole input, and `greedy` tokens after the first PROMPT ones through transformers' own sliding cache,
with the `gaps` between the two largest logits of each step. Weights are those of the Llama recipe's `gqa`.
"""

import pathlib

import llama_recipe as recipe
import numpy as np
import torch
from transformers import MistralConfig, MistralForCausalLM

WINDOW = 7


def main() -> None:
    torch.set_num_threads(1)
    fields = {k: v for k, v in recipe.config("gqa").items() if not k.endswith("_bias") and k != "model_type"}
    model = MistralForCausalLM(MistralConfig(**fields, sliding_window=WINDOW, attn_implementation="eager"))
    tensors = {k: torch.from_numpy(v) for k, v in recipe.weights("gqa").items()}
    model.load_state_dict(tensors)
    model = model.float().eval()
    tokens = torch.from_numpy(recipe.tokens("gqa")).long()
    with torch.no_grad():
        out = {"logits": model(tokens).logits.numpy()}
        prompt = tokens[:, : recipe.PROMPT]
        generated = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=recipe.NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    top = torch.stack(generated.logits, 1).topk(2).values
    out["greedy"] = generated.sequences[:, recipe.PROMPT :].int().numpy()
    out["gaps"] = (top[..., 0] - top[..., 1]).numpy()
    np.savez(pathlib.Path(__file__).parents[1] / "golden" / "mistral.npz", **out)


if __name__ == "__main__":
    main()
