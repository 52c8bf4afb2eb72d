import re

import pytest

from llm_jax.base.errors import UserError
from llm_jax.data.config import DataConfig, EmbeddedConfig
from llm_jax.data.loader import Loader
from llm_jax.data.prepare import prepare
from llm_jax.data.show import format_batch
from llm_jax.show_data import main, parse

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


def test_the_command_reads_values_after_an_equals_sign_or_a_space():
    words = ["--rows=2", "a.py", "--step", "3", "--config.data.window", "64", "--split=eval"]
    options = {"--split": "eval", "--step": "3", "--rows": "2", "--workdir": ""}
    assert parse(words) == ("a.py", [("data.window", "64")], options)
    assert parse(["--config", "a.py"])[0] == "a.py"
    for words, message in (
        (["a.py", "--setp=3"], "unknown argument --setp=3; the nearest is --step="),
        (["a.py", "--configure=3"], "the nearest is --config"),
        (["a.py", "--step"], "--step needs a value"),
        (["a.py", "--step", "--rows=2"], "--step needs a value"),
        (["a.py", "--step", "x"], "--step=x has to be a whole number"),
        (["a.py", "b.py"], "takes one config"),
    ):
        with pytest.raises(UserError, match=message):
            parse(words)


def test_a_batch_beyond_the_data_is_refused(tmp_path, capsys):
    words = ["configs/pretrain.py:test", f"--workdir={tmp_path / 'run'}"]
    main([*words, "--split", "eval"])
    assert "⟦" in capsys.readouterr().out
    for split in ("train", "eval"):
        with pytest.raises(UserError, match=rf"--step=99999: {split} has \d+ batches, from 0 to"):
            main([*words, f"--split={split}", "--step=99999"])
