"""Which fields of a generation_config.json are taken, and which are refused."""

import json

import pytest

from llm_jax.base.errors import UserError
from llm_jax.inference import SamplingParams
from llm_jax.inference.generation_config import read_end_ids, read_generation_config


def write(folder, fields):
    (folder / "generation_config.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return folder


def test_what_llama_3_has(tmp_path):
    """The file of Llama 3.1 8B Instruct."""
    fields = {
        "bos_token_id": 128000,
        "do_sample": True,
        "eos_token_id": [128001, 128008, 128009],
        "temperature": 0.6,
        "top_p": 0.9,
        "transformers_version": "4.42.3",
    }
    defaults = read_generation_config(write(tmp_path, fields))
    assert defaults.sampling == {"temperature": 0.6, "top_p": 0.9}
    assert defaults.end_ids == read_end_ids(tmp_path) == (128001, 128008, 128009)
    assert str(defaults) == "temperature=0.6, top_p=0.9, end tokens 128001, 128008, 128009"
    assert str(defaults.under({"top_p": 1.0})) == "temperature=0.6, end tokens 128001, 128008, 128009"


def test_other_fields(tmp_path):
    fields = {"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1, "max_new_tokens": 64, "stop_strings": "###"}
    neutral = {
        "num_beams": 1,
        "typical_p": 1.0,
        "penalty_alpha": None,
        "bad_words_ids": [],
        "renormalize_logits": False,
    }
    defaults = read_generation_config(write(tmp_path, {**fields, **neutral, "max_length": 99, "length_penalty": 2.0}))
    wanted = SamplingParams(top_k=20, min_p=0.05, repetition_penalty=1.1, max_tokens=64, stop=("###",))
    assert SamplingParams(**defaults.sampling) == wanted
    assert defaults.max_length is None  # as in transformers, max_new_tokens comes first
    greedy = read_generation_config(write(tmp_path, {"do_sample": False, "temperature": 0.7, "top_k": 5}))
    assert greedy.sampling == {"temperature": 0.0}
    (tmp_path / "generation_config.json").unlink()
    assert str(read_generation_config(tmp_path)) == "" and read_end_ids(tmp_path) == ()


def test_max_length_counts_the_prompt(tmp_path):
    defaults = read_generation_config(write(tmp_path, {"max_length": 20}))
    assert defaults.fitted(SamplingParams(), 15, "it").max_tokens == 5
    assert defaults.under({"max_tokens": 7}).fitted(SamplingParams(max_tokens=7), 15, "it").max_tokens == 7
    with pytest.raises(UserError, match="it has 20 tokens; max_length=20"):
        defaults.fitted(SamplingParams(), 20, "it")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_beams": 4}, "num_beams=4 is not supported"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size=3"),
        ({"bad_words_ids": [[3]]}, r"bad_words_ids=\[\[3\]\]"),
        ({"suppress_tokens": [1]}, "suppress_tokens"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"typical_p": 0.9}, "typical_p=0.9"),
        ({"watermarking_config": {"bias": 2}}, "watermarking_config"),
        ({"presence_penalty": 1.5}, "presence_penalty=1.5"),
        ({"temperature": "hot"}, "temperature='hot' is not of type"),
        ({"max_new_tokens": True}, "max_new_tokens=True is not of type int"),
        ({"eos_token_id": ["x"]}, "eos_token_id='x'"),
        ({"stop_strings": [3]}, "stop_strings"),
        ("[1]", "has to hold a JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_what_is_not_ours_is_refused_by_name(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        read_generation_config(write(tmp_path, fields))
