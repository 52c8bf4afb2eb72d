"""PyTorch's side of `kernels.py`: a process that times a row when asked to. Runs under a Python that has torch.

Reads JSON lines {"op", "shape", "measured", "dtype"}, which make a call, and {"count": N}, which times N of them;
answers {"seconds"} or {"error"}. Ends with its stdin.
"""

import json
import sys
import time

import torch
import torch.nn.functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int, dtype: torch.dtype, grad: bool, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, dtype=dtype, device=DEVICE)).requires_grad_(grad)


def attention(shape: dict, dtype: torch.dtype, grad: bool):
    B, T, N, H = (shape[name] for name in ("batch", "q_len", "heads", "head_dim"))
    S, K, Hv = shape["kv_len"] or T, shape["kv_heads"] or N, shape["value_dim"] or H
    if shape["window"] or shape["document"]:
        raise ValueError("SDPA takes windows and documents only as a mask")
    q, k, v = (random(B, n, t, h, dtype=dtype, grad=grad) for n, t, h in ((N, T, H), (K, S, H), (K, S, Hv)))
    causal = bool(shape["causal"])
    return (q, k, v), lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=N != K)


def experts(shape: dict, dtype: torch.dtype, grad: bool):
    if not hasattr(torch, "_grouped_mm") or dtype != torch.bfloat16:
        raise ValueError("this PyTorch has no grouped product of this dtype")
    M, K, N, E, T = (shape[name] for name in ("rows", "inputs", "outputs", "groups", "tokens"))
    x, w = random(T or M, K, dtype=dtype, grad=grad), random(E, K, N, dtype=dtype, grad=grad, scale=K**-0.5)
    ends = torch.linspace(M / E, M, E, device=DEVICE).round().to(torch.int32)
    if not T:
        return (x, w), lambda: torch._grouped_mm(x, w, offs=ends)
    rows = torch.cat([part.sort().values for part in (torch.randperm(M, device=DEVICE) % T).chunk(E)])
    return (x, w), lambda: torch._grouped_mm(x[rows], w, offs=ends)


def loss(shape: dict, dtype: torch.dtype, grad: bool):
    M, D, V = (shape[name] for name in ("tokens", "width", "vocab"))
    hidden, head = random(M, D, dtype=dtype, grad=grad), random(V, D, dtype=dtype, grad=grad, scale=D**-0.5)
    targets = torch.randint(0, V, (M,), device=DEVICE)
    return (hidden, head), lambda: F.cross_entropy(F.linear(hidden, head), targets, reduction="none")


OPS = {"flash_attention": attention, "grouped_matmul": experts, "linear_cross_entropy": loss}


def prepare(row: dict):
    """A call of the row's pass."""
    measured = row["measured"]
    if row["op"] not in OPS:
        raise ValueError("PyTorch has no such op")
    inputs, forward = OPS[row["op"]](row["shape"], getattr(torch, row["dtype"]), measured != "forward")
    inputs = [inputs[i] for i in row["gradients"]] if row["gradients"] is not None else list(inputs)
    if measured == "forward":
        return forward
    out = forward()
    gradient = torch.randn_like(out)
    if measured == "backward":
        return lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)
    return lambda: torch.autograd.grad(forward(), inputs, gradient)


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    call = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if "count" not in asked:
                call = None  # frees what the row before held
                if DEVICE == "cuda":
                    torch.cuda.empty_cache()
                call = prepare(asked)
            start = time.perf_counter()
            for _ in range(asked.get("count", 1)):
                call()
            wait()
            print(json.dumps({"seconds": (time.perf_counter() - start) / asked.get("count", 1)}), flush=True)
        except Exception as error:
            print(json.dumps({"error": (str(error).strip() or repr(error)).splitlines()[0][:160]}), flush=True)


if __name__ == "__main__":
    main()
