"""The command: what it prints, and how it refuses."""

import io
import json
import subprocess
import sys

import pytest

from llm_jax.base.door import run_door
from llm_jax.generate import main
from llm_jax.inference import Generator, SamplingParams


def run(capsys, *argv) -> tuple[int, str, str]:
    status = run_door(main, [str(a) for a in argv])
    out, err = capsys.readouterr()
    return status, out, err


FLAGS = ("--max-tokens", 8, "--temperature", 0.9, "--seed", 5, "--ignore-eos")


@pytest.fixture(scope="module")
def expected(tiny) -> str:
    ids = tiny.tokenizer.encode("Ben has", add_special_tokens=True)
    params = SamplingParams(max_tokens=8, temperature=0.9, seed=5, ignore_eos=True)
    return Generator(tiny, tiny.tokenizer, max_batch=1).generate([ids], params)[0].text


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_prints_the_text_and_the_caches_bytes(capsys, folder, expected, stream):
    status, out, err = run(capsys, folder, "--prompt", "Ben has", *FLAGS, stream)
    assert status == 0
    assert out == expected + "\n"
    assert "cache: 256 bytes per token, 16,384 bytes in all" in err


def test_prompt_from_stdin_stop_and_samples(capsys, folder, expected, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Ben has")))
    stop = expected[3]
    status, out, _ = run(capsys, folder, "--prompt", "-", *FLAGS, "--stop", "nowhere", "--stop", stop, "--n", 2)
    assert status == 0
    first, second = out.split("--- sample ")[1:]
    assert first == f"0 (stop)\n{expected[: expected.index(stop)]}\n"
    assert second.startswith("1 (")


def test_chat_template_is_applied_unless_raw(capsys, tiny, folder, expected, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    _, raw, _ = run(capsys, tmp_path, "--prompt", "Ben has", *FLAGS, "--raw")
    assert raw == expected + "\n"
    _, chat, err = run(capsys, tmp_path, "--prompt", "Ben has", *FLAGS)
    assert chat != raw
    assert f"({len(tiny.tokenizer.encode('[Ben has]'))} tokens of prompt)" in err


def test_generation_configs_end_tokens_are_honoured(capsys, tiny, folder, tmp_path):
    ids = tiny.tokenizer.encode("Ben has", add_special_tokens=True)
    greedy = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    tokens = Generator(tiny, tiny.tokenizer, max_batch=1).generate([ids], greedy)[0].tokens
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokens[3]]}))
    _, out, _ = run(capsys, tmp_path, "--prompt", "Ben has", "--max-tokens", 6, "--temperature", 0)
    before = tokens[: tokens.index(tokens[3])]
    assert out == tiny.tokenizer.decode(before, skip_special_tokens=True) + "\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--prompt", "x", "--temprature", "1"), "--temprature; the nearest is --temperature"),
        (("--prompt", "x", "--top-p", "2"), "top_p is 2.0"),
        (("--prompt", "x", "--max-tokens", "many"), "--max-tokens: invalid int value: 'many'"),
        (("--prompt", "x" * 500), "the prompt has 501 tokens; the model's 96"),
        (("--prompt", ""), "prompt is empty"),
        (("--prompt", "x", "--n", "2", "--stream"), "--stream shows one sample"),
        (("--promt", "x"), "--promt; the nearest is --prompt"),
        ((), "--prompt is missing"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, folder, argv, message):
    status, out, err = run(capsys, folder, *argv)
    assert status == 2
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_model_that_is_none(capsys, tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        status, _, err = run(capsys, path, "--prompt", "x")
        assert status == 2
        assert str(path) in err
        assert len(err.splitlines()) == 1


def test_stdin_that_is_not_utf8(capsys, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    status, _, err = run(capsys, folder, "--prompt", "-")
    assert (status, "not UTF-8 (byte 2)" in err) == (2, True)


@pytest.mark.parametrize("argv", [["--help"], ["MODEL", "--prompt", "x", "--sed", "1"]])
def test_help_and_mistakes_do_not_import_jax(argv):
    code = (
        "import sys\nfrom llm_jax.generate import main, run_door\n"
        f"try:\n    status = run_door(main, {argv!r})\nexcept SystemExit as e:\n    status = e.code\n"
        "assert 'jax' not in sys.modules and 'transformers' not in sys.modules\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if argv == ["--help"]:
        assert done.returncode == 0 and "--repetition-penalty" in done.stdout
    else:
        assert done.returncode == 2 and "the nearest is --seed" in done.stderr, done.stderr
