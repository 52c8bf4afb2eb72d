# pyright: reportMissingImports=false, reportCallIssue=false
"""The model, tokenizer and records that the TRL oracles share. Run by Python with torch, transformers, trl, tokenizers.

Gold files lie in `tests/golden/trl`; `tokenizer/` there is the one trained here, so that the tests load the same.
"""

import importlib.metadata
import json
import os
import pathlib
import platform

import numpy as np
import torch
from datasets import Dataset
from recipe import draw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

os.environ["HF_HUB_OFFLINE"] = "1"
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "trl"
BETA = 0.1
# Of seeds 0..899, one whose model has a right guess among the answer tokens of every batch, and whose DPO margins are
# not small beside the sums of log-probabilities that they are differences of.
SEED = 117
MODEL = {
    "vocab_size": 288,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The second record's answer merges with its prompt's last letters into one token; the fourth is not ASCII.
COMPLETIONS = [
    {"prompt": "The cat has 23 mice. It eats 2.", "completion": " Then 21 are left."},
    {"prompt": "The hat is on th", "completion": "e cat, and the cat is there."},
    {"prompt": "2 + 2 =", "completion": " 4"},
    {"prompt": "Où est le café? ", "completion": "Là-bas, près de l'hôtel 🏨."},
]
# The same as messages: all that follows the prompt is the answer, the template's last newline included.
MESSAGES = [
    {
        "prompt": [{"role": "user", "content": record["prompt"]}],
        "completion": [{"role": "assistant", "content": record["completion"]}],
    }
    for record in COMPLETIONS
]
TEXTS = [{"text": "The cat is on the mat.\n\nAnd 23?"}, {"text": "é<|endoftext|>"}]
CHATS = [
    {
        "messages": [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": "The cat?"},
            {"role": "assistant", "content": "There."},
            {"role": "user", "content": "And the hat?"},
            {"role": "assistant", "content": "On the cat, then."},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "23 - 2?"},
            {"role": "assistant", "content": "21"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Say <|im_end|> é"},
            {"role": "assistant", "content": "  two\n\nlines \n"},
            {"role": "user", "content": "Again."},
            {"role": "assistant", "content": "No."},
        ]
    },
]
PAIRS = [
    {"prompt": "The cat has 23 mice. It eats 2.", "chosen": " 23 - 2 = 21. Answer: 21", "rejected": " Answer: 25"},
    {"prompt": "The hat is on th", "chosen": "e cat.", "rejected": "e other cat, and then on the mat there."},
    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5, or then 22"},
]
# The same texts, cut where no tokens merge: TRL's CPO and ORPO trainers leave a token that two of the prompt's merged
# into out of the answer, where its DPO trainer learns it.
UNMERGED = [
    PAIRS[0],
    {"prompt": "The hat is on", "chosen": " the cat.", "rejected": " the other cat, and then on the mat there."},
    PAIRS[2],
]
# The pairs' answers on their own, no two neighbours answering the same prompt.
UNPAIRED = [
    {"prompt": PAIRS[i]["prompt"], "completion": PAIRS[i][side], "label": side == "chosen"}
    for i, side in enumerate(("chosen", "rejected", "chosen", "rejected", "chosen", "rejected"), -3)
]
CHAT_PAIRS = [
    {
        "prompt": [{"role": "user", "content": "The cat has 3 mice. It eats 2."}],
        "chosen": [{"role": "assistant", "content": "3 - 2 = 1. Answer: 1"}],
        "rejected": [{"role": "assistant", "content": "Answer: 5"}],
    },
    {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hat?"},
            {"role": "assistant", "content": "Cat."},
            {"role": "user", "content": "Where then?"},
        ],
        "chosen": [{"role": "assistant", "content": "There."}],
        "rejected": [{"role": "assistant", "content": "The hat is on the cat, then, and the cat on the mat."}],
    },
    {
        "prompt": [{"role": "user", "content": "Où?"}],
        "chosen": [{"role": "assistant", "content": "Là-bas. 🏨"}],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
]
# No `prompt`: the transcripts share a prefix.
SHARED_PAIRS = [{side: each["prompt"] + each[side] for side in ("chosen", "rejected")} for each in CHAT_PAIRS]
SHARED_STRINGS = [{side: each["prompt"] + each[side] for side in ("chosen", "rejected")} for each in PAIRS]


def make_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 288 entries with single digits, trained on records above, saved beside the gold files.

    With `bos` a post-processor puts one before plain strings, as Llama's does.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL["vocab_size"],
        special_tokens=["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([json.dumps(r) for r in (*COMPLETIONS, *CHATS, *PAIRS, *CHAT_PAIRS)], trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = CHATML
    folder = GOLDEN / ("tokenizer_bos" if bos else "tokenizer")
    tokenizer.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def make_model(other: float = 0.0) -> LlamaForCausalLM:
    """Float32 Llama of `MODEL`: the recipe's weights of `SEED`, moved by the share `other` towards the next seed's."""
    model = LlamaForCausalLM(LlamaConfig(**MODEL, attn_implementation="eager"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            ours, theirs = (draw(name, tuple(weight.shape), seed) for seed in (SEED, SEED + 1))
            weight.copy_(torch.from_numpy(np.float32(1 - other) * ours + np.float32(other) * theirs))
    return model


def run(trainer, loss_of, batch: dict) -> dict[str, np.ndarray]:
    """One batch's `loss`, `metric:NAME`s, gradients `grad:NAME`, and the batch itself `batch:NAME`."""
    batch = trainer._prepare_inputs(batch)
    saved = {f"batch:{k}": v.numpy().copy() for k, v in batch.items() if isinstance(v, torch.Tensor)}
    trainer.model.train()
    trainer.model.zero_grad()
    loss = loss_of(trainer.model, dict(batch))
    loss.backward()
    saved["loss"] = np.float32(loss.detach().numpy())
    saved |= {f"metric:{k}": np.float64(v[-1]) for k, v in trainer._metrics["train"].items()}
    saved |= {f"grad:{n}": p.grad.numpy().copy() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return saved


def write(name: str, arrays: dict) -> None:
    """Compressed npz with the versions that made it."""
    packages = ("trl", "transformers", "torch", "numpy", "tokenizers")
    versions = {p: importlib.metadata.version(p) for p in packages} | {"python": platform.python_version()}
    GOLDEN.mkdir(parents=True, exist_ok=True)
    path = GOLDEN / f"{name}.npz"
    np.savez_compressed(path, versions=json.dumps(versions), **arrays)
    print(path.name, path.stat().st_size, "bytes; loss", arrays["loss"])
    print({key.removeprefix("metric:"): round(float(v), 4) for key, v in arrays.items() if key.startswith("metric:")})


def write_tokens(name: str, tokens: dict[str, list[dict]]) -> None:
    """JSON of the records by kind, each with the ids that TRL made of it; a record a line."""
    kinds = [
        f'"{kind}": [\n' + ",\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n]"
        for kind, records in tokens.items()
    ]
    (GOLDEN / f"{name}.json").write_text("{" + ",\n".join(kinds) + "}\n")


def dataset(records: list[dict]) -> Dataset:
    return Dataset.from_list(records)
