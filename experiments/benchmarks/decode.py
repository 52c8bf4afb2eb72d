"""Greedy decoding on this machine's CPU: ours against `transformers.generate`, float32, key-value cache on.

    python experiments/benchmarks/decode.py --peer-python PYTHON_WITH_TRANSFORMERS [--repeats 7]

A Llama of 6.8M parameters (D 256, F 688, 6 layers, 8 heads of 32, vocabulary 4096) with random weights, the same on
both sides; 128 tokens of prompt, 128 new ones, at batch 1 and 16. A run is a whole call, from lists of ids to lists of
ids, prefill included; each side runs once before it is timed (compilation). Both use two threads and take turns, the
peer in a process of its own. Prints a Markdown table of medians, and how many tokens are the same on both sides.
"""

import argparse
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from peer import Peer, is_worker, median, serve

BATCHES = (1, 16)
PROMPT, NEW, VOCAB, THREADS = 128, 128, 4096, 2


def prompts(batch: int) -> list[list[int]]:
    """The same on both sides, without a library: a linear congruential sequence."""
    state, rows = batch, []
    for _ in range(batch):
        row = []
        for _ in range(PROMPT):
            state = (state * 1103515245 + 12345) % 2**31
            row.append(state // 8 % VOCAB)
        rows.append(row)
    return rows


def worker(folder: str) -> None:
    """Under the peer's Python: a timed call of `transformers.generate` for every request."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    torch.set_num_threads(THREADS)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def answer(batch: int) -> dict[str, Any]:
        ids = prompts(batch)
        began = time.perf_counter()
        x = torch.tensor(ids)
        out = model.generate(
            x,
            attention_mask=torch.ones_like(x),
            do_sample=False,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
        )
        tokens = out[:, PROMPT:].tolist()
        return {"seconds": time.perf_counter() - began, "tokens": tokens}

    serve(answer, versions=f"transformers {transformers.__version__}, PyTorch {torch.__version__}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python with transformers and torch; without it ours is timed alone")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()

    from llm_jax.inference import Generator, SamplingParams
    from llm_jax.models.config import ModelConfig
    from llm_jax.models.decoder import Decoder
    from llm_jax.models.init import init_params
    from llm_jax.models.loading import Model, save

    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=688,
        num_layers=6,
        num_heads=8,
        max_position_embeddings=512,
        # Large enough that the likeliest token stands clear of the next.
        init_std=0.08,
    )
    decoder = Decoder(config)
    model = Model(decoder, init_params(decoder, 0), decoder.config)
    generator = Generator(model, max_batch=max(BATCHES))
    sampling = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)

    def ours(batch: int) -> dict[str, Any]:
        ids = prompts(batch)
        began = time.perf_counter()
        tokens = [done.tokens for done in generator.generate(ids, sampling)]
        return {"seconds": time.perf_counter() - began, "tokens": tokens}

    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, Any] = {"llm_jax": ours}
        peer = None
        if options.peer_python:
            save(model, folder)
            peer = Peer(options.peer_python, __file__, folder, threads=THREADS)
            print(peer.ready["versions"], file=sys.stderr)
            sides["transformers.generate"] = lambda batch: peer.ask(batch=batch)
        head = [f"{name}, s (tokens/s)" for name in sides]
        print(f"| batch | {' | '.join(head)} | ratio | same tokens |")
        print("|---|" + "---|" * (len(sides) + 2))
        for batch in BATCHES:
            results = {name: [run(batch) for _ in range(2)][1:] for name, run in sides.items()}
            for name in [*sides] * options.repeats:
                results[name].append(sides[name](batch))
            medians = {name: median([r["seconds"] for r in runs[1:]]) for name, runs in results.items()}
            cells = [f"{s:.3f} ({batch * NEW / s:,.0f})" for s in medians.values()]
            ratio, same = "–", "–"
            if peer is not None:
                ratio = f"{medians['transformers.generate'] / medians['llm_jax']:.2f}"
                both = [results[name][0]["tokens"] for name in sides]
                equal = [a == b for x, y in zip(*both) for a, b in zip(x, y)]
                same = f"{sum(equal)} of {len(equal)}"
            print(f"| {batch} | {' | '.join(cells)} | {ratio} | {same} |", flush=True)
        if peer is not None:
            peer.close()


if __name__ == "__main__":
    if is_worker():
        worker(sys.argv[1])
    else:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        main()
