# pyright: reportMissingImports=false
"""The peer's worker for preferences: TRL's trainers, each with its own collator and loss; runs under --peer-python."""

import tempfile
from typing import Any

import workload
from datasets import Dataset
from peer_torch import ARGUMENTS, make_model, make_tokenizer, stepper, work
from peft import LoraConfig
from transformers import LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

REFERENCE = -600.0
"""What a stored reference says of every answer."""


def common(config, size: int, **more: Any) -> dict[str, Any]:
    """Arguments that all trainers have. The record is there because they ask for one; batches are made by hand."""
    args = config(tempfile.mkdtemp(), max_length=None, per_device_train_batch_size=size, **ARGUMENTS, **more)
    record = {"prompt": "a", "chosen": " a", "rejected": " a", "completion": " a", "label": True}
    names = ("prompt", "completion", "label") if config is KTOConfig else ("prompt", "chosen", "rejected")
    return dict(
        args=args,
        train_dataset=Dataset.from_list([{name: record[name] for name in names}] * size),
        processing_class=make_tokenizer(),
    )


def dpo(model: str, reference: str, prompts: list[int]):
    """`adapter`: LoRA, whose reference is the model with its adapter off; `live`: a copy of the model; `stored`:
    precompute_ref_log_probs=True, its numbers already in the batch."""
    options = common(DPOConfig, workload.PAIRS, beta=workload.BETA, precompute_ref_log_probs=reference == "stored")
    if reference == "adapter":
        options["peft_config"] = LoraConfig(**workload.LORA)
    copy = make_model(model) if reference == "live" else None
    trainer = DPOTrainer(make_model(model), copy, **options)
    records = workload.pairs(model, prompts)
    if reference == "stored":
        records = [dict(each, ref_chosen_logps=REFERENCE, ref_rejected_logps=REFERENCE) for each in records]
    batch = trainer._prepare_inputs(trainer.data_collator(records))
    return stepper(trainer.model, lambda: trainer._compute_loss(trainer.model, dict(batch), False))


def kto(model: str, reference: str, prompts: list[int]):
    records = workload.answers(model, prompts)
    options = common(KTOConfig, len(records), beta=workload.BETA, precompute_ref_log_probs=reference == "stored")
    trainer = KTOTrainer(make_model(model), make_model(model) if reference == "live" else None, **options)
    if reference == "stored":
        records = [dict(each, ref_logps=REFERENCE, ref_KL_logps=REFERENCE) for each in records]
    batch = trainer._prepare_inputs(trainer.data_collator(records))
    return stepper(trainer.model, lambda: trainer._compute_loss(trainer.model, dict(batch), False))


def reward(model: str, prompts: list[int]):
    config = make_model(model).config
    config.num_labels, config.pad_token_id = 1, 0
    trainer = RewardTrainer(LlamaForSequenceClassification(config), **common(RewardConfig, workload.PAIRS))
    sides = ("chosen_ids", "rejected_ids")
    records = [{side: pair["prompt_ids"] + pair[side] for side in sides} for pair in workload.pairs(model, prompts)]
    batch = trainer._prepare_inputs(trainer.data_collator(records))
    return stepper(trainer.model, lambda: trainer.compute_loss(trainer.model, dict(batch)))


if __name__ == "__main__":
    work({"dpo": dpo, "kto": kto, "reward": reward})
