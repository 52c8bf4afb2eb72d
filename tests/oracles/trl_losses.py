# pyright: reportMissingImports=false
"""Values and gradients of TRL's own losses on given log-probabilities: its trainers' code, run on stand-ins of a model.

    HF_HUB_OFFLINE=1 python tests/oracles/trl_losses.py

writes `tests/golden/trl/losses.npz`. Arrays: `INPUTS/NAME` (`random` and `extreme` sets of pairs, float64), and
`CASE|INPUTS|values` with `CASE|INPUTS|grads`: a loss per pair and its gradients by the log-probabilities, or, where the
loss is of the whole batch, one value. `cases` tells in JSON which trainer, loss_type and options a case is.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

PATH = pathlib.Path(__file__).parents[1] / "golden" / "trl" / "losses.npz"
DPO = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"]
DPO += ["apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]
DIVERGENCE = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"]
OF_BATCH = {"aot", "aot_unpaired", "sft"}
WIDTH = 16


def draw_inputs() -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(7)
    n = 6
    # Multiples of 1/64 are exact in float32 too, in which some of TRL's losses compute.
    ref = np.round(-rng.uniform(8.0, 40.0, (2, n)) * 64) / 64
    lengths = rng.integers(3, WIDTH, (2, n))
    random = {"logps": ref + np.round(rng.normal(0.0, 4.0, (2, n)) * 64) / 64, "ref_logps": ref, "lengths": lengths}
    ratios = np.array(
        [[1e4, -1e4], [-1e4, 1e4], [1e3, 1e3], [-1e3, 0.0], [0.0, -1e3], [60.0, -60.0], [-60.0, 60.0], [-1e4, -1e4]]
    ).T
    ref = np.full(ratios.shape, -11000.0)
    lengths = rng.integers(3, WIDTH, ratios.shape)
    inputs = {"random": random, "extreme": {"logps": ref + ratios, "ref_logps": ref, "lengths": lengths}}
    for each in inputs.values():
        each["log_sum_sq_probs"] = -rng.uniform(0.2, 2.0, each["logps"].shape) * each["lengths"]
        each["labels"] = rng.integers(0, 2, each["logps"].shape[1]).astype(bool)
        each["kl_ratios"] = rng.normal(0.7, 2.0, each["logps"].shape[1])
        each["rewards"] = rng.normal(0.0, 2.0, each["logps"].shape) * (1.0 if each is random else 1e3)
        each["margin"] = rng.uniform(0.0, 3.0, each["logps"].shape[1])
    return inputs


def stand_in(**fields: object) -> SimpleNamespace:
    """What the losses read of a trainer: one process, no model of its own."""
    alone = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, parallelism_config=None)
    model = torch.nn.Identity()
    model.is_gradient_checkpointing = False
    common = {"accelerator": alone, "model": model, "_metrics": defaultdict(_lists)}
    return SimpleNamespace(**common, _total_train_tokens=0, _tp_size=1, aux_loss_enabled=False, **fields)


def _lists() -> defaultdict:
    return defaultdict(list)


def spread(sums: torch.Tensor, lengths: np.ndarray, mask: torch.Tensor, evenly: bool) -> torch.Tensor:
    """Per-token numbers [n, WIDTH] with these sums: the same at each of an answer's tokens, or all at the first."""
    if evenly:
        return (sums / torch.tensor(lengths))[:, None] * mask
    return sums[:, None] * (torch.arange(WIDTH) == 0)


def token_mask(lengths: np.ndarray) -> torch.Tensor:
    return torch.arange(WIDTH)[None] < torch.tensor(lengths)[:, None]


def model_of(tokens: torch.Tensor, log_sum_sq_probs: torch.Tensor | None = None):
    outputs = SimpleNamespace(
        log_probs=tokens,
        log_sum_sq_probs=log_sum_sq_probs,
        entropy=torch.zeros_like(tokens),
        mean_logits=torch.zeros_like(tokens),
        is_top1=torch.zeros(tokens.shape, dtype=torch.bool),
    )
    return lambda **_: outputs


def dpo(inputs: dict, loss_type: str, options: dict, dtype: torch.dtype) -> tuple[float, np.ndarray]:
    """`DPOTrainer._compute_loss` and its gradient by the summed log-probabilities [2, n]."""
    logps = torch.tensor(inputs["logps"], dtype=dtype, requires_grad=True)
    lengths = inputs["lengths"].reshape(-1)
    mask = token_mask(lengths)
    tokens, ref, squares = (
        spread(sums.reshape(-1), lengths, mask, evenly="ld_alpha" in options)
        for sums in (logps, *(torch.tensor(inputs[name], dtype=dtype) for name in ("ref_logps", "log_sum_sq_probs")))
    )
    completion_mask = torch.nn.functional.pad(mask, (1, 0)).long()
    trainer = stand_in(
        ld_alpha=options.get("ld_alpha"),
        precompute_ref_logps=False,
        ref_model=model_of(ref),
        f_divergence_type=options.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=options.get("f_alpha_divergence_coef", 0.5),
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=options["beta"],
        label_smoothing=options.get("label_smoothing", 0.0),
        use_weighting=options.get("use_weighting", False),
        args=SimpleNamespace(
            discopop_tau=options.get("discopop_tau", 0.05),
            gradient_checkpointing=False,
            gradient_checkpointing_kwargs=None,
        ),
    )
    batch = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
    }
    loss = DPOTrainer._compute_loss(trainer, model_of(tokens, squares), batch, False)
    loss.backward()
    return loss.item(), logps.grad.numpy()


def kto(inputs: dict, loss_type: str, options: dict, dtype: torch.dtype) -> tuple[float, np.ndarray]:
    """`KTOTrainer._compute_loss` on the chosen side's log-probabilities as single answers [n]."""
    logps = torch.tensor(inputs["logps"][0], dtype=dtype, requires_grad=True)
    lengths = inputs["lengths"][0]
    mask = token_mask(lengths)
    completion_mask = torch.nn.functional.pad(mask, (1, 0)).long()
    trainer = stand_in(
        calculate_KL=loss_type == "kto",
        precompute_ref_logps=True,
        loss_type=loss_type,
        beta=options["beta"],
        desirable_weight=options.get("desirable_weight", 1.0),
        undesirable_weight=options.get("undesirable_weight", 1.0),
        _compute_kl_logps=lambda *_: torch.tensor(inputs["kl_ratios"], dtype=dtype),
    )
    batch = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "label": torch.tensor(inputs["labels"]),
        "ref_logps": torch.tensor(inputs["ref_logps"][0], dtype=dtype),
        "ref_KL_logps": torch.zeros(len(lengths), dtype=dtype),
    }
    loss = KTOTrainer._compute_loss(trainer, model_of(spread(logps, lengths, mask, False)), batch, False)
    loss.backward()
    return loss.item(), logps.grad.numpy()


def cpo(inputs: dict, loss_type: str, options: dict, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """`CPOTrainer.cpo_loss` on sums, or on averages where that trainer takes them."""
    logps = torch.tensor(inputs["logps"], dtype=dtype, requires_grad=True)
    given = logps / torch.tensor(inputs["lengths"]) if loss_type in ("simpo", "ipo") else logps
    trainer = stand_in(
        alpha=options.get("alpha", 0.0),
        loss_type=loss_type,
        beta=options["beta"],
        simpo_gamma=options.get("simpo_gamma", 0.5),
        label_smoothing=options.get("label_smoothing", 0.0),
    )
    losses, _, _ = CPOTrainer.cpo_loss(trainer, given[0], given[1])
    losses.sum().backward()
    return losses.detach().numpy(), logps.grad.numpy()


def orpo(inputs: dict, options: dict) -> tuple[np.ndarray, np.ndarray]:
    """`ORPOTrainer.odds_ratio_loss`, whose sign TRL turns when it adds it; it computes in float32."""
    logps = torch.tensor(inputs["logps"], dtype=torch.float32, requires_grad=True)
    means = logps / torch.tensor(inputs["lengths"], dtype=torch.float32)
    losses = -ORPOTrainer.odds_ratio_loss(stand_in(beta=options["beta"]), means[0], means[1])[0]
    losses.sum().backward()
    return losses.detach().numpy(), logps.grad.numpy()


def reward(inputs: dict, options: dict) -> tuple[float, np.ndarray]:
    """`RewardTrainer.compute_loss` of the rewards [2, n]."""
    rewards = torch.tensor(inputs["rewards"], dtype=torch.float64, requires_grad=True)
    trainer = stand_in(args=SimpleNamespace(center_rewards_coefficient=options.get("center_rewards_coefficient")))
    batch = {"attention_mask": torch.ones(2, 3)}
    if options.get("margin"):
        batch["margin"] = torch.tensor(inputs["margin"])
    outputs = SimpleNamespace(logits=rewards.reshape(-1, 1))
    loss = RewardTrainer.compute_loss(trainer, lambda **_: outputs, batch)
    loss.backward()
    return loss.item(), rewards.grad.numpy()


def dft(inputs: dict) -> tuple[float, np.ndarray]:
    """`SFTTrainer.compute_loss` of tokens with these log-probabilities, a tenth of those of the answers [2, n]."""
    logps = torch.tensor(inputs["logps"], dtype=torch.float64, requires_grad=True)
    args = SimpleNamespace(loss_type="dft", average_tokens_across_devices=False)
    trainer = stand_in(args=args, compute_loss_func=None, label_smoother=None)
    outputs = SimpleNamespace(
        log_probs=logps / 10,
        label_mask=torch.ones(logps.shape),
        entropy=torch.zeros(logps.shape),
        is_top1=torch.zeros(logps.shape),
    )
    batch = {"attention_mask": torch.ones(logps.shape), "labels": None}
    loss = SFTTrainer.compute_loss(trainer, lambda **_: outputs, batch)
    loss.backward()
    return loss.item(), logps.grad.numpy()


def cases() -> dict[str, dict]:
    found = {}
    for name in DPO:
        smoothing = {"label_smoothing": 0.1} if name in ("robust", "exo_pair", "aot", "aot_unpaired") else {}
        beta = 5.0 if name == "sigmoid_norm" else 0.1
        found[name] = {"trainer": "dpo", "loss_type": name, "options": {"beta": beta, **smoothing}}
    found["sigmoid_smoothed"] = {
        "trainer": "dpo",
        "loss_type": "sigmoid",
        "options": {"beta": 0.1, "label_smoothing": 0.1},
    }
    for name in DIVERGENCE:
        for kind, coef in (("forward_kl", 0.5), ("js_divergence", 0.5), ("alpha_divergence", 0.3)):
            options = found[name]["options"] | {"f_divergence_type": kind, "f_alpha_divergence_coef": coef}
            found[f"{name}_{kind}"] = {"trainer": "dpo", "loss_type": name, "options": options}
    found["sigmoid_ld"] = {"trainer": "dpo", "loss_type": "sigmoid", "options": {"beta": 0.1, "ld_alpha": 0.3}}
    found["sigmoid_wpo"] = {"trainer": "dpo", "loss_type": "sigmoid", "options": {"beta": 0.1, "use_weighting": True}}
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
    for name in ("kto", "apo_zero_unpaired"):
        found[name] = {"trainer": "kto", "loss_type": name, "options": {"beta": 0.1, **weights}}
    for name, options in {
        "sigmoid": {"beta": 0.1, "label_smoothing": 0.1},
        "hinge": {"beta": 0.1},
        "ipo": {"beta": 0.1},
        "simpo": {"beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.1},
    }.items():
        found[f"cpo_{name}"] = {"trainer": "cpo", "loss_type": name, "options": options}
    for name, alpha in (("alphapo", 0.25), ("alphapo_negative", -0.5)):
        options = {"beta": 2.0, "simpo_gamma": 0.4, "alpha": alpha}
        found[name] = {"trainer": "cpo", "loss_type": "simpo", "options": options}
    found["orpo"] = {"trainer": "orpo", "loss_type": "orpo", "options": {"beta": 0.1}}
    found["dft"] = {"trainer": "sft", "loss_type": "dft", "options": {}}
    found["reward"] = {"trainer": "reward", "loss_type": "reward", "options": {}}
    options = {"margin": True, "center_rewards_coefficient": 0.01}
    found["reward_margin_centred"] = {"trainer": "reward", "loss_type": "reward", "options": options}
    return found


def pair(inputs: dict, index: int) -> dict:
    return {name: value[..., index : index + 1] for name, value in inputs.items()}


def compute(case: dict, inputs: dict) -> tuple[np.ndarray, np.ndarray]:
    loss_type, options = case["loss_type"], case["options"]
    if case["trainer"] == "cpo":
        return cpo(inputs, loss_type, options, torch.float64)
    if case["trainer"] == "orpo":
        return orpo(inputs, options)
    if case["trainer"] == "sft":
        return dft(inputs)
    if case["trainer"] == "reward":
        return reward(inputs, options)
    # TRL's alpha-divergence knows no float64.
    dtype = torch.float32 if options.get("f_divergence_type") == "alpha_divergence" else torch.float64
    if case["trainer"] == "kto":
        return kto(inputs, loss_type, options, dtype)
    if loss_type in OF_BATCH:
        return dpo(inputs, loss_type, options, dtype)
    each = [dpo(pair(inputs, i), loss_type, options, dtype) for i in range(inputs["logps"].shape[1])]
    return np.array([value for value, _ in each]), np.concatenate([grad for _, grad in each], axis=1)


def main() -> None:
    torch.manual_seed(0)
    all_inputs = draw_inputs()
    arrays = {f"{kind}/{name}": value for kind, inputs in all_inputs.items() for name, value in inputs.items()}
    for name, case in cases().items():
        for kind, inputs in all_inputs.items():
            values, grads = compute(case, inputs)
            arrays |= {f"{name}|{kind}|values": np.asarray(values), f"{name}|{kind}|grads": grads}
            print(name, kind, np.round(values, 5))
    versions = {p: importlib.metadata.version(p) for p in ("trl", "torch", "numpy")}
    arrays["versions"] = np.array(json.dumps(versions | {"python": platform.python_version()}))
    arrays["cases"] = np.array(json.dumps(cases()))
    np.savez_compressed(PATH, **arrays)
    print(PATH.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
