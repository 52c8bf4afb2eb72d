"""Step-DPO: of a wrong answer the first wrong step, and a right one in its place, after the right steps before it.

    python -m llm_jax.main --config=configs/step_dpo.py
    python -m llm_jax.main --config=configs/step_dpo.py:gsm8k --config.init_from=MODEL --config.data.path=FILE
    python -m llm_jax.main --config=configs/step_dpo.py:records --config.init_from=MODEL --config.data.path=steps.jsonl

The policy answers word problems, eight times each. In its wrong answers the first wrong step is found by its equation;
from the steps before it the policy goes on eight times more, and the first step of a continuation that comes to the
right answer is preferred (Lai et al. 2024, arXiv:2406.18629). Prompt and right steps are context, one step is learned,
and only a step that ends its answer has an end token. Trains `pretrain.py` and `sft.py` first if they aren't there.
With 128 problems (239 pairs) and 40 steps of training, right answers to 100 held-out problems went from 19% to 96%:
most of the wrong steps are guesses, and the right ones show how the problem is worked out.

Variants: `:gsm8k` (`question` and `answer` of a file; needs a model, whose own continuations tell which step is wrong),
`:records` (a file of pairs one step apart: the published Math-Step-DPO-10K, or GSM8K's marked solutions; needs a
model), `:written` (embedded problems whose wrong steps are made up, no policy asked), `:test` (of `:written`, seconds,
for tests: a policy of that size has no right continuation).
"""

from ml_collections.config_dict import ConfigDict, required_placeholder


def quickstart() -> ConfigDict:
    """Minutes on two CPU cores, after its prerequisites."""
    return ConfigDict(
        {
            "job": "rounds",
            "init_from": "sft.py",
            "method": "step_dpo",
            "rounds": 1,
            "prompts_per_round": 512,
            "sampling": {"n": 8, "max_tokens": 64},
            "data": {"window": 512},
            "preference": training(),
            "task_eval": {"max_tokens": 64},
            # Batches this small have nothing to gain from more devices.
            "mesh": {"data": 1},
        }
    )


def training() -> dict:
    """How the pairs of steps are learned; beta is the authors' for 7B models."""
    return {
        "beta": 0.5,
        "train": {
            "steps": 120,
            "batch_size": 8,
            "eval_every": 60,
            "optimizer": {"learning_rate": 3e-5, "warmup_steps": 6, "weight_decay": 0.0},
            "checkpoint": {"every": 60},
        },
    }


def written() -> ConfigDict:
    """The next right step over a made-up wrong one; a minute after its prerequisites."""
    return ConfigDict(
        {
            "job": "preference",
            "init_from": "sft.py",
            "data": {"embedded": "steps", "window": 512, "generated": {"records": 3000}},
            "task_eval": {"max_tokens": 64},
            "mesh": {"data": 1},
            **training(),
        }
    )


def records() -> ConfigDict:
    """A model of your own on pairs that are there already; the authors' settings for 7B models."""
    config = written()
    config.update(
        {
            "init_from": required_placeholder(str),
            "data": {"path": required_placeholder(str), "embedded": "problems", "window": 2048, "on_long": "drop"},
            "train": large(steps=640),
            "mesh": {"data": -1, "zero": 3},
        }
    )
    return config


def large(steps: int) -> dict:
    """Batches and rates for a model of several billion parameters."""
    return {
        "steps": steps,
        "batch_size": 32,
        "compute_dtype": "bfloat16",
        "remat": "full",
        "optimizer": {"learning_rate": 5e-7, "warmup_steps": 32},
    }


def gsm8k() -> ConfigDict:
    """A model of your own on the problems of GSM8K, or of any file of that form."""
    config = quickstart()
    config.update(
        {
            "init_from": required_placeholder(str),
            "prompts_per_round": None,
            "sampling": {"max_tokens": 320},
            "steps": {"locate": "continuations"},
            "data": {"path": required_placeholder(str), "window": 1024, "on_long": "drop"},
            "preference": {"train": large(steps=150)},
            "task_eval": {"max_tokens": 320},
            "mesh": {"data": -1, "zero": 3},
        }
    )
    return config


def test() -> ConfigDict:
    """Seconds; learns next to nothing."""
    config = written()
    config.update(
        {
            "init_from": "sft.py:test",
            "data": {"generated": {"records": 100, "eval_records": 16}},
            "train": {
                "steps": 4,
                "log_every": 2,
                "eval_every": 2,
                "eval_batches": 2,
                "optimizer": {"warmup_steps": 1},
                "checkpoint": {"every": 2},
            },
            "mesh": {"data": -1},
            "task_eval": {"problems": 4, "max_tokens": 16, "samples": 2},
        }
    )
    return config


VARIANTS = {
    "": quickstart,
    "quickstart": quickstart,
    "written": written,
    "records": records,
    "gsm8k": gsm8k,
    "test": test,
}


def get_config(variant: str = "") -> ConfigDict:
    return VARIANTS[variant]()
