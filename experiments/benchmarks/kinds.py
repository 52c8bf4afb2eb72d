"""Models that are no Llama, on this CPU in float32: ours against transformers + PyTorch, on the same folder.

    python experiments/benchmarks/kinds.py [--peer-python PYTHON_WITH_TRANSFORMERS] [--repeats 7]
        [--kinds mixtral,mamba2,deepseek_v3,mamba,jamba] [--tasks train,decode]

A training step on 8 x 256 tokens (AdamW), and greedy decoding of 128 tokens after 128 of prompt at batch 1, as in
`train_step.py` and `decode.py`. Each model has some million parameters and random weights, which our side writes as a
folder for both. PyTorch without CUDA has Mamba's scan as a Python loop: a training step of `mamba` or `jamba` takes it
a minute, and is left out unless --kinds names it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

from sides import HERE, Side, alternate, compare, header, no_peer, quartiles

if TYPE_CHECKING:
    from llm_jax.models import ModelConfig

ROWS, LENGTH, LAYERS, VOCAB = 8, 256, 6, 4096
KINDS = ("mixtral", "mamba2", "deepseek_v3", "mamba", "jamba")


def config_of(kind: str) -> "ModelConfig":
    """The model of a kind, 256 wide. Weights large enough that the likeliest token stands clear of the next."""
    from llm_jax.models import ModelConfig
    from llm_jax.models.experts_config import ExpertsConfig
    from llm_jax.models.latent_config import LatentConfig
    from llm_jax.models.mamba_config import MambaConfig

    mamba = MambaConfig(inner_size=512, state_size=16, dt_rank=16)
    no_feeds: dict[str, Any] = {"feed_forwards": ("none",) * LAYERS, "intermediate_size": 1, "num_heads": 1}
    alone: dict[str, Any] = {"positions": "none", "max_position_embeddings": 2**20, **no_feeds}
    fields: dict[str, dict[str, Any]] = {
        "mixtral": {"intermediate_size": 352, "num_heads": 8, "experts": ExpertsConfig(num=8, top_k=2)},
        "mamba2": {
            **alone,
            "mixers": ("mamba2",) * LAYERS,
            "mamba": MambaConfig(inner_size=512, state_size=64, num_heads=8),
        },
        "deepseek_v3": {
            "intermediate_size": 704,
            "num_heads": 8,
            "head_dim": 16,
            "rope_interleaved": True,
            "latent": LatentConfig(q_rank=128, kv_rank=64, nope_dim=32, rope_dim=16, value_dim=32),
            "feed_forwards": ("dense", *("experts",) * (LAYERS - 1)),
            "experts": ExpertsConfig(
                num=8, top_k=2, intermediate_size=176, shared_size=176, scores="sigmoid", correction_bias=True,
                group_score="top2", groups=2, top_groups=1, scale=2.5,
            ),
        },
        "mamba": {**alone, "mixers": ("mamba",) * LAYERS, "mamba": mamba},
        "jamba": {
            "positions": "none",
            "intermediate_size": 352,
            "num_heads": 8,
            "mixers": ("mamba", "attention") * (LAYERS // 2),
            "feed_forwards": ("dense", "experts") * (LAYERS // 2),
            "mamba": MambaConfig(**{**mamba.__dict__, "selection_norm": "weighted"}),
            "experts": ExpertsConfig(num=8, top_k=2, normalize=False),
        },
    }  # fmt: skip
    sizes = {"vocab_size": VOCAB, "hidden_size": 256, "num_layers": LAYERS, "init_std": 0.08}
    return ModelConfig(**{"family": kind, **sizes, **fields[kind]})


def train(kind: str, folder: str, peer: str | None, repeats: int) -> None:
    task = {"task": "train_folder", "folder": folder, "vocab": VOCAB, "rows": ROWS, "length": LENGTH}
    sides = [Side("llm_jax", sys.executable, "ours.py", task)]
    if peer:
        sides.append(Side("PyTorch", peer, "peer_torch.py", task))
    compare(kind, ROWS * LENGTH, sides, repeats)


def decode(kind: str, folder: str, peer: str | None, repeats: int) -> None:
    pythons = {"llm_jax": sys.executable} | ({"transformers": peer} if peer else {})
    sides = [Side(n, p, "decode_worker.py", {"side": n, "folder": folder, "batch": 1}) for n, p in pythons.items()]
    alternate(sides, repeats)
    for side in sides:
        low, median, high = quartiles(side.seconds)
        same = sum(a == b for a, b in zip(sides[0].results[0][0], side.results[0][0]))
        ratio = "" if side is sides[0] else f"{median / quartiles(sides[0].seconds)[1]:.2f}x"
        print(f"| {kind} | {side.label} | {median:.3f} | {low:.3f} to {high:.3f} | {same} | {ratio} |", flush=True)
        side.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python that has torch and transformers")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--kinds")
    parser.add_argument("--tasks", default="train,decode")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kinds = options.kinds.split(",") if options.kinds else list(KINDS)
        for kind in kinds:
            # In a process of its own: this one forks, which JAX's threads would not survive.
            task = {"side": "save", "folder": f"{folder}/{kind}", "kind": kind}
            subprocess.run([sys.executable, str(HERE / "decode_worker.py"), json.dumps(task)], check=True)
        if "train" in options.tasks.split(","):
            header()
            for kind in kinds if options.kinds else KINDS[:3]:
                train(kind, f"{folder}/{kind}", options.peer_python, options.repeats)
        if "decode" in options.tasks.split(","):
            print("\n| model | side | median s of 128 tokens | quartiles | same tokens | ours is faster by |")
            print("|---|---|---|---|---|---|", flush=True)
            for kind in kinds:
                decode(kind, f"{folder}/{kind}", options.peer_python, options.repeats)
    if not options.peer_python:
        no_peer()


if __name__ == "__main__":
    main()
