"""Rows as text for people: each segment decoded, targets marked, padding counted."""

from collections.abc import Mapping, Sequence

import numpy as np

from llm_jax.data.tokenizers import Tokenizer

TARGET, CONTEXT, HEADING, RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[36m", "\x1b[0m"
SIDES = {1: "chosen", 2: "rejected"}


def format_batch(
    batch: Mapping[str, np.ndarray], tokenizer: Tokenizer, color: bool = True, sources: Sequence[str] = ()
) -> str:
    """A batch as `Loader.batch` gives it, [microbatches, rows, ...], row by row under a legend."""
    flat = {name: array.reshape(-1, *array.shape[2:]) for name, array in batch.items()}
    rows = [{name: array[i] for name, array in flat.items()} for i in range(len(flat["tokens"]))]
    used = float((flat["segment_ids"] > 0).mean())
    targets = float((flat["loss_mask"] == 1).mean())
    target, context = _mark("target", True, color), _mark("context", False, color)
    legend = f"{len(rows)} rows of {flat['tokens'].shape[1]} tokens: {used:.1%} used, {targets:.1%} targets"
    shown = [format_row(row, tokenizer, color, sources, f"row {i}") for i, row in enumerate(rows)]
    return "\n\n".join([f"{legend} · {target} {context}", *shown])


def format_row(
    row: Mapping[str, np.ndarray],
    tokenizer: Tokenizer,
    color: bool = True,
    sources: Sequence[str] = (),
    name: str = "row",
) -> str:
    """One row: a heading, then every segment with its targets marked.

    Args:
      row: fields as in `data/rows.py`.
      tokenizer: that made the row.
      color: targets in green and the rest dim; without it, targets stand in ⟦ ⟧.
      sources: names by source_id.
      name: what to call the row.
    """
    segment_ids, mask = row["segment_ids"], row["loss_mask"]
    source = int(row["source_id"])
    heading = [name, sources[source] if source < len(sources) else f"source {source}"]
    heading.append(f"{int((mask == 1).sum())} targets, {int(row['num_bytes'])} bytes")
    lines = [_heading(" · ".join(heading), color)]
    for number in range(1, int(segment_ids.max(initial=0)) + 1):
        places = np.flatnonzero(segment_ids == number)
        label = [f"segment {number}", f"{len(places)} tokens"]
        if "ranking_id" in row:
            ranking = int(row["ranking_id"][number - 1])
            label.append(f"ranking {int(row['ranking_index'][ranking - 1])}")
        if "step_label" in row:
            label.append(f"steps {[int(x) for x in row['step_label'][places] if x >= 0]}")
        if "answer_index" in row and "weight" not in row:
            label.append(f"text {int(row['answer_index'][number - 1])} of class {int(row['label'][number - 1])}")
        elif "answer_index" in row:
            told = "desirable" if row["label"][number - 1] else "undesirable"
            label.append(f"answer {int(row['answer_index'][number - 1])} {told}")
        if "pair_id" in row:
            pair = int(row["pair_id"][places[0]])
            label.append(f"pair {int(row['pair_index'][pair - 1])} {SIDES[int(row['side'][places[0]])]}")
        lines.append(_heading(f"  {' · '.join(label)}", color))
        lines.append(_segment(row["tokens"][places], mask[places], tokenizer, color))
    padding = int((segment_ids == 0).sum())
    if padding:
        lines.append(_heading(f"  padding · {padding} tokens", color))
    return "\n".join(lines)


def _segment(tokens: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer, color: bool) -> str:
    # Runs of one kind are decoded whole: a character may take several tokens.
    cuts = [0, *(np.flatnonzero(np.diff(mask.astype(np.int8))) + 1).tolist(), len(tokens)]
    runs = [(tokenizer.decode(tokens[a:b].tolist()), mask[a] == 1) for a, b in zip(cuts, cuts[1:]) if b > a]
    return "".join(_mark(text, bool(target), color) for text, target in runs)


def _mark(text: str, target: bool, color: bool) -> str:
    text = _printable(text)
    if not color:
        return f"⟦{text}⟧" if target else text
    style = TARGET if target else CONTEXT
    # Styles do not reach over a line's end in pagers.
    return "\n".join(f"{style}{line}{RESET}" for line in text.split("\n"))


def _printable(text: str) -> str:
    """Control characters by their symbols: a record must not move the cursor of the terminal it is shown on."""
    return "".join(chr(0x2400 + ord(char)) if ord(char) < 32 and char not in "\t\n" else char for char in text)


def _heading(text: str, color: bool) -> str:
    return f"{HEADING}{text}{RESET}" if color else text
