"""What is wrong with an adapter's configuration or files: one line that names it."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llm_jax
from llm_jax.adapters.config import LoraConfig
from llm_jax.adapters.loading import AdaptedModel
from llm_jax.adapters.sites import Adaptation
from llm_jax.base.config import bind
from llm_jax.base.errors import UserError
from tests.adapters.conftest import drawn, write_model


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_prj"]}, r"target_modules 'q_prj' matches nothing; the nearest is q_proj"),
        ({"target_modules": ["q_proj", "w"]}, r"target_modules 'w' matches nothing"),
        ({"target_modules": r".*query"}, r"target_modules '.*query' matches no module; one is model.embed_tokens"),
        ({"target_modules": "("}, r"'\(' is no regular expression"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, r"leaves no module \(layers_to_transform=\(7,\)"),
        ({"layers_to_transform": [1]}, "target_modules as one text ignores it"),
        ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, "without layers_to_transform nothing reads it"),
        ({"target_parameters": ["mlp.experts.up"]}, "target_parameters 'mlp.experts.up' matches nothing"),
        ({"target_parameters": ["q_proj.weight"]}, "whose module adapter.target_modules has too"),
        ({"target_modules": None}, "are both empty"),
        ({"modules_to_save": ["classifier"]}, "modules_to_save 'classifier' matches no module"),
        ({"modules_to_save": ["layers.1.input_layernorm"]}, "in 1 of the 3 layers that share an array"),
        ({"r": 0}, "adapter.r has 0"),
        ({"rank_pattern": {"q_proj": 0}}, "adapter.rank_pattern has 0"),
        ({"lora_alpha": -1}, "adapter.lora_alpha has -1"),
        ({"lora_dropout": 1.0}, r"lora_dropout is 1.0; it must be in \[0, 1\)"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "has the odd r 3"),
        ({"loraplus_lr_ratio": 0.0}, "loraplus_lr_ratio is 0.0"),
    ],
)
def test_config(llama, fields, message):
    with pytest.raises(UserError, match=message):
        Adaptation(llama.decoder, bind(LoraConfig, fields))


def test_unknown_start():
    with pytest.raises(UserError, match="init_lora_weights=pisa"):
        bind(LoraConfig, {"init_lora_weights": "pisa"})


@pytest.fixture
def folder(llama, tmp_path):
    """An adapter of rank 4 on three layers of width 24."""
    model = AdaptedModel(llama, {"default": drawn("a", llama, {"r": 4, "target_modules": ["q_proj", "up_proj"]})})
    llm_jax.save(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_without_a_base(folder, llama_folder):
    with pytest.raises(UserError, match="does not say which model its adapter is on"):
        llm_jax.load(folder)
    change(folder, base_model_name_or_path="gone/away")
    with pytest.raises(UserError, match="its adapter is on gone/away, which is not there"):
        llm_jax.load(folder)
    with pytest.raises(UserError, match="is no adapter"):
        llm_jax.load(llama_folder, base=llama_folder)


def test_of_another_base(folder, tmp_path):
    """Names, and shapes on both sides."""
    write_model("gpt2", "plain", tmp_path / "gpt2")
    with pytest.raises(UserError, match=r"does not fit the gpt2 model: adapter.target_modules '\w+' matches nothing"):
        llm_jax.load(folder, base=tmp_path / "gpt2")
    write_model("llama", "biases", tmp_path / "other")
    wanted = r"q_proj.lora_B.weight has shape \[40, 4\], an adapter of this model has \[24, 4\]"
    with pytest.raises(UserError, match=wanted):
        llm_jax.load(folder, base=tmp_path / "other")


def test_tensors(folder, llama_folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(UserError, match=f"has no {name}: it is an adapter of another model"):
        llm_jax.load(folder, base=llama_folder)
    save_file({**tensors, "base_model.model.extra.lora_A.weight": np.zeros((2, 2), np.float32)}, file)
    with pytest.raises(UserError, match="has base_model.model.extra.lora_A.weight, which an adapter of this"):
        llm_jax.load(folder, base=llama_folder)
    save_file({**tensors, "base_model.model.lm_head.base_layer.weight": np.zeros((53, 24), np.float32)}, file)
    with pytest.raises(UserError, match="lm_head.base_layer.weight differs from the model's"):
        llm_jax.load(folder, base=llama_folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\] is not supported"),
        ({"init_lora_weights": "eva"}, "init_lora_weights=eva"),
        ({"r": "8"}, "r=8: expected int"),
    ],
)
def test_fields(folder, llama_folder, fields, message):
    change(folder, **fields)
    with pytest.raises(UserError, match=message):
        llm_jax.load(folder, base=llama_folder)
