"""A conversation through pipes, and in a terminal."""

import contextlib
import dataclasses
import io
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from llm_jax.base.door import run_door
from llm_jax.data import chat
from llm_jax.data.templating import load_template
from llm_jax.data.tokenizer_training import train_bpe
from llm_jax.generate import main
from llm_jax.inference import Generator, SamplingParams, Session
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.init import init_params
from llm_jax.models.loading import Model
from llm_jax.models.saving import save

PARAMS = SamplingParams(max_tokens=6, temperature=1.0, seed=3, ignore_eos=True)
FLAGS = ("--max-tokens", "6", "--seed", "3", "--ignore-eos")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with a template, and its folder; long enough that an answer can be stopped."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe(["Ben has 23 pencils. Zoë finds 5 more.\n"] * 4, 288).with_chat_template(
        load_template("chatml")
    )
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        max_position_embeddings=16384,
        init_std=0.3,
    )
    decoder = Decoder(config)
    tokenizer.save(path / "tokenizer")
    made = Model(decoder, init_params(decoder, 0), decoder.config, path / "tokenizer")
    save(made, path / "hf")
    return made, tokenizer, path / "hf"


def talk(capsys, monkeypatch, folder, lines, *argv):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="utf-8"))
    status = run_door(main, [str(folder), "--chat", *FLAGS, *argv])
    return status, *capsys.readouterr()


def expected(model, messages, **changes) -> str:
    made, tokenizer, _ = model
    ids, _ = chat.render(tokenizer, messages, add_generation_prompt=True)
    generator = Generator(made, tokenizer, max_batch=1)
    return generator.generate([ids], dataclasses.replace(PARAMS, **changes))[0].text


def turns(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def test_history_and_commands_through_pipes(capsys, monkeypatch, model):
    lines = "Hi\nmore\n/regenerate\nlast\n/reset\nHi\n\n/nonsense\n/help\n/quit\nnever\n"
    status, out, err = talk(capsys, monkeypatch, model[2], lines)
    first = expected(model, turns("Hi"))
    replaced = expected(model, turns("Hi", first, "more"), seed=4)
    told = [
        first,
        expected(model, turns("Hi", first, "more")),
        replaced,
        expected(model, turns("Hi", first, "more", replaced, "last")),
        first,
    ]
    assert status == 0
    assert out == "".join(text + "\n" for text in told)
    assert "forgotten" in err and "/nonsense is no command" in err and "/regenerate " in err


def test_system_prompt_and_the_end_of_the_input(capsys, monkeypatch, model):
    status, out, _ = talk(capsys, monkeypatch, model[2], "/regenerate\nHi\n/reset\nHi", "--system", "Be brief.")
    text = expected(model, [{"role": "system", "content": "Be brief."}, *turns("Hi")])
    assert (status, out) == (0, f"{text}\n{text}\n")


def test_turns_reuse_the_caches(capsys, monkeypatch, model):
    """The second prompt is the first with its answer and a question: most of it is not run again."""
    reused = []
    stream = Session.stream

    def watched(self, ids, *args, **kwargs):
        yield from stream(self, ids, *args, **kwargs)
        reused.append((self.reused, len(ids)))

    monkeypatch.setattr(Session, "stream", watched)
    talk(capsys, monkeypatch, model[2], "Hi\nmore\n")
    (none, first), (kept, second) = reused
    assert none == 0 and first - 1 <= kept < second


def test_a_conversation_too_long_is_refused_and_goes_on(capsys, monkeypatch, model):
    status, out, err = talk(capsys, monkeypatch, model[2], "x" * 20000 + "\nHi\n")
    assert (status, out) == (0, expected(model, turns("Hi")) + "\n")
    assert "the conversation has" in err and "/reset begins anew" in err


def test_a_template_that_refuses_the_system_prompt_is_found_at_once(capsys, monkeypatch, model, tmp_path):
    for file in model[2].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    )
    status, out, err = talk(capsys, monkeypatch, tmp_path, "Hi\n", "--system", "x")
    assert (status, out) == (2, "") and "no system here" in err


IN_TERMINAL = """
import fcntl, runpy, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
# As in a terminal, also where the tests run in the background, which ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("llm_jax.generate", run_name="__main__")
"""


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, argv):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_TERMINAL, *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        os.set_blocking(self.master, False)
        self.seen = ""

    def until(self, text: str) -> None:
        """Reads until `text` has come, and forgets what came up to its end."""
        self._read(lambda: text in self.seen, f"no {text!r}")
        self.seen = self.seen.partition(text)[2]

    def press(self, key: str, text: str) -> None:
        """Presses a key until `text` comes: Python sees a signal between prompt and read with the next one only."""
        end = time.monotonic() + 120
        while text not in self.seen and time.monotonic() < end:
            self.type(key)
            with contextlib.suppress(AssertionError):
                self._read(lambda: text in self.seen, f"no {text!r}", seconds=10)
        self.until(text)

    def more(self, count: int) -> None:
        """Reads until so many further characters have come."""
        self._read(lambda: len(self.seen) >= count, "silence")

    def _read(self, enough: Callable[[], bool], otherwise: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not enough():
            assert time.monotonic() < end, f"{otherwise} in {self.seen[-2000:]!r}"
            try:
                self.seen += os.read(self.master, 4096).decode("utf-8", "replace")
            except BlockingIOError:
                time.sleep(0.01)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def test_ctrl_c_stops_the_answer_and_not_the_program(model):
    terminal = Terminal([str(model[2]), "--chat", "--ignore-eos", "--max-tokens", "15000"])
    try:
        terminal.until("Type a message, or /help.")
        terminal.until("> ")
        terminal.type("Hi\n")
        terminal.until("Hi\r\n")
        terminal.more(20)  # the answer has begun
        terminal.type("\x03")
        terminal.until("(stopped)")
        terminal.until("> ")
        terminal.press("\x03", "/quit or Ctrl-D leaves.")
        terminal.until("> ")
        terminal.type("/help\n")
        terminal.until("/regenerate")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)
