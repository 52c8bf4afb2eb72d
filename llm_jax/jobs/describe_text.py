"""What `python -m llm_jax.describe` prints for a person."""

from collections.abc import Mapping
from typing import Any


def text(described: Mapping[str, Any]) -> str:
    """The same for a terminal."""
    counts, flops, cache, memory = (described[key] for key in ("parameters", "flops_per_token", "cache", "memory"))
    total = counts["total"]
    active = "" if counts["active"] == total else f", {counts['active']:,} of them for each token"
    lines = [f"{described['model']}: {described['family']}, {total:,} parameters{active}"]
    lines += [f"  mixers         {described['pattern']['mixers']}"]
    lines += [f"  feed-forwards  {described['pattern']['feed_forwards']}", ""]
    wide = max(len(row["where"]) for row in described["layers"]) + 2
    for row in described["layers"]:
        size = f"{row['each']:,}" + (f" each, {row['each'] * row['layers']:,}" if row["layers"] > 1 else "")
        if len(row["what"]) == 1:
            lines.append(f"  {row['where']:<{wide}}{row['what'][0]:<16}{size if row['each'] else ''}".rstrip())
        else:
            lines.append(f"  {row['where']:<{wide}}{size}")
            lines += [f"  {'':<{wide}}  {module}" for module in row["what"]]
    lines += ["", "parameters"]
    for part, count in counts.items():
        if part not in ("total", "active", "tied_head", "trained"):
            tied = "   tied to embed" if part == "head" and counts["tied_head"] else ""
            lines.append(f"  {part:<12}{count:>18,}  {count / total:6.1%}{tied}")
    lines.append(f"  {'total':<12}{total:>18,}")
    if counts["trained"] is not None:
        lines.append(f"  {'adapter':<12}{counts['trained']:>18,}  {counts['trained'] / total:6.1%}   trained")
    if active:
        lines.append(f"  {'active':<12}{counts['active']:>18,}  {counts['active'] / total:6.1%}")
    window, decodes = flops["window"], flops["decoding_first"] is not None
    lines += [
        "",
        "flops per token: 2 for each weight of a matrix product, attention's two products over the keys it sees, scans",
        f"  {f'forward, {window} tokens':<28}{flops['forward']:>12.4g}",
        f"  {'training, 3 x forward':<28}{flops['training']:>12.4g}   without recomputation",
    ]
    if decodes:
        lines += [
            f"  {'decoding, over 1 key':<28}{flops['decoding_first']:>12.4g}",
            f"  {f'decoding, over {window} keys':<28}{flops['decoding_last']:>12.4g}",
            "",
            f"cache, {cache['dtype']}",
            f"  {'per token':<28}{cache['bytes_per_token']:>12,} bytes",
            *_further_lines(cache),
            f"  {f'{cache["sequences"]} x {cache["window"]} tokens':<28}{_size(cache['bytes']):>12}",
        ]
    else:
        lines += ["", "cache: none, an encoder's tokens see those that come later"]
    lines += [
        "",
        f"training memory per device: data={memory['data']} tensor={memory['tensor']} zero={memory['zero']}, "
        f"{memory['compute_dtype']}, batch {memory['batch_size']} x {memory['window']} in {memory['microbatches']} "
        f"microbatch{'es' if memory['microbatches'] > 1 else ''}, remat {memory['remat']}",
    ]
    for name, note in _NOTES.items():
        if memory["per_device"][name] or name in ("persistent", "total"):
            lines.append(f"  {name.replace('_', ' '):<16}{_size(memory['per_device'][name]):>12}   {note}".rstrip())
    return "\n".join(lines)


def _further_lines(cache: Mapping[str, Any]) -> list[str]:
    lines = []
    if cache["sliding_window"] is not None:
        lines.append(f"  {f'per token past {cache["sliding_window"]}':<28}{cache['bytes_per_token_beyond']:>12,} bytes")
    if cache["state_bytes"]:
        lines.append(f"  {'state, at any length':<28}{cache['state_bytes']:>12,} bytes")
    return lines


_NOTES = {
    "params": "float32 masters",
    "opt_state": "",
    "ema": "average of the weights",
    "frozen": "float32 masters of further models",
    "persistent": "exactly: what lies there between steps",
    "compute_copy": "weights in compute dtype, as gathered",
    "gradients": "float32, as accumulated",
    "activations": "kept for the backward pass of a microbatch",
    "working": "the backward pass of a layer (estimated)",
    "logits": "a chunk of tokens (estimated)",
    "total": "at most at one time (estimated)",
}


def _size(count: int) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"
