import re

import pytest

from llm_jax.data.config import DataConfig, EmbeddedConfig
from llm_jax.data.loader import Loader
from llm_jax.data.prepare import prepare
from llm_jax.data.show import format_batch

DATA = DataConfig(generated=EmbeddedConfig(records=40, eval_records=10), window=256)


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_targets_are_what_is_marked(bpe, tmp_path, kind):
    prepared = prepare(kind, DATA, bpe, tmp_path)
    batch = Loader(prepared.train, 4, 2).batch(0)
    plain = format_batch(batch, prepared.tokenizer, color=False, sources=["problems"])
    marked = re.findall(r"⟦([^⟧]*)⟧", plain)[1:]  # the first is the legend
    wanted = []
    for tokens, mask, segments in zip(*(batch[n].reshape(4, -1) for n in ("tokens", "loss_mask", "segment_ids"))):
        for number in range(1, segments.max() + 1):
            wanted.append(prepared.tokenizer.decode(tokens[(segments == number) & (mask == 1)]))
    assert marked == wanted
    assert plain.count("row ") == 4 and plain.count("chosen") == plain.count("rejected")
    colored = format_batch(batch, prepared.tokenizer, color=True, sources=["problems"])
    assert "⟦" not in colored
    green = re.findall("\x1b\\[1;32m([^\x1b]*)\x1b", colored)[1:]
    assert green == wanted


def test_a_record_cannot_move_the_cursor(bpe, tmp_path, write_jsonl):
    path = write_jsonl(*[{"text": f"{i} \x1b[2J\r\x07 end"} for i in range(4)])
    prepared = prepare("pretrain", DataConfig(path=path, eval_fraction=0.3, window=64), bpe, tmp_path / "rows")
    batch = Loader(prepared.train, 1).batch(0)
    for color in (True, False):
        shown = format_batch(batch, prepared.tokenizer, color)
        assert not re.search("\x1b\\[2J|\r|\x07", shown) and "␛[2J" in shown
