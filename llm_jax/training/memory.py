"""What a training step holds on each device, by part, from shapes alone: nothing is compiled and no device is asked.

Exact: parameters, optimizer state, frozen models (their shards are counted). By rule (the table in `training.step`):
the weights in compute dtype, the gradients. By tracing: what is kept for the backward pass, which is what JAX hands
from the forward to the backward function of one microbatch of one device. Estimated: what the backward pass of a layer
and a chunk of logits take for a moment, by the kernels that the platform would run.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Var

from llm_jax.base.trees import flatten
from llm_jax.kernels.choice import Op, decide
from llm_jax.kernels.flash_attention import OP as ATTENTION
from llm_jax.kernels.linear_cross_entropy import OP as LOSS
from llm_jax.models import Decoder, abstract_params
from llm_jax.models.config import ModelConfig
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.sharding.plan import Plan
from llm_jax.training.terms import Objective


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one device."""

    params: int
    """float32 masters."""
    opt_state: int
    """The optimizer's, the model's further state and the step."""
    ema: int
    """The average of the weights, where one is kept."""
    frozen: int
    """float32 masters of further roles."""
    compute_copy: int
    """Weights in compute dtype: one copy of all in ZeRO 0 to 2 (none where the masters serve), a block's in 3."""
    gradients: int
    """float32, as the stage accumulates them."""
    activations: int
    """Kept from the forward to the backward pass of a microbatch."""
    working: int
    """What the backward pass of one layer makes again, and what its attention holds of a tile in memory."""
    logits: int
    """What the loss holds of the logits, softmax and their gradient, of one chunk of tokens."""

    @property
    def persistent(self) -> int:
        return self.params + self.opt_state + self.ema + self.frozen

    @property
    def total(self) -> int:
        """The most at one time: logits are gone when the backward pass of the layers begins."""
        held = self.persistent + self.compute_copy + self.gradients + self.activations
        return held + max(self.working, self.logits)


def step_memory(
    state: Mapping[str, Any],
    declarations: Mapping[str, Any],
    decoder: Decoder,
    objective: Callable[[Decoder], Objective],
    plan: Plan,
    *,
    batch_size: int,
    window: int,
    microbatches: int = 1,
    trained: Iterable[str] | None = None,
    platform: str = "tpu",
) -> StepMemory:
    """The estimate for a state (`training.abstract_state`) whose trained role is `policy`.

    Args:
        declarations: of all parameters, by role.
        decoder: the policy's, with its remat.
        objective: of a decoder; its terms are traced with rows of tokens, segments, positions and a loss mask.
        plan: of a mesh that may be abstract.
        batch_size: rows of the whole batch.
        window: tokens of a row.
        trained: paths `policy/…` of the parameters that take a gradient; None means all.
        platform: cpu, gpu or tpu; decides which kernels run, and what they hold.
    """
    itemsize = jnp.dtype(plan.compute_dtype).itemsize
    shapes = flatten({**state["params"], **state["frozen"]})
    axes = {path: declaration.axes for path, declaration in flatten(declarations).items()}
    used = {path: _elements(leaf.shape, plan, plan.compute_spec(axes[path])) for path, leaf in shapes.items()}
    policy = {path.removeprefix("policy/"): size for path, size in used.items() if path.startswith("policy/")}
    gradients = sum(
        4 * _elements(shapes[path].shape, plan, plan.gradient_spec(axes[path], shapes[path].shape))
        for path in ((f"policy/{path}" for path in policy) if trained is None else trained)
    )
    rows = batch_size // microbatches // plan.axis_size("data")
    local, layers = _local(decoder.config, plan), decoder.config.num_layers

    def saved(remat: Any) -> int:
        return saved_bytes(Decoder(local, remat=remat), objective, rows, window, plan.compute_dtype)

    activations = saved(decoder.remat)
    # The parts outside of the layers are the same whatever is made again.
    again = 0 if decoder.remat == "none" else (saved("none") - activations) // layers
    layer = sum(size for path, size in policy.items() if path.startswith("segments/")) // layers
    outside = [size for path, size in policy.items() if not path.startswith("segments/")]
    if platform == "cpu" and plan.zero >= 2 and plan.axis_size("data") > 1:
        # Gradients are cut as they are summed, by one reduce-scatter; a CPU has none and first sums them whole.
        gradients += 4 * (layer + sum(outside))
    masters_serve = itemsize == 4 and (plan.zero == 0 or plan.axis_size("data") == 1)
    # What is stored as it is computed with needs no copy: frozen models may be.
    other = [size for path, size in used.items() if itemsize == 4 or shapes[path].dtype.itemsize != itemsize]
    copied = max([layer, *outside]) if plan.zero == 3 else 0 if masters_serve else sum(other)
    return StepMemory(
        params=shard_bytes(state["params"]),
        opt_state=shard_bytes([state["opt_state"], state["model_state"], state["step"]]),
        ema=shard_bytes(state.get("ema", {})),
        frozen=shard_bytes(state["frozen"]),
        compute_copy=copied * itemsize,
        gradients=gradients,
        activations=activations,
        working=again + _attention_bytes(local, rows, window, plan.compute_dtype, platform),
        logits=_loss_bytes(local, rows * window, plan.compute_dtype, platform) if local.head.labels is None else 0,
    )


def shard_bytes(tree: Any) -> int:
    """Bytes on one device of arrays or ShapeDtypeStructs with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def saved_bytes(decoder: Decoder, objective: Callable[[Decoder], Objective], rows: int, window: int, dtype: Any) -> int:
    """Bytes that JAX keeps from the forward pass for the backward pass, weights and batch not among them."""
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract_params(decoder))
    batch = {
        name: jax.ShapeDtypeStruct((rows, window), jnp.uint8 if name == "loss_mask" else jnp.int32)
        for name in ("tokens", "segment_ids", "positions", "loss_mask")
    }
    terms = objective(decoder).terms

    def residuals(params: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            return sum(terms({"policy": params}, {}, batch, None, jax.random.key(0))[0].values())

        return jax.tree.leaves(jax.vjp(loss, params)[1])

    jaxpr = jax.make_jaxpr(residuals)(params, batch).jaxpr
    made = {v for v in jaxpr.outvars if isinstance(v, Var)} - {*jaxpr.invars, *jaxpr.constvars}
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in made)  # pyright: ignore


def _local(config: ModelConfig, plan: Plan) -> ModelConfig:
    """What one device sees of a model that is cut along the tensor axis."""
    config, tensor = config.resolved(), plan.axis_size("tensor")
    mamba = config.mamba
    heads = mamba.num_heads // tensor
    if mamba.inner_size:
        groups = math.gcd(mamba.num_groups, heads) if heads else mamba.num_groups
        mamba = replace(mamba, inner_size=mamba.inner_size // tensor, num_heads=heads, num_groups=groups)
    attends = {"attention", "latent"} & set(config.mixers or ())
    return replace(
        config,
        mamba=mamba,
        vocab_size=(config.vocab_size or 0) // tensor,
        num_heads=config.num_heads // tensor if attends else config.num_heads,
        num_kv_heads=(config.num_kv_heads or 0) // tensor if attends else config.num_kv_heads,
        intermediate_size=config.intermediate_size // tensor or 1,
        experts=_local_experts(config.experts, tensor),
    )


def _local_experts(experts: ExpertsConfig, tensor: int) -> ExpertsConfig:
    if experts.intermediate_size is None:
        return experts
    sizes = {name: getattr(experts, name) // tensor for name in ("intermediate_size", "shared_size")}
    return replace(experts, **sizes)


def _elements(shape: tuple[int, ...], plan: Plan, spec: Any) -> int:
    """Of one device's shard."""
    return math.prod(plan.sharding(spec).shard_shape(shape))


def _attention_bytes(config: ModelConfig, rows: int, window: int, dtype: Any, platform: str) -> int:
    if not {"attention", "latent"} & set(config.mixers or ()):
        return 0
    heads, kv_heads, size, value_size = config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim
    if config.latent.kv_rank:
        kv_heads, size, value_size = heads, config.latent.head_dim, config.latent.value_dim
    shapes = ((rows, window, *inner) for inner in ((heads, size), (kv_heads, size), (kv_heads, value_size)))
    arrays = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)  # pyright: ignore
    return _held(ATTENTION, platform, *arrays, segment_ids=jax.ShapeDtypeStruct((rows, window), jnp.int32))


def _loss_bytes(config: ModelConfig, tokens: int, dtype: Any, platform: str) -> int:
    width, vocab = config.hidden_size, config.vocab_size or 1
    hidden, head = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((tokens, width), (width, vocab)))
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    return _held(LOSS, platform, hidden, head, targets, mask=targets)


def _held(op: Op, platform: str, *args: Any, **kwargs: Any) -> int:
    """What the implementation of a call that would run on `platform` holds of scores or logits."""
    spec = op.spec(*args, **kwargs)
    chosen = decide(op, spec, None, platform).implementation
    assert chosen is not None, f"{op.name} runs everywhere, by XLA at least"
    return op.implementations[chosen].held_bytes(spec, platform)
