"""Which records are held out: decided by each one's content alone, so that equal records are on one side."""

import hashlib
import json
import math
from typing import Any

from llm_jax.base.errors import UserError
from llm_jax.data.examples import Text
from llm_jax.data.sources import read_records


def place(value: Any) -> float:
    """A number in [0, 1) by the record's content, wherever it stands: a text file's is that of `{"text": ...}`."""
    if isinstance(value, Text):
        value = {"text": value.text}
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def held_out_below(path: str, max_records: int | None, fraction: float) -> float:
    """Records whose `place` is below this are held out: `fraction`, or the lowest place alone where that leaves a side
    empty. Reads on only until both sides have a record.

    Raises:
      UserError: there is one record, or nothing but copies of one.
    """
    count, lowest, highest = 0, math.inf, -math.inf
    for record in read_records(path, max_records):
        count += 1
        here = place(record.value)
        lowest, highest = min(lowest, here), max(highest, here)
        if lowest < fraction <= highest:
            return fraction
    if count < 2:
        raise UserError(f"{path} holds one record: nothing would be left to train on beside a held-out one")
    if lowest == highest:
        raise UserError(f"{path} holds the same record {count} times: nothing can be held out")
    return math.nextafter(lowest, math.inf)
