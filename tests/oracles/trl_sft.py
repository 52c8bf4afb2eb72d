# pyright: reportMissingImports=false
"""SFT as TRL's `SFTTrainer` does it: completion-only and multi-turn assistant-only, padded and packed.

    HF_HUB_OFFLINE=1 python tests/oracles/trl_sft.py

writes `tests/golden/trl/sft_*.npz` and `sft_tokens.json` (the records and the ids and masks TRL made of them).
"""

import tempfile

import torch
from trl import SFTConfig, SFTTrainer
from trl_tiny import CHATS, COMPLETIONS, MESSAGES, TEXTS, dataset, make_model, make_tokenizer, run, write, write_tokens


def make_trainer(records: list[dict], packing: bool, tokenizer) -> SFTTrainer:
    args = SFTConfig(
        tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        assistant_only_loss="messages" in records[0],
        packing=packing,
        max_length=160,
        per_device_train_batch_size=len(records),
    )
    return SFTTrainer(make_model(), args=args, train_dataset=dataset(records), processing_class=tokenizer)


def tokens_of(trainer: SFTTrainer, records: list[dict]) -> list[dict]:
    return [
        {"record": record, "input_ids": row["input_ids"], "mask": [int(label != -100) for label in row["labels"]]}
        for record, row in zip(records, trainer.train_dataset, strict=True)
    ]


def main() -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokens = {}
    for kind, records in (("completion", COMPLETIONS), ("assistant", CHATS)):
        losses = {}
        for packing in (False, True):
            trainer = make_trainer(records, packing, tokenizer)
            if not packing:
                tokens[kind] = tokens_of(trainer, records)
            arrays = run(trainer, trainer.compute_loss, trainer.data_collator(list(trainer.train_dataset)))
            losses[packing] = arrays["loss"]
            write(f"sft_{kind}_{'packed' if packing else 'padded'}", arrays)
        assert abs(losses[True] - losses[False]) < 1e-6 * losses[False], losses
    for kind, records in (("messages", MESSAGES), ("text", TEXTS)):
        tokens[kind] = tokens_of(make_trainer(records, False, tokenizer), records)
    with_bos = make_tokenizer(bos=True)
    for kind, records in (("completion_bos", COMPLETIONS), ("assistant_bos", CHATS), ("text_bos", TEXTS)):
        tokens[kind] = tokens_of(make_trainer(records, False, with_bos), records)
    write_tokens("sft_tokens", tokens)


if __name__ == "__main__":
    main()
