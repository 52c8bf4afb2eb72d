# pyright: reportMissingImports=false
"""DPO as TRL's `DPOTrainer` does it (`loss_type="sigmoid"`, label smoothing 0), reference live.

    HF_HUB_OFFLINE=1 python tests/oracles/trl_dpo.py

writes `tests/golden/trl/dpo_*.npz` and `dpo_tokens.json` (the records and the ids TRL made of them).
"""

import tempfile

import torch
from trl import DPOConfig, DPOTrainer
from trl_tiny import (
    BETA,
    CHAT_PAIRS,
    PAIRS,
    SHARED_PAIRS,
    SHARED_STRINGS,
    dataset,
    make_model,
    make_tokenizer,
    run,
    write,
    write_tokens,
)


def make_trainer(records: list[dict], tokenizer) -> DPOTrainer:
    args = DPOConfig(
        tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        beta=BETA,
        max_length=160,
        per_device_train_batch_size=len(records),
    )
    return DPOTrainer(
        make_model(), make_model(other=1.0), args=args, train_dataset=dataset(records), processing_class=tokenizer
    )


def tokens_of(trainer: DPOTrainer, records: list[dict]) -> list[dict]:
    return [
        {"record": record, **{name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}}
        for record, row in zip(records, trainer.train_dataset, strict=True)
    ]


def main() -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokens = {}
    for kind, records in (("strings", PAIRS), ("chat", CHAT_PAIRS)):
        trainer = make_trainer(records, tokenizer)
        tokens[kind] = tokens_of(trainer, records)
        batch = trainer.data_collator(list(trainer.train_dataset))
        arrays = run(trainer, lambda model, inputs, t=trainer: t._compute_loss(model, inputs, False), batch)
        ref_chosen, ref_rejected = trainer.compute_ref_log_probs(trainer.ref_model, batch)
        arrays |= {"ref_chosen_logps": ref_chosen.numpy(), "ref_rejected_logps": ref_rejected.numpy()}
        write(f"dpo_{kind}", arrays)
    for kind, records in (("shared_chat", SHARED_PAIRS), ("shared_strings", SHARED_STRINGS)):
        tokens[kind] = tokens_of(make_trainer(records, tokenizer), records)
    with_bos = make_tokenizer(bos=True)
    for kind, records in (("strings_bos", PAIRS), ("chat_bos", CHAT_PAIRS)):
        tokens[kind] = tokens_of(make_trainer(records, with_bos), records)
    write_tokens("dpo_tokens", tokens)


if __name__ == "__main__":
    main()
