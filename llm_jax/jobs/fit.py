"""What every training job does around its objective: train, evaluate, export."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.adapters.loading import base_of
from llm_jax.adapters.peft_files import Adapter, write_adapter
from llm_jax.adapters.scores import of_scores
from llm_jax.base import processes
from llm_jax.data import Loader
from llm_jax.jobs import running as means
from llm_jax.jobs.adapting import Adapting
from llm_jax.jobs.balancing import PREFIX
from llm_jax.jobs.origin import origin
from llm_jax.jobs.setup import Setup, adapter_of, policy_optimizer
from llm_jax.models import Decoder, Model, abstract_params, declarations, layout, regroup, save
from llm_jax.models.flops import training_flops_per_token
from llm_jax.models.saving import copy_tokenizer
from llm_jax.sharding import Plan, place, placed_batches, to_first
from llm_jax.storage.workdir import Workdir
from llm_jax.training import (
    Objective,
    TrainingJob,
    abstract_state,
    evaluate,
    init_state,
    make_eval_step,
    make_train_step,
    train,
    weights_in_use,
)
from llm_jax.training.loop import BatchSource

if TYPE_CHECKING:
    pass

Params = Mapping[str, Any]
Columns = Mapping[str, Mapping[str, np.ndarray]]
"""Further per-row arrays, by split (`train`, `eval`) and name."""
Hook = Callable[[Any], Mapping[str, float]]


class LiveRows(BatchSource, Protocol):
    """Rows that are made while it trains, of what the policy has become."""

    def __len__(self) -> int:
        """How many there are before they come again, for `epoch`."""
        ...

    def stepping(self, step: Callable[[Any, Any], Any], plan: Plan) -> Callable[[Any, Any], Any]:
        """A training step that takes what `iterate` gives, and hands `step` the rows."""
        ...


def fit(
    s: Setup,
    objective: Objective,
    policy: Callable[[], Params],
    *,
    evaluation: Objective,
    running: bool = False,
    frozen: Callable[[], Params] = dict,
    frozen_decoders: Mapping[str, Decoder] | None = None,
    columns: Columns | None = None,
    live: LiveRows | None = None,
    finish: tuple[Hook, ...] = (),
) -> None:
    """Trains the role `policy` on an objective, then exports it.

    Where the run has an adapter it is the adapter that is trained and exported, and the model is frozen.

    Args:
      s: from `setup`.
      objective: from `jobs.terms`, of `s.policy`.
      evaluation: the same, as held-out rows are scored: without what is added in training only.
      policy: the model's parameters at first; called only where there is no checkpoint, or an adapter is trained.
      running: whether the objective carries means over batches (`jobs/running.py`).
      frozen: parameters of further roles, by role, likewise.
      frozen_decoders: their architectures.
      columns: further arrays that the rows carry, such as a reference's log-probabilities.
      live: trained on in place of the rows of `s.data.train`.
      finish: run once after the last step.
    """
    config = s.config.train
    adapting = s.adapting
    declared, frozen_abstract = {"policy": declarations(s.decoder)}, {}
    abstract: dict[str, Any] = {"policy": abstract_params(s.decoder)}
    if adapting is not None:
        declared, frozen_abstract = adapting.declarations, adapting.abstract_frozen(s.plan)
        abstract = {"policy": adapting.adaptation.abstract}
        objective, evaluation = s.objective(objective, training=True), s.objective(evaluation, training=False)
    for role, decoder in (frozen_decoders or {}).items():
        declared[role], frozen_abstract[role] = declarations(decoder), abstract_params(decoder)
    carried: Params = {means.ROLE: means.nothing_yet()} if running else {}
    if running:
        declared[means.ROLE], abstract[means.ROLE] = means.DECLARATIONS, means.abstract()
    optimizer, averaged = (
        policy_optimizer(config, s.decoder, adapter_of(s.config), running),
        config.ema_decay is not None,
    )
    loaders = {}
    for split, rows in (("train", s.data.train), ("eval", s.data.eval)):
        training = split == "train"
        loaders[split] = Loader(rows, config.batch_size, config.microbatches, config.seed, shuffle=training)
        for name, array in (columns or {}).get(split, {}).items():
            loaders[split].extra(name, array)
    eval_step = make_eval_step(evaluation, s.plan, declared)

    def held_out(state: Any) -> dict[str, float]:
        batches = placed_batches(loaders["eval"], s.plan, 0, min(config.eval_batches, len(loaders["eval"])))
        values = evaluate(eval_step, evaluation, state, batches)
        return {_eval_name(name): value for name, value in values.items() if _is_told(name)}

    def initial() -> Any:
        first = policy()
        if adapting is None:
            return init_state({"policy": first, **carried}, optimizer, declared, s.plan, frozen=frozen(), ema=averaged)
        trained = {"policy": adapting.init(first, config.seed), **carried}
        fixed = {**adapting.frozen(first, s.plan), **frozen()}
        return init_state(trained, optimizer, declared, s.plan, frozen=fixed, ema=averaged)

    like = abstract_state(abstract, optimizer, declared, s.plan, frozen=frozen_abstract, ema=averaged)

    def frozen_again() -> Any:
        assert adapting is not None
        fixed = {**adapting.frozen(policy(), s.plan), **frozen()}
        return place(fixed, jax.tree.map(lambda leaf: leaf.sharding, like["frozen"]))

    def export(state: Any) -> Mapping[str, float]:
        if config.checkpoint.export and adapting is not None:
            trained = to_first(weights_in_use(state)["policy"])
            processes.from_first(lambda: export_adapter(s, trained))
        elif config.checkpoint.export:
            extra = origin(s.node, "workdir", own=True).extra
            policy = to_first(weights_in_use(state)["policy"])
            model = Model(s.decoder, policy, s.decoder.config, s.workdir.tokenizer, extra=extra)
            processes.from_first(lambda: save(model, s.workdir.export))
        return {}

    step = make_train_step(objective, optimizer, s.plan, declared, seed=config.seed, ema_decay=config.ema_decay)
    train(
        TrainingJob(
            name=s.node.name,
            workdir=s.workdir,
            config=config,
            plan=s.plan,
            abstract_state=like,
            made_again={} if adapting is None else {"frozen": frozen_again},
            init=initial,
            train_step=step if live is None else live.stepping(step, s.plan),
            loader=loaders["train"] if live is None else live,
            rows=len(s.data.train if live is None else live),
            evaluate=held_out,
            finish=(*finish, export),
            layout=layout(s.decoder),
            regroup=regroup,
            logging=s.config.logging,
            profile=s.config.profile,
            flops_per_token=_flops(s),
        )
    )


def _flops(s: Setup) -> float:
    """Of a training step, per token. A frozen weight takes no gradient: with an adapter one of the three products of
    each falls away, beside which the adapter's own are few."""
    whole = training_flops_per_token(s.decoder.config, s.config.data.window, s.config.train.mtp_weight > 0)
    return whole if s.adapting is None else whole * 2 / 3


def _is_told(name: str) -> bool:
    """Whether an evaluation has a metric too; how full each single expert was, training says."""
    return name != "num_tokens" and not name.startswith(f"{PREFIX}load/")


def _eval_name(name: str) -> str:
    """As TRL names the loss on one of several evaluation sets: `eval_NAME_loss`."""
    source = name.removeprefix("loss_")
    return f"eval_{name}" if source == name else f"eval_{source}_loss"


def export_adapter(s: Setup, trained: Params) -> None:
    """The PEFT folder of a trained adapter, with the tokenizer of the model, which it names as a Hugging Face folder
    where there is one."""
    assert s.adapting is not None
    base = base_of(s.workdir.path)
    whole = Workdir(base).export
    base = str(whole if (whole / "config.json").exists() else base)
    adaptation = s.adapting.adaptation
    scores = of_scores(origin(s.node, "workdir", own=True).extra)
    write_adapter(s.workdir.export, adaptation, Adapter(adaptation.config, dict(trained), scores=scores), {}, base)
    copy_tokenizer(s.workdir.tokenizer, s.workdir.export)


def policy_of(state: Any, adapting: Adapting | None = None) -> Params:
    """The trained model's parameters (their average, where there is one), on the default device of process 0, for
    evaluations that do not use the mesh; with an adapter those of the model with it in its weights.

    All processes call it; the others get leaves of None.
    """
    trained = weights_in_use(state)
    if adapting is None:
        return jax.device_put(to_first(trained["policy"]), jax.local_devices()[0])
    whole = jax.jit(adapting.merged)(trained, state["frozen"])
    whole = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), whole)
    return jax.device_put(to_first(whole), jax.local_devices()[0])
