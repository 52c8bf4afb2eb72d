"""Iterative DPO: the policy answers word problems, right answers are preferred to wrong ones, and so on from its own.

    python -m llm_jax.main --config=configs/iterative_dpo.py
    python -m llm_jax.main --config=configs/iterative_dpo.py:gsm8k --config.init_from=MODEL --config.data.path=FILE

Trains `pretrain.py` and `sft.py` first if they aren't there. Three rounds, each of 512 problems of its own, eight
samples each, the best over the worst of them (Dong et al. 2024, arXiv:2405.07863); the policy of a round's start is its
reference. The run's report has a line per round, and each training one of its own in `rounds/NN/run/`. Expect right
answers to 400 held-out problems to go from 13% to 98% in the first round, and to 99% in the third.

Variants: `:rpo` (right over wrong answers, four pairs a problem at most, and the likelihood of the chosen one beside
the preference; Pang et al. 2024, arXiv:2404.19733), `:online` (pairs sampled every four steps; Guo et al. 2024,
arXiv:2402.04792), `:gsm8k` (`question` and `answer` of a file; needs a model), `:test`, `:rpo_test` and `:online_test`
(seconds, for tests).
"""

from ml_collections.config_dict import ConfigDict, required_placeholder


def quickstart() -> ConfigDict:
    """Minutes on two CPU cores, after its prerequisites."""
    return ConfigDict(
        {
            "job": "rounds",
            "init_from": "sft.py",
            "method": "iterative_dpo",
            "rounds": 3,
            "prompts_per_round": 512,
            "sampling": {"n": 8, "max_tokens": 64},
            "data": {"window": 512},
            "preference": {
                "beta": 0.1,
                "train": {
                    "steps": 40,
                    "batch_size": 8,
                    "optimizer": {"learning_rate": 3e-5, "warmup_steps": 4, "weight_decay": 0.0},
                    "checkpoint": {"every": 20},
                },
            },
            "task_eval": {"max_tokens": 64},
            # Batches this small have nothing to gain from more devices.
            "mesh": {"data": 1},
        }
    )


def rpo() -> ConfigDict:
    """Iterative RPO: the same with the chosen answers' likelihood."""
    config = quickstart()
    config.update(
        {
            "method": "iterative_rpo",
            "pairs": {"choose": "thresholds", "above": 1.0, "below": 0.0, "most": 4},
            "preference": {"loss_type": "rpo"},
        }
    )
    return config


def online() -> ConfigDict:
    """One training, whose policy is asked again every four steps; the reference stays where it began."""
    config = quickstart()
    config.update(
        {
            "method": "online_dpo",
            "rounds": 1,
            "prompts_per_round": 64,
            "sample_every": 4,
            "sampling": {"n": 4},
            "data": {"window": 192, "packing": "one_per_row", "on_long": "drop"},
            "preference": {"reference_logps": "live", "train": {"steps": 180, "batch_size": 16}},
        }
    )
    return config


def gsm8k() -> ConfigDict:
    """A model of your own on the problems of GSM8K, or of any file of that form."""
    config = quickstart()
    config.update(
        {
            "init_from": required_placeholder(str),
            "prompts_per_round": None,
            "sampling": {"max_tokens": 320},
            "data": {"path": required_placeholder(str), "window": 1024, "on_long": "drop"},
            "preference": {
                "train": {
                    "steps": 150,
                    "batch_size": 32,
                    "compute_dtype": "bfloat16",
                    "remat": "full",
                    "optimizer": {"learning_rate": 5e-7, "warmup_steps": 15},
                }
            },
            "task_eval": {"max_tokens": 320},
            "mesh": {"data": -1, "zero": 3},
        }
    )
    return config


def small(config: ConfigDict) -> ConfigDict:
    """Seconds; learns next to nothing. The policy knows no answer, so what is scored is the length."""
    config.update(
        {
            "init_from": "sft.py:test",
            "rounds": 1 if config.method == "online_dpo" else 2,
            "prompts_per_round": 4,
            "chunk": 2,
            "sampling": {"n": 3, "max_tokens": 8},
            "scorer": {"kind": "function", "function": "llm_jax.jobs.alignment.rewards.shortness"},
            "pairs": {"truncated": "keep"},
            "data": {"window": 512, "generated": {"records": 8, "eval_records": 4}},
            "preference": {
                "train": {
                    "steps": 3,
                    "batch_size": 8,
                    "log_every": 1,
                    "eval_batches": 1,
                    "optimizer": {"warmup_steps": 1},
                    "checkpoint": {"every": 2},
                }
            },
            "task_eval": {"problems": 3, "max_tokens": 8, "samples": 2},
            "mesh": {"data": -1},
        }
    )
    return config


def rpo_test() -> ConfigDict:
    """Lengths know no threshold."""
    config = small(rpo())
    config.update({"pairs": {"choose": "all", "above": None, "below": None}})
    return config


VARIANTS = {
    "": quickstart,
    "quickstart": quickstart,
    "rpo": rpo,
    "online": online,
    "gsm8k": gsm8k,
    "test": lambda: small(quickstart()),
    "rpo_test": rpo_test,
    "online_test": lambda: small(online()),
}


def get_config(variant: str = "") -> ConfigDict:
    return VARIANTS[variant]()
