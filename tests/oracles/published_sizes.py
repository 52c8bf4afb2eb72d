"""Parameters of published models as transformers counts them on torch's meta device: tests/golden/published_sizes.json.

`parameters`: each tensor once, tied ones too. `buffers`: numbers of a checkpoint that transformers keeps as buffers and
that are parameters to others (DeepSeek-V3's correction biases).

Run in an environment with torch and transformers: python tests/oracles/published_sizes.py
"""

import json
import pathlib

import published_configs
import torch
import transformers

OUT = pathlib.Path(__file__).parents[1] / "golden" / "published_sizes.json"


def count(fields: dict) -> dict[str, int]:
    config = transformers.AutoConfig.for_model(**fields)
    auto = (
        transformers.AutoModelForMaskedLM if fields["model_type"] == "modernbert" else transformers.AutoModelForCausalLM
    )
    with torch.device("meta"):
        model = auto.from_config(config)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = [tensor.numel() for name, tensor in model.state_dict().items() if name not in names]
    return {"parameters": sum(p.numel() for p in model.parameters()), "buffers": sum(buffers)}


def main() -> None:
    models = {}
    for name, fields in published_configs.MODELS.items():
        models[name] = {"config": fields, **count(fields)}
        print(f"{name:44} {models[name]['parameters']:>18,} {models[name]['buffers']:>8,}", flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    OUT.write_text(json.dumps({"versions": versions, "models": models}, indent=1) + "\n")


if __name__ == "__main__":
    main()
