# pyright: reportMissingImports=false
"""Whole steps of TRL's DPO, KTO, CPO and ORPO trainers: many losses of one batch, from the same weights and raw text.

    HF_HUB_OFFLINE=1 python tests/oracles/trl_preference.py

writes `tests/golden/trl/preference_{dpo,kto,cpo,orpo}.npz`. Of each case its options (JSON), loss, metrics, and of each
parameter's gradient its norm and projections of `recipe.project`, in float64. `other` among the options is how far the
reference's weights lie from the policy's.
"""

import json
import tempfile

import numpy as np
import torch
from recipe import project
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl_tiny import PAIRS, UNMERGED, UNPAIRED, dataset, make_model, make_tokenizer, write

DPO = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"beta": 0.01},
    "sft": {},
    "sigmoid_norm": {},
    # Its rewards grow with the exponential of the log-ratio: the reference is nearer.
    "forward_kl": {"loss_type": ["sigmoid"], "f_divergence_type": "forward_kl", "other": 0.1},
    "js_divergence": {"loss_type": ["sigmoid"], "f_divergence_type": "js_divergence"},
    "alpha_divergence": {
        "loss_type": ["sigmoid"],
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 0.7,
    },
    "ipo_js": {"loss_type": ["ipo"], "f_divergence_type": "js_divergence"},
    "ld_dpo": {"loss_type": ["sigmoid"], "ld_alpha": 0.4},
    "ld_ipo": {"loss_type": ["ipo"], "ld_alpha": 0.4},
    "wpo": {"loss_type": ["sigmoid"], "use_weighting": True},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
}
KTO = {
    "kto": {},
    "kto_weights": {"loss_type": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.7, "beta": 0.3},
    "apo_zero_unpaired": {},
}
CPO = {
    "cpo": {"loss_type": "sigmoid", "label_smoothing": 0.1, "cpo_alpha": 0.7},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    "cpo_simpo": {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 0.5, "cpo_alpha": 1.0},
    "alphapo": {"loss_type": "alphapo", "beta": 2.5, "simpo_gamma": 0.1, "alpha": 0.25},
}
ORPO = {"orpo": {"beta": 0.1}, "orpo_strong": {"beta": 1.0}}


def arguments(records: list[dict]) -> dict:
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
        "max_length": 160,
        "per_device_train_batch_size": len(records),
    }


def judged(trainer, loss_of) -> dict[str, np.ndarray]:
    """The loss, metrics and gradients of a trainer's whole data set as one batch."""
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    trainer.model.train()
    trainer.model.zero_grad()
    loss, metrics = loss_of(trainer, batch)
    loss.backward()
    names, grads = zip(
        *((n, np.zeros(p.shape) if p.grad is None else p.grad.numpy()) for n, p in trainer.model.named_parameters())
    )
    return {
        "loss": np.float64(loss.detach().numpy()),
        "metric_names": np.array(list(metrics)),
        "metrics": np.array(list(metrics.values()), np.float64),
        "tensors": np.array(names),
        "norms": np.array([np.linalg.norm(g.astype(np.float64)) for g in grads]),
        "projections": np.stack([project(n, g) for n, g in zip(names, grads)]),
    }


def stable(trainer, batch):
    loss = trainer._compute_loss(trainer.model, batch, False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def experimental(trainer, batch):
    return trainer.get_batch_loss_metrics(trainer.model, batch, "train")


def save(name: str, cases: dict[str, dict], records: list[dict], made, **further: np.ndarray) -> None:
    arrays = {"records": np.array(json.dumps(records)), **further}
    for case, options in cases.items():
        given = {"loss_type": case, **options}
        found = made(dict(given))
        arrays |= {f"{case}/{key}": value for key, value in found.items() if key != "tensors"}
        arrays |= {f"{case}/options": np.array(json.dumps(given)), "tensors": found["tensors"]}
        print(case, float(found["loss"]), dict(zip(found["metric_names"].tolist(), found["metrics"].round(4).tolist())))
    write(name, arrays | {"loss": arrays[f"{next(iter(cases))}/loss"]})


def main() -> None:
    torch.manual_seed(0)
    plain, with_bos = make_tokenizer(), make_tokenizer(bos=True)

    def dpo(options: dict) -> dict:
        other = options.pop("other", 1.0)
        config = DPOConfig(**arguments(PAIRS) | {"beta": 0.1} | options)
        given = {"args": config, "train_dataset": dataset(PAIRS), "processing_class": plain}
        return judged(DPOTrainer(make_model(), make_model(other=other), **given), stable)

    def kto(options: dict) -> dict:
        config = KTOConfig(**arguments(UNPAIRED) | {"beta": 0.1, "train_sampling_strategy": "sequential"} | options)
        given = {"args": config, "train_dataset": dataset(UNPAIRED), "processing_class": plain}
        return judged(KTOTrainer(make_model(), make_model(other=1.0), **given), stable)

    def cpo(options: dict) -> dict:
        config = CPOConfig(**arguments(UNMERGED) | options)
        trainer = CPOTrainer(make_model(), config, train_dataset=dataset(UNMERGED), processing_class=with_bos)
        return judged(trainer, experimental)

    def orpo(options: dict) -> dict:
        del options["loss_type"]
        config = ORPOConfig(**arguments(UNMERGED) | options)
        trainer = ORPOTrainer(make_model(), config, train_dataset=dataset(UNMERGED), processing_class=with_bos)
        return judged(trainer, experimental)

    save("preference_dpo", DPO, PAIRS, dpo)
    save("preference_kto", KTO, UNPAIRED, kto)
    # How its tokenization cuts a prompt whose last two tokens merge with the answer's first letter.
    given = {"train_dataset": dataset(PAIRS), "processing_class": with_bos}
    merged = CPOTrainer(make_model(), CPOConfig(**arguments(PAIRS)), **given).train_dataset[1]
    cut = {f"merged_{name}": np.array(merged[f"chosen_{name}"]) for name in ("input_ids", "labels")}
    save("preference_cpo", CPO, UNMERGED, cpo, **cut)
    save("preference_orpo", ORPO, UNMERGED, orpo)


if __name__ == "__main__":
    main()
