# pyright: reportMissingImports=false
"""Reward models as TRL's `RewardTrainer` trains them: plain, and with margins and centring.

    HF_HUB_OFFLINE=1 python tests/oracles/trl_reward.py

writes `tests/golden/trl/reward_*.npz`: besides what `trl_tiny.run` gives the scores of every answer, `rewards`, and the
ids TRL made of the records (`tokens`, JSON).
"""

import json
import tempfile

import numpy as np
import torch
from recipe import draw
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import RewardConfig, RewardTrainer
from trl_tiny import CHAT_PAIRS, MODEL, PAIRS, SEED, dataset, make_tokenizer, run, write

CENTRED = 0.01
MARGINS = [0.5, 0.0, 1.25]
# Larger weights of the head: rewards of the size of margins.
HEAD = 8.0


def make_scorer(pad: int) -> LlamaForSequenceClassification:
    """Float32 Llama with one score, the recipe's weights of `SEED`."""
    config = LlamaConfig(**MODEL, attn_implementation="eager", num_labels=1, pad_token_id=pad)
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = draw(name, tuple(weight.shape), SEED) * np.float32(HEAD if name == "score.weight" else 1)
            weight.copy_(torch.from_numpy(drawn))
    return model


def main() -> None:
    tokenizer = make_tokenizer()
    with_margins = [{**pair, "margin": margin} for pair, margin in zip(PAIRS, MARGINS, strict=True)]
    cases = {"strings": (PAIRS, None), "chat": (CHAT_PAIRS, None), "margins": (with_margins, CENTRED)}
    for name, (records, coefficient) in cases.items():
        args = RewardConfig(
            tempfile.mkdtemp(),
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
            max_length=160,
            center_rewards_coefficient=coefficient,
            per_device_train_batch_size=len(records),
        )
        model = make_scorer(tokenizer.pad_token_id)
        trainer = RewardTrainer(model, args=args, train_dataset=dataset(records), processing_class=tokenizer)
        rows = list(trainer.train_dataset)
        columns = ("chosen_ids", "rejected_ids", "margin")
        batch = trainer.data_collator([{n: row[n] for n in columns if n in row} for row in rows])
        arrays = run(trainer, lambda model, inputs, t=trainer: t.compute_loss(model, inputs), batch)
        with torch.no_grad():
            inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
            arrays["rewards"] = model.eval()(**inputs).logits[:, 0].numpy()
        ids = [{n: list(map(int, row[n])) for n in ("chosen_ids", "rejected_ids")} for row in rows]
        arrays["tokens"] = np.array(json.dumps([{"record": r, **row} for r, row in zip(records, ids, strict=True)]))
        write(f"reward_{name}", arrays)


if __name__ == "__main__":
    main()
