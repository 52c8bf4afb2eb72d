# pyright: reportMissingImports=false
"""The peer's worker: transformers + PyTorch, and TRL's trainers. Runs under --peer-python; knows nothing of llm_jax.

A step is: loss (with what the trainer records beside it), backward, clip, AdamW, gradients set to None. The trainer's
own loop around it (data, callbacks, logging) is left out, in the peer's favour.
"""

import json
import sys
import tempfile

import torch
import workload
from sides import THREADS, serve
from transformers import LlamaConfig, LlamaForCausalLM


def make_model(name: str) -> LlamaForCausalLM:
    shape = workload.MODELS[name]
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape["vocab"],
            hidden_size=shape["width"],
            intermediate_size=shape["inner"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["heads"],
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )


def make_optimizer(model) -> torch.optim.Optimizer:
    o = workload.OPTIMIZER
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=o["learning_rate"],
        betas=(o["beta1"], o["beta2"]),
        eps=o["eps"],
        weight_decay=o["weight_decay"],
        fused=True,
    )


def stepper(model, loss_of):
    optimizer = make_optimizer(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()

    def step() -> float:
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, workload.OPTIMIZER["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def train_step(model: str, rows: int, length: int, compiled: bool):
    llama = make_model(model)
    batch = torch.from_numpy(workload.tokens(model, rows, length)).long()
    call = torch.compile(llama) if compiled else llama
    return stepper(llama, lambda: call(input_ids=batch, labels=batch).loss)


def train_folder(folder: str, vocab: int, rows: int, length: int):
    """Any model that transformers reads."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = torch.from_numpy(workload.random_tokens(vocab, rows, length)).long()
    return stepper(model, lambda: model(input_ids=batch, labels=batch, use_cache=False).loss)


def make_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


ARGUMENTS = dict(use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)


def sft_packed(model: str, rows: int, length: int):
    """TRL's SFTTrainer with packing=True: its own collator makes one padding-free row of all windows."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    llama = make_model(model)
    args = SFTConfig(tempfile.mkdtemp(), packing=True, max_length=length, per_device_train_batch_size=rows, **ARGUMENTS)
    record = Dataset.from_list([{"prompt": "a", "completion": "a"}] * 4)
    trainer = SFTTrainer(llama, args=args, train_dataset=record, processing_class=make_tokenizer())
    packed = []
    for row in workload.documents(model, rows, length):
        ids = [int(i) for document, _ in row for i in document]
        masks = [[0] * prompt + [1] * (len(document) - prompt) for document, prompt in row]
        mask = [m for each in masks for m in each]
        labels = [i if m else -100 for i, m in zip(ids, mask)]
        packed.append(
            {
                "input_ids": ids,
                "labels": labels,
                "completion_mask": mask,
                "seq_lengths": [len(document) for document, _ in row],
            }
        )
    batch = trainer._prepare_inputs(trainer.data_collator(packed))
    return stepper(trainer.model, lambda: trainer.compute_loss(trainer.model, dict(batch)))


def work(tasks) -> None:
    """A worker's whole life: its first argument names the task and its options."""
    options = json.loads(sys.argv[1])
    torch.set_num_threads(THREADS)
    name = options.pop("task")
    serve(name, tasks[name](**options))


if __name__ == "__main__":
    work({"train_step": train_step, "train_folder": train_folder, "sft_packed": sft_packed})
