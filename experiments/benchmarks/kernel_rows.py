"""What `kernels.py` measures: calls of each op, and what each has to reach on an H200. Standard library only."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One call of an op and the pass that is timed."""

    op: str
    title: str
    measured: str
    """ "forward", "backward" or "forward and backward"."""
    shape: dict[str, int] = field(default_factory=dict)
    """Over the defaults of the op's `tuning.SHAPE`."""
    gradients: tuple[int, ...] | None = None
    """Which arrays get gradients, by index; None: all that can."""
    flops: float | None = None
    """Share of the case's flops of this pass that count, where `gradients` leaves some out."""
    goal: str = ""
    """On an H200, in bfloat16."""


def _attention(T: int, B: int, width: int) -> list[Row]:
    """Forward and backward at each head size: about `B` x `T` tokens of `width` numbers."""
    forward = "≥ 1.0x cuDNN (first ≥ 0.9x)"
    backward = {(128, 1): "≥ 400 TFLOP/s, deterministic", (128, 0): "≥ 430 TFLOP/s, deterministic; stretch 542"}
    rows = []
    for H in (128, 64, 256):
        for causal in (1, 0):
            shape = {"batch": B, "q_len": T, "heads": max(1, width // H), "head_dim": H, "causal": causal}
            title = f"attention hd{H} {'causal' if causal else 'full'}, T {T}"
            rows.append(Row("flash_attention", title, "forward", shape, goal=forward))
            rows.append(Row("flash_attention", title, "backward", shape, goal=backward.get((H, causal), "")))
    shape = {"batch": B, "q_len": T, "heads": max(4, width // 128), "head_dim": 128, "kv_heads": max(1, width // 512)}
    rows.append(Row("flash_attention", f"attention hd128, 4 queries a key head, T {T}", "forward", shape))
    for title, more in (
        (f"documents of {T // 8}", {"document": T // 8}),
        (f"window of {T // 4}", {"window": T // 4}),
    ):
        for measured in ("forward", "backward"):
            rows.append(Row("flash_attention", f"attention hd128, {title}, T {T}", measured, {**shape, **more}))
    latent = {"batch": B, "q_len": T, "heads": max(1, width // 128), "head_dim": 192, "value_dim": 128}
    rows.append(Row("flash_attention", f"latent attention 192/128 causal, T {T}", "forward", latent))
    return rows


def _decoding(batches: Sequence[int], tokens: int, heads: dict[str, int]) -> list[Row]:
    """A token a request; `tokens` of all requests together lie in pages."""
    goal = "≥ 92% of the measured copy bandwidth"
    return [
        Row(
            "ragged_paged_attention",
            f"paged decode, {n} x {max(64, tokens // n)} tokens",
            "forward",
            {"requests": n, "kv_len": max(64, tokens // n), "page_size": 64, **heads},
            goal=goal,
        )
        for n in batches
    ]


def _experts(title: str, shape: dict[str, int], chosen: int, goal: str, weight_goal: str) -> list[Row]:
    """`chosen`: experts of a token."""
    name, of_tokens = "grouped_matmul", {**shape, "tokens": shape["rows"] // chosen}
    return [
        Row(name, f"experts {title}", "forward", shape, goal=goal),
        Row(name, f"experts {title}, input gradient", "backward", shape, (0,), 0.5),
        Row(name, f"experts {title}, weight gradient", "backward", shape, (1,), 0.5, weight_goal),
        Row(name, f"experts {title}, rows of tokens", "forward", of_tokens),
        Row(name, f"experts {title}, rows of tokens, input gradient", "backward", of_tokens, (0,), 0.5),
        Row(name, f"experts {title}, rows of tokens, weight gradient", "backward", of_tokens, (1,), 0.5),
    ]


def rows(size: str) -> list[Row]:
    """ "full": the shapes that the goals are for; "test": the same rows, tiny."""
    full = size == "full"
    mixtral = {"rows": 16384, "inputs": 4096, "outputs": 14336, "groups": 8}
    qwen = {"rows": 131072, "inputs": 2048, "outputs": 1536, "groups": 128}
    loss = {"tokens": 8192, "width": 4096, "vocab": 128256}
    mamba2 = {"batch": 2, "length": 4096, "heads": 80, "head_dim": 64, "groups": 1, "states": 128}
    mamba = {"batch": 2, "length": 4096, "channels": 5120, "states": 16}
    # 32 query heads, 8 key heads of 128: 4 KiB a token, so 262,144 tokens are 1 GiB.
    heads, tokens, batches = {"heads": 32, "kv_heads": 8, "head_dim": 128}, 262144, (1, 8, 64, 256)
    if not full:
        mixtral = {"rows": 64, "inputs": 32, "outputs": 48, "groups": 4}
        qwen = {"rows": 64, "inputs": 16, "outputs": 24, "groups": 16}
        loss = {"tokens": 64, "width": 32, "vocab": 512}
        mamba2 = {"batch": 1, "length": 64, "heads": 4, "head_dim": 8, "groups": 1, "states": 8}
        mamba = {"batch": 1, "length": 64, "channels": 16, "states": 4}
        heads, tokens, batches = {"heads": 4, "kv_heads": 2, "head_dim": 16}, 256, (1, 2)
    return [
        *(_attention(4096, 4, 2048) if full else _attention(64, 1, 128)),
        *_decoding(batches, tokens, heads),
        *_experts("Mixtral", mixtral, 2, "≥ 650 TFLOP/s", "≥ 595 TFLOP/s"),
        *_experts("Qwen3-30B-A3B", qwen, 8, "≥ 450 TFLOP/s", ""),
        *(
            Row("grouped_swiglu", f"gated experts {title}", measured, shape)
            for title, shape in (
                ("Mixtral", mixtral),
                ("Mixtral, rows of tokens", {**mixtral, "tokens": mixtral["rows"] // 2}),
                ("Qwen3-30B-A3B", {**qwen, "outputs": qwen["outputs"] // 2}),
            )
            for measured in ("forward", "forward and backward")
        ),
        Row("linear_cross_entropy", "loss, 128k vocabulary", "forward", loss, goal="≥ 700 TFLOP/s"),
        Row("linear_cross_entropy", "loss, 128k vocabulary", "forward and backward", loss, goal="≥ 660 TFLOP/s"),
        *(
            Row(op, title, measured, shape, goal=goal)
            for op, title, shape, goal in (
                ("ssd", "Mamba-2 2.7B scan", mamba2, "published: Mamba-2's SSD 2-8x Mamba's scan"),
                ("selective_scan", "Mamba 2.8B scan", mamba, "published: 20-40x a scan in PyTorch"),
            )
            for measured in ("forward", "forward and backward")
        ),
    ]
