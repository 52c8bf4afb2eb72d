# pyright: reportMissingImports=false
"""Adapters by SFT, DPO and of reward models, as TRL's trainers with PEFT do it; DPO's reference is the model with its
adapter disabled, and a reward model's projection is trained whole.

    HF_HUB_OFFLINE=1 PYTHONPATH=.:tests/oracles python tests/oracles/trl_lora.py

writes `tests/golden/trl/lora_*.npz`: as those of trl_sft.py, trl_dpo.py and trl_reward.py, with gradients of the
adapter's tensors under their names in its file; and `step:NAME`, its tensors after a step of the optimizer that PEFT
makes for LoRA+. Weights of the adapters are `adapters_recipe.draw`'s.
"""

import tempfile
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from peft.optimizers import create_loraplus_optimizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl_reward import make_scorer
from trl_tiny import BETA, COMPLETIONS, PAIRS, dataset, make_model, make_tokenizer, run, write

from tests.oracles import adapters_recipe

COMMON: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "gradient_checkpointing": False,
    "max_length": 160,
}


def without_adapter(name: str) -> str:
    name = name.replace(".modules_to_save.default", "").replace("_vector.default.weight", "_vector")
    return name.removesuffix(".default").replace(".default.", ".")


def make_trainer(kind: str, fields: dict[str, Any]) -> Any:
    options = {"model": make_model(), "processing_class": make_tokenizer(), "peft_config": LoraConfig(**fields)}
    if kind == "reward":
        args = RewardConfig(tempfile.mkdtemp(), per_device_train_batch_size=len(PAIRS), **COMMON)
        options["model"] = make_scorer(options["processing_class"].pad_token_id)
        return RewardTrainer(args=args, train_dataset=dataset(PAIRS), **options)
    if kind == "sft":
        args = SFTConfig(tempfile.mkdtemp(), per_device_train_batch_size=len(COMPLETIONS), **COMMON)
        return SFTTrainer(args=args, train_dataset=dataset(COMPLETIONS), **options)
    args = DPOConfig(tempfile.mkdtemp(), beta=BETA, per_device_train_batch_size=len(PAIRS), **COMMON)
    return DPOTrainer(args=args, train_dataset=dataset(PAIRS), **options)


def main() -> None:
    for case, (kind, fields) in adapters_recipe.STEPS.items():
        torch.manual_seed(0)
        trainer = make_trainer(kind, fields)
        trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, value in trained.items():
                drawn = adapters_recipe.draw(case, without_adapter(name), tuple(value.shape), {})
                value.copy_(torch.from_numpy(drawn))
        rows = list(trainer.train_dataset)
        if kind == "reward":
            rows = [{name: row[name] for name in ("chosen_ids", "rejected_ids")} for row in rows]
        loss = trainer.compute_loss if kind != "dpo" else lambda m, i, t=trainer: t._compute_loss(m, i, False)
        arrays = run(trainer, loss, trainer.data_collator(rows))
        renamed = {f"grad:{without_adapter(n[5:])}" if n.startswith("grad:") else n: v for n, v in arrays.items()}
        optimizer = create_loraplus_optimizer(
            trainer.model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=adapters_recipe.LR_RATIO, eps=1e-2,
            betas=(0.9, 0.95), weight_decay=0.0,
        )  # fmt: skip
        optimizer.step()
        renamed |= {f"step:{without_adapter(n)}": p.detach().numpy().astype(np.float32) for n, p in trained.items()}
        write(f"lora_{case}", renamed)


if __name__ == "__main__":
    main()
