"""Our worker for preferences: steps of the jobs `preference` and `reward`, on rows packed as those of a run."""

from typing import Any

import numpy as np
import workload
from ours import Step, make_decoder, step_of, stepper, work

from llm_jax.adapters.config import LoraConfig
from llm_jax.data.encode import Sequence
from llm_jax.data.fitting import Item
from llm_jax.data.packing import best_fit_decreasing
from llm_jax.data.rows import fill_pair_row, fill_unpaired_row, pair_schema, unpaired_schema
from llm_jax.data.sharing import shared_tokens
from llm_jax.jobs.adapting import Adapting
from llm_jax.jobs.config import PreferenceConfig
from llm_jax.jobs.paired import paired_objective
from llm_jax.jobs.preference_loss import preference_loss
from llm_jax.jobs.reward_terms import pairs_objective
from llm_jax.jobs.unpaired import unpaired_objective
from llm_jax.models import HeadConfig, declarations, init_params
from llm_jax.sharding import MeshConfig, make_plan

REFERENCE = -600.0
"""What a stored reference says of every answer."""


def sequence(prompt: list[int], answer: list[int]) -> Sequence:
    mask = [0] * len(prompt) + [1] * len(answer)
    return Sequence(np.array(prompt + answer, np.int32), np.array(mask, np.uint8))


def batch_of(rows: list[dict[str, np.ndarray]], **further: np.ndarray) -> dict[str, np.ndarray]:
    """One microbatch of all rows; `further` are columns that a job puts beside them."""
    return {name: np.stack([row[name] for row in rows])[None] for name in rows[0]} | further


def pair_batch(model: str, prompts: list[int], window: int, share: bool) -> dict[str, np.ndarray]:
    pairs = []
    for pair in workload.pairs(model, prompts):
        sides = sequence(pair["prompt_ids"], pair["chosen_ids"]), sequence(pair["prompt_ids"], pair["rejected_ids"])
        pairs.append(Item(sides, shared=shared_tokens(*sides) if share else 0))
    windows = best_fit_decreasing([pair.tokens for pair in pairs], window)
    schema = pair_schema(window, max(map(len, windows)), share)
    no_bytes = np.zeros(workload.MODELS[model]["vocab"], np.int32)
    batch = batch_of([fill_pair_row(schema, [(i, pairs[i]) for i in each], no_bytes, 0, 0) for each in windows])
    stored = np.full(batch["pair_index"].shape, REFERENCE, np.float32)
    return batch | {"ref_chosen_logps": stored, "ref_rejected_logps": stored}


def answer_batch(model: str, prompts: list[int], window: int) -> dict[str, np.ndarray]:
    answers = [
        (
            tuple(sequence(each["prompt_ids"], each[name]) for name in ("completion_ids", "KL_completion_ids")),
            {"label": float(each["label"])},
        )
        for each in workload.answers(model, prompts)
    ]
    windows = best_fit_decreasing([max(len(one.ids) for one in both) for both, _ in answers], window)
    schema = unpaired_schema(window, max(map(len, windows)), mismatched=True)
    no_bytes = np.zeros(workload.MODELS[model]["vocab"], np.int32)
    batch = batch_of([fill_unpaired_row(schema, [(i, *answers[i]) for i in each], no_bytes, 0, 0) for each in windows])
    stored = np.full(batch["answer_index"].shape, REFERENCE, np.float32)
    return batch | {"ref_logps": stored, "ref_kl_logps": stored}


def dpo(model: str, reference: str, prompts: list[int], window: int, share: bool) -> Step:
    """`adapter`: LoRA, whose reference is the model with its adapter off; `live`: a copy; `stored`: columns."""
    batch, loss = pair_batch(model, prompts, window, share), preference_loss(PreferenceConfig(beta=workload.BETA))
    decoder = make_decoder(model)
    if reference != "adapter":
        objective = paired_objective(decoder, loss, "live" if reference == "live" else "stored")
        return with_reference(decoder, objective, batch, reference)
    adapting, base = Adapting.of(decoder, LoraConfig(**workload.LORA)), init_params(decoder, seed=0)
    objective = paired_objective(adapting.decoder, loss, "live", reference_decoder=decoder)
    trained = {"policy": adapting.init(base, 0)}
    frozen = adapting.frozen(base, make_plan(MeshConfig()))
    return step_of(adapting.objective(objective, training=True), batch, trained, adapting.declarations, frozen)


def kto(model: str, reference: str, prompts: list[int], window: int) -> Step:
    decoder, loss = make_decoder(model), preference_loss(PreferenceConfig(beta=workload.BETA, loss_type="kto"))
    objective = unpaired_objective(decoder, loss, "live" if reference == "live" else "stored")
    return with_reference(decoder, objective, answer_batch(model, prompts, window), reference)


def with_reference(decoder: Any, objective: Any, batch: dict[str, np.ndarray], reference: str) -> Step:
    if reference == "stored":
        return stepper(decoder, objective, batch)
    declared = {"policy": declarations(decoder), "ref": declarations(decoder)}
    policy, ref = (init_params(decoder, seed=0) for _ in declared)
    return step_of(objective, batch, {"policy": policy}, declared, {"ref": ref})


def reward(model: str, prompts: list[int], window: int, share: bool) -> Step:
    decoder = make_decoder(model, head=HeadConfig(1, "last"))
    return stepper(decoder, pairs_objective(decoder, pad_id=0), pair_batch(model, prompts, window, share))


if __name__ == "__main__":
    work({"dpo": dpo, "kto": kto, "reward": reward})
