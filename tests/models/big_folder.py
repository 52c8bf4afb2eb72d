"""A Llama's folder of any size, written shard by shard without ever being held in memory."""

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

from llm_jax.base.trees import flatten
from llm_jax.models import Decoder, ModelConfig, abstract_params, family
from llm_jax.storage.safetensors import write_folder


def write_llama(folder: Path, config: ModelConfig, shards: int) -> int:
    """Writes bfloat16 weights, each tensor full of a small number of its own. Returns their bytes."""
    llama, decoder, inner = family("llama"), Decoder(config), {}
    for path, leaf in flatten(abstract_params(decoder)).items():
        inside = path.startswith("segments/")
        inner[path.split("/", 3)[3] if inside else path] = leaf.shape[1:] if inside else leaf.shape
    shapes = {
        name: shape
        for tensor in llama.tensors(decoder)
        for name, shape in zip(tensor.names, tensor.form.shapes([inner[path] for path in tensor.paths]))
    }
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    tensors = {
        name: (lambda number=number, shape=shape: np.full(shape, number % 64 / 64, ml_dtypes.bfloat16))
        for number, (name, shape) in enumerate(shapes.items())
    }
    write_folder(folder, tensors, max_shard_bytes=total / shards * 1.1)
    (folder / "config.json").write_text(json.dumps(llama.to_hf(decoder.config, {})))
    return total
