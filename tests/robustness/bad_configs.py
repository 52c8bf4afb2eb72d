"""Configurations that are wrong: each as the flags, and the config file's text where the fault is in the file.

Judged by what a field means, not by what the package checks: the table of ranges below is written by hand.
"""

import random
import re
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from llm_jax.base.fields import field_names, field_types, group_in, union_arms
from llm_jax.jobs.config import JOBS

HUGE = 10**30


class Case(NamedTuple):
    name: str
    job: str
    flags: tuple[str, ...] = ()
    file: str | bytes | None = None
    """The text of a config file of its own; None takes configs/JOB.py:test."""


WRONG_TEXTS = {
    int: ["x", "1.5", "", "nan", "inf", "[]", "1e3", "True", "0x10", "--1", "1,000", "½", "{}", "1 2"],
    float: ["x", "", "nan", "inf", "-inf", "1e999", "-1e999", "[]", "True", "1.2.3", "0,1", "1e", "{}", "π"],
    bool: ["maybe", "2", "", "nan", "yes please", "[]", "-1", "trueish"],
}

# What lies outside is wrong; (low, high), both allowed, None where there is no bound.
RANGES: dict[str, tuple[float | None, float | None]] = {
    "train.steps": (1, 2**31 - 1), "train.batch_size": (1, 2**31 - 1), "train.microbatches": (1, 8),
    "train.seed": (0, 2**32 - 1), "train.log_every": (1, None), "train.eval_every": (0, None),
    "train.eval_batches": (1, None), "train.checkpoint.every": (1, None), "train.checkpoint.keep_last": (1, None),
    "train.checkpoint.keep_best": (0, None), "train.optimizer.learning_rate": (0, None),
    "train.optimizer.beta1": (0, 0.9999999), "train.optimizer.beta2": (0, 0.9999999),
    "train.optimizer.eps": (0, None), "train.optimizer.weight_decay": (0, None),
    "train.optimizer.clip_norm": (1e-300, None), "train.optimizer.warmup_steps": (0, 6),
    "train.optimizer.final_fraction": (0, 1), "data.window": (2, 1024), "data.eval_fraction": (0, 1),
    "data.max_records": (1, None), "data.generated.records": (1, None), "data.generated.eval_records": (1, None),
    "data.generated.max_number": (2, None), "data.generated.min_operations": (1, 3),
    "data.generated.max_operations": (1, None), "data.generated.careful_fraction": (0, 1),
    "data.generated.text_fraction": (0, 1), "mesh.data": (-1, 8), "mesh.tensor": (1, 1), "mesh.zero": (0, 3),
    "task_eval.problems": (0, None), "task_eval.max_tokens": (1, None), "task_eval.samples": (0, None),
    "tokenizer.vocab_size": (260, 2**24), "model.vocab_size": (260, 2**31 - 1), "model.hidden_size": (2, 2**31 - 1),
    "model.intermediate_size": (1, 2**31 - 1), "model.num_layers": (1, 2000),
    "model.mtp": (0, 2000), "model.num_heads": (1, 32), "model.num_kv_heads": (1, 2),
    "model.head_dim": (2, 2**31 - 1), "model.max_position_embeddings": (256, 2**31 - 1),
    "model.rope_theta": (1e-300, None), "model.norm_eps": (0, None), "model.init_std": (0, None),
    "model.embed_init_std": (0, None), "beta": (1e-300, None), "label_smoothing": (0, 0.4999999),
    "batch_size": (1, None), "max_prompts": (1, None), "sampling.max_tokens": (1, 2**31 - 1),
    "sampling.temperature": (0, None), "sampling.top_k": (0, None), "sampling.top_p": (1e-300, 1),
    "sampling.min_p": (0, 1), "sampling.repetition_penalty": (1e-300, None), "sampling.n": (1, 2**31 - 1),
    "sampling.seed": (0, 2**64 - 1), "sampling.logprobs": (0, 2**31 - 1), "model.window": (1, 2**31 - 1),
    "train.ema_decay": (0, 0.9999999), "train.neftune_noise_alpha": (0, None),
    "train.residual_dropout": (0, 0.9999999), "train.attention_dropout": (0, 0.9999999), "train.z_loss": (0, None),
    "train.optimizer.lion.beta1": (0, 0.9999999), "train.optimizer.lion.beta2": (0, 0.9999999),
    "train.optimizer.adafactor.decay_rate": (0, None), "train.optimizer.adafactor.eps": (0, None),
    "train.optimizer.adafactor.clip_threshold": (1e-300, None), "train.optimizer.adafactor.min_scale": (0, None),
    "train.optimizer.muon.momentum": (0, 0.9999999), "train.optimizer.muon.ns_steps": (1, 100),
    "train.optimizer.sgd.momentum": (0, 0.9999999),
}  # fmt: skip

# With which flags besides a field is read at all.
BESIDE = {f"train.optimizer.{rule}.": f"train.optimizer.rule={rule}" for rule in ("lion", "adafactor", "muon", "sgd")}

NOT_ZERO_OR_ONE = {"data.eval_fraction"}

EMPTY = ["data.path", "data.eval_path", "data.chat_template", "tokenizer.path", "init_from", "reference", "prompts"]

CONTRADICTIONS: list[tuple[str, str]] = [
    ("pretrain", "train.batch_size=9 train.microbatches=2"),
    ("pretrain", "train.microbatches=3"),
    ("pretrain", "train.checkpoint.keep_best=1 train.checkpoint.best_metric=loss"),
    ("pretrain", "train.checkpoint.keep_best=1 train.checkpoint.every=3 train.eval_every=2"),
    ("pretrain", "train.checkpoint.keep_best=1 train.eval_every=0"),
    ("pretrain", "train.optimizer.decay_steps=2"),
    ("pretrain", "train.optimizer.schedule=wsd train.optimizer.decay_steps=99"),
    ("pretrain", "train.optimizer.schedule=wsd train.optimizer.decay_steps=-1"),
    ("pretrain", "train.optimizer.schedule=constant"),
    ("pretrain", "data.embedded=docstrings"),
    ("pretrain", "data.max_records=3"),
    ("pretrain", "data.eval_path=README.md"),
    ("pretrain", "data.generated.min_operations=3 data.generated.max_operations=2"),
    ("pretrain", "model.num_heads=3"),
    ("pretrain", "model.num_heads=4 model.num_kv_heads=3"),
    ("pretrain", "model.head_dim=7"),
    ("pretrain", "model.hidden_size=6 model.num_heads=2"),
    ("pretrain", "model.family=lama"),
    ("pretrain", "model.family="),
    ("pretrain", "model.vocab_size=100"),
    ("pretrain", "model.first_norm=False"),
    ("pretrain", "model.family=llm_jax model.causal=False"),
    ("pretrain", "model.family=llm_jax model.head.labels=2"),
    ("pretrain", "model.family=llm_jax model.head.pooling=mean"),
    ("pretrain", "data.window=2048"),
    ("pretrain", "mesh.data=3"),
    ("pretrain", "mesh.tensor=2"),
    ("pretrain", "mesh.data=-1 mesh.tensor=3"),
    ("pretrain", "init_from=nowhere"),
    ("pretrain", "data.path=s9://bucket/x.jsonl"),
    ("pretrain", "data.cache_dir=s9://bucket/x"),
    ("pretrain", "data.cache_dir=gs://bucket/x"),
    ("pretrain", "data.eval_fraction=0.5 data.eval_path=nowhere"),
    ("pretrain", "data.path=hub:"),
    ("pretrain", "data.path=hub:a"),
    ("pretrain", "data.path=seqio:"),
    ("pretrain", "data.path=seqio:os:task"),
    ("pretrain", "train.optimizer.rule=adamw train.optimizer.lion.beta1=0.5"),
    ("pretrain", "train.optimizer.rule=lion train.optimizer.eps=0.5"),
    ("pretrain", "tokenizer.path=s9://bucket/tok"),
    ("pretrain", "data.path=nowhere.jsonl"),
    ("pretrain", "data.path=%00.jsonl"),
    ("sft", "init_from=None"),
    ("sft", "init_from=nowhere.py"),
    ("sft", "init_from=sft.py:nothing"),
    ("sft", "init_from=s9://bucket/model"),
    ("sft", "data.path=/dev/null"),
    ("sft", "data.chat_template=nothing"),
    ("sft", "data.chat_template=../x"),
    ("sft", "data.window=2048"),
    ("dpo", "init_from=None"),
    ("dpo", "reference=nowhere"),
    ("dpo", "beta=0"),
    ("generate", "init_from=None"),
    ("generate", "prompts=nowhere.jsonl"),
    ("generate", "sampling.stop=['']"),
    ("generate", "mesh.data=7"),
]

GROUPS = [
    "x", "{}", "[1]", "3", "None", "[{'match':3}]", "[{'match':'('}]", "[{'match':'['}]", "[{'match':'*'}]",
    "[{'match':'.*','learning_rate_multiplier':-1}]", "[{'match':'.*','weight_decay':-1}]", "[{'mach':'.*'}]",
    "[{'match':'.*','learning_rate_multiplier':'x'}]", "[[]]", "[{'match':'.*'}", "__import__('os')",
    "[{'match':'.*','learning_rate_multiplier':True}]", "[{'match':None}]", "[{'match':'(?P<a>x)(?P<a>y)'}]",
]  # fmt: skip

MIXTURES = [
    "x", "{}", "[1]", "3", "[{}]", "[{'path':3}]", "[{'pth':'a'}]", "[{'path':'nowhere.jsonl'}]", "[[]]", "None",
    "[{'path':'README.md','weight':-1}]", "[{'path':'README.md','weight':0}]", "[{'path':'README.md','weight':'x'}]",
    "[{'path':'s9://b/x.jsonl'}]", "[{'path':''}]", "[{'path':'README.md','max_records':0}]",
    "[{'path':'README.md','name':''},{'path':'README.md','name':''}]", "[{'path':'README.md'},{'path':'README.md'}]",
]  # fmt: skip

TUPLES = {
    "train.freeze": ["x", "['(']", "['*']", "[3]", "{}", "['no such parameter']", "[None]", "[['a']]", "['']['']"],
    "logging.report_to": ["x", "['tensorbord']", "[3]", "{}", "[None]", "['']", "['wandb','wandb ']"],
    "logging.wandb.tags": ["x", "[3]", "{}", "[None]"],
    "sampling.stop": ["x", "[3]", "{}", "[None]", "['']", "[['a']]"],
    "profile.steps": ["x", "", "1-", "-1-2", "5-2", "1.5", "1-2-3", "nan", "0-0-"],
}

FILES: dict[str, str | bytes] = {
    "no get_config": "x = 1",
    "syntax": "def get_config(:\n  pass",
    "raises": "def get_config():\n  raise ValueError('why\\nnot')",
    "exits": "import sys\nsys.exit(0)",
    "exits inside": "import sys\ndef get_config():\n  sys.exit(0)",
    "recursion": "def get_config():\n  return get_config()",
    "none": "def get_config():\n  return None",
    "a list": "def get_config():\n  return [1]",
    "not a function": "get_config = 3",
    "imports what is not there": "import no_such_module_at_all\ndef get_config(): return {}",
    "no job": "def get_config():\n  return {'train': {}}",
    "job of another type": "def get_config():\n  return {'job': 3}",
    "job unknown": "def get_config():\n  return {'job': 'pretrian'}",
    "job list": "def get_config():\n  return {'job': ['pretrain']}",
    "needs arguments": "def get_config(a, b):\n  return {'job': 'pretrain'}",
    "null byte": b"def get_config():\n  return {'job': 'pretrain'}\0",
    "not utf-8": b"def get_config():\n  return {'job': '\xff\xfe'}",
    "keys that are no names": "def get_config():\n  return {'job': 'pretrain', 3: 4}",
    "value that is an object": "def get_config():\n  return {'job': 'pretrain', 'train': {'steps': object()}}",
    "value that is bytes": "def get_config():\n  return {'job': 'pretrain', 'data': {'path': b'x'}}",
    "cycle": "def get_config():\n  return {'job': 'sft', 'init_from': 'c.py'}",
    "empty": "",
}


def scalar_of(hint: Any) -> Any:
    arms = [arm for arm in (union_arms(hint) or (hint,)) if arm is not type(None)]
    return arms[0] if len(arms) == 1 else None


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in field_types(cls).items():
        if group := group_in(hint):
            yield from leaves(group, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def wrong_types(job: str, cls: type) -> Iterator[Case]:
    for name, hint in leaves(cls):
        scalar, optional = scalar_of(hint), type(None) in union_arms(hint)
        texts: list[str] = []
        if typing.get_origin(scalar) is Literal:
            choice = str(typing.get_args(scalar)[0])
            texts = ["zzz", "", f"{choice} ", f"{choice}x", "0", *([] if optional else ["None"])]
        elif scalar in WRONG_TEXTS:
            texts = WRONG_TEXTS[scalar] + ([] if optional else ["None"])
        if name == "job":
            texts = ["zzz", ""]
        for text in texts:
            yield Case(f"type {name}={text}", job, (f"--config.{name}={text}",))


def misspelt(job: str, cls: type, rng: random.Random) -> Iterator[Case]:
    valid = set(field_names(cls))
    for name, _ in leaves(cls):
        letters = list(name)
        place = rng.randrange(len(letters))
        kind = rng.choice(["drop", "double", "swap", "other", "upper", "dot"])
        if kind == "drop":
            del letters[place]
        elif kind == "double":
            letters.insert(place, letters[place])
        elif kind == "swap":
            letters[place - 1], letters[place] = letters[place], letters[place - 1]
        elif kind == "other":
            letters[place] = "q"
        elif kind == "upper":
            letters[place] = letters[place].upper()
        else:
            letters.append(".x")
        wrong = "".join(letters)
        if wrong not in valid and "=" not in wrong and re.fullmatch(r"[\w.]+", wrong):
            yield Case(f"name {wrong}", job, (f"--config.{wrong}=1",))


def out_of_range(job: str, cls: type) -> Iterator[Case]:
    for name, hint in leaves(cls):
        if name not in RANGES:
            continue
        low, high = RANGES[name]
        scalar = scalar_of(hint)
        values: list[Any] = []
        if low is not None:
            values += [low - 1, -HUGE] if scalar is int else [-0.5 if low < 0.1 else low - 0.5, -1e30]
            if low == 1e-300:
                values.append(0.0)
        if name == "mesh.data":
            values = [0, -2, -HUGE]
        if high is not None:
            values += [high + 1, HUGE] if scalar is int else [high + 0.5, 1e30]
        if name in NOT_ZERO_OR_ONE:
            continue  # without data.path nobody reads it; `contradictions` and records have it
        for value in values:
            beside = [f"--config.{flag}" for start, flag in BESIDE.items() if name.startswith(start)]
            yield Case(f"range {name}={value}", job, (f"--config.{name}={value}", *beside))


def in_files(job: str, cls: type, rng: random.Random) -> Iterator[Case]:
    """The same faults as values of a config file: of types that no text on the command line has."""
    wrong: dict[Any, list[str]] = {
        int: ["1.0", "'1'", "None", "True", "float('nan')", "[1]", "{'a': 1}", "b'1'", "object()", "1j"],
        float: ["'1'", "True", "float('nan')", "float('inf')", "[1.0]", "{'a': 1}", "b'1'", "1j"],
        bool: ["1", "'true'", "0.0", "[]", "{}"],
        str: ["1", "True", "[]", "{'a': 1}", "b'x'", "float('nan')"],
    }
    for name, hint in leaves(cls):
        scalar, optional = scalar_of(hint), type(None) in union_arms(hint)
        choices = [t for t in wrong.get(scalar, []) if not (optional and t == "None")]
        if not choices:
            continue
        text = rng.choice(choices)
        if text.startswith("{"):
            text = f"ConfigDict({text})"
        value = text
        for part in reversed(name.split(".")):
            value = f"{{{part!r}: {value}}}"
        body = "from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict"
        body += f"({{'job': {job!r}, **{value}}})"
        yield Case(f"file {name}={text}", job, (), body)


def cases(seed: int) -> list[Case]:
    rng = random.Random(seed)
    found: list[Case] = []
    for job, cls in JOBS.items():
        config = {"preference": "dpo"}.get(job, job)
        found += [case._replace(job=config) for case in [*wrong_types(job, cls), *out_of_range(job, cls)]]
        found += [case._replace(job=config) for case in misspelt(job, cls, rng)]
        found += in_files(job, cls, rng)
    for job, flags in CONTRADICTIONS:
        flags = tuple(f"--config.{flag}".replace("%00", "\0") for flag in flags.split())
        found.append(Case(f"contradiction {flags}", job, flags))
    for name in EMPTY:
        job = {"reference": "dpo", "prompts": "generate", "tokenizer.path": "pretrain"}.get(name, "sft")
        more = ("--config.data.path=.",) if name == "data.eval_path" else ()
        found.append(Case(f"empty {name}", job, (f"--config.{name}=", *more)))
    found += [Case(f"groups {text}", "pretrain", (f"--config.train.optimizer.groups={text}",)) for text in GROUPS]
    found += [Case(f"mixture {text}", "pretrain", (f"--config.data.mixture={text}",)) for text in MIXTURES]
    for name, texts in TUPLES.items():
        job = "generate" if name.startswith("sampling") else "pretrain"
        found += [Case(f"tuple {name}={text}", job, (f"--config.{name}={text}",)) for text in texts]
    found += [Case(f"file: {name}", "pretrain", (), text) for name, text in FILES.items()]
    return found
