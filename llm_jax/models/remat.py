"""What the backward pass recomputes, by name. Each policy wraps the block function."""

from collections.abc import Callable

import jax

from llm_jax.kernels.grouped_swiglu import SAVED

PROJECTION = "projection"
"""Name that `Linear` gives its result."""


def _none(block: Callable, *, scanned: bool) -> Callable:
    """Saves every activation."""
    del scanned
    return block


def _full(block: Callable, *, scanned: bool) -> Callable:
    """Saves the inputs of blocks only."""
    return jax.checkpoint(block, prevent_cse=not scanned)


def _dots(block: Callable, *, scanned: bool) -> Callable:
    """Saves the results of projections; recomputes norms, rotations, attention and products of elements."""
    # By name and not by primitive: a product's own result is float32, what follows it is in compute dtype.
    policy = jax.checkpoint_policies.save_only_these_names(PROJECTION, SAVED)
    return jax.checkpoint(block, policy=policy, prevent_cse=not scanned)


# Inside a scan the loop itself keeps XLA from merging the recomputation with the forward pass.
REMAT: dict[str, Callable[..., Callable]] = {"none": _none, "full": _full, "dots": _dots}
