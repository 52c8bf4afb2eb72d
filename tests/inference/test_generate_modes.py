"""The command's other ways to ask: token ids, files, and what a model's generation_config.json says."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from llm_jax.base.door import run_door
from llm_jax.generate import main
from llm_jax.inference import Generator, SamplingParams


@pytest.fixture
def told(folder):
    """`told(fields)` writes the folder's generation_config.json for one test."""
    file = folder / "generation_config.json"
    yield lambda fields: file.write_text(json.dumps(fields))
    file.unlink(missing_ok=True)


def run(capsys, *argv) -> tuple[int, str, str]:
    status = run_door(main, [str(a) for a in argv])
    out, err = capsys.readouterr()
    return status, out, err


def answer(tiny, ids, **params) -> str:
    params = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True, **params}
    return Generator(tiny, tiny.tokenizer, max_batch=1).generate([ids], SamplingParams(**params))[0].text


FLAGS = ("--max-tokens", 6, "--temperature", 0, "--ignore-eos")


def test_token_ids_are_the_prompt(capsys, tiny, folder):
    status, out, err = run(capsys, folder, "--prompt-ids", "9, 11 200", *FLAGS)
    assert (status, out) == (0, answer(tiny, [9, 11, 200]) + "\n")
    assert "(3 tokens of prompt)" in err


def test_log_probabilities_as_a_table(capsys, tiny, folder):
    _, out, _ = run(capsys, folder, "--prompt-ids", "9 11", *FLAGS, "--logprobs", 2)
    text, table = out.split("\n\n", 1)
    assert text == answer(tiny, [9, 11])
    lines = table.splitlines()
    assert lines[0].split() == ["id", "token", "logprob", "likeliest"] and len(lines) == 7
    (done,) = Generator(tiny, tiny.tokenizer, max_batch=1).generate(
        [[9, 11]], SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=2)
    )
    for line, token, logprob, top in zip(lines[1:], done.tokens, done.logprobs, done.top_logprobs):
        assert line.split()[0] == str(token) and f"{logprob:.4f}" in line
        # Greedy: the token drawn is the likeliest, and the second stands behind it.
        assert f"{tiny.tokenizer.decode([token])!r} {logprob:.3f}  " in line and line.endswith(f"{top[1][1]:.3f}")


def test_generation_config_gives_defaults_and_the_command_line_overrides(capsys, tiny, folder, told):
    told({"do_sample": True, "temperature": 0.7, "top_k": 9, "max_new_tokens": 5, "eos_token_id": 2, "num_beams": 1})
    wanted = {"temperature": 0.7, "top_k": 9, "max_tokens": 5, "seed": 4}
    _, out, err = run(capsys, folder, "--prompt-ids", "9 11", "--ignore-eos", "--seed", 4)
    assert out == answer(tiny, [9, 11], **wanted) + "\n"
    line = f"from {folder}/generation_config.json: max_tokens=5, temperature=0.7, top_k=9, end tokens 2"
    assert line in err.splitlines()
    _, out, err = run(capsys, folder, "--prompt-ids", "9 11", "--ignore-eos", "--seed", 4, "--max-tokens", 3)
    assert out == answer(tiny, [9, 11], **wanted | {"max_tokens": 3}) + "\n"
    assert ": temperature=0.7, top_k=9, end tokens 2" in err
    told({"do_sample": False, "max_length": 7})
    assert run(capsys, folder, "--prompt-ids", "9 11", "--ignore-eos")[1] == answer(tiny, [9, 11], max_tokens=5) + "\n"
    told({"num_beams": 4})
    status, out, err = run(capsys, folder, "--prompt-ids", "9 11")
    assert (status, out, len(err.splitlines())) == (2, "", 1) and "num_beams=4 is not supported" in err
    assert run(capsys, folder, "--prompt-ids", "9 11", *FLAGS, "--no-generation-config")[0] == 0


RECORDS = [
    {"prompt": "Ben"},
    {"messages": [{"role": "user", "content": "has"}]},
    {"prompt_ids": [9, 11, 200]},
    {"prompt": "pencils"},
]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    return file


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_file_of_prompts_is_answered_and_gone_on_with(capsys, tiny, folder, prompts, tmp_path):
    output = tmp_path / "answers.jsonl"
    argv = (folder, "--input", prompts, "--output", output, *FLAGS[:2], "--ignore-eos", "--n", 2, "--logprobs", 1)
    status, out, err = run(capsys, *argv)
    assert (status, out) == (0, "") and "8 answers, 48 tokens" in err
    whole = sorted(read(output), key=lambda line: (line["index"], line["sample"]))
    assert [(line["index"], line["sample"]) for line in whole] == [(i, s) for i in range(4) for s in range(2)]
    assert [line["prompt"] for line in whole[::2]] == ["Ben", RECORDS[1]["messages"], [9, 11, 200], "pencils"]
    ids = tiny.tokenizer.encode("pencils", add_special_tokens=True)
    assert whole[6]["completion"] == answer(tiny, ids, temperature=1.0)
    assert all(abs(sum(t["logprob"] for t in line["tokens"]) - line["sum_logprobs"]) < 1e-6 for line in whole)

    # Cut off in the middle of the fourth line: that and what follows is made again, what stands is left alone.
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:3]) + lines[3][:20])
    status, _, err = run(capsys, *argv)
    assert status == 0 and "3 of 8 answers are in" in err and "5 answers" in err
    assert output.read_text().startswith("".join(lines[:3]))
    again = sorted(read(output), key=lambda line: (line["index"], line["sample"]))
    assert [line["completion"] for line in again] == [line["completion"] for line in whole]
    status, _, err = run(capsys, *argv)
    assert status == 0 and "8 of 8 answers" in err and "cache" not in err

    for other, message in (
        (("--seed", 1), "answers.jsonl:1 was made with another model or other settings"),
        (("--raw",), "other settings"),
    ):
        status, _, err = run(capsys, *argv, *other)
        assert status == 2 and message in err
    prompts.write_text(json.dumps({"prompt": "Zoë"}) + "\n")
    status, _, err = run(capsys, *argv)
    assert status == 2 and "answers another prompt" in err
    output.write_text('{"text": "mine"}\n')
    status, _, err = run(capsys, *argv)
    assert status == 2 and "is no answer of this command" in err and output.read_text() == '{"text": "mine"}\n'


def test_killed_and_begun_again(folder, tmp_path):
    """kill -9 with some answers written: the same command makes the others, and none twice."""
    prompts, output = tmp_path / "many.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_ids": [9 + i % 250, 11]}) + "\n" for i in range(200)))
    command = [sys.executable, "-m", "llm_jax.generate", str(folder), "--input", str(prompts), "--output", str(output)]
    command += ["--max-tokens", "60", "--ignore-eos"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while time.monotonic() < until and not (output.exists() and output.stat().st_size):
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    second = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert second.returncode == 2 and "another process is writing it" in second.stderr
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert 0 < output.read_text().count("\n") < 200
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True)
    assert "of 200 answers are in" in done.stderr
    assert sorted(line["index"] for line in read(output)) == list(range(200))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--prompt", "x", "--prompt-ids", "1"), "--prompt and --prompt-ids are two ways to ask"),
        (("--prompt", "x", "--output", "y"), "--output goes with --input only"),
        (("--prompt", "x", "--system", "y"), "--system goes with --chat only"),
        (("--input", "x"), "--output is missing"),
        (("--input", "x", "--output", "y", "--stream"), "--stream does not go with --input"),
        (("--chat", "--n", "2"), "--n does not go with --chat"),
        (("--chat", "--logprobs", "2"), "--logprobs does not go with --chat"),
        (("--chat",), "the model has no chat template"),
        (("--prompt-ids", "1 x"), "'x' is not a token id"),
        (("--prompt-ids", " "), "--prompt-ids has no ids"),
        (("--prompt-ids", "288"), "the prompt has token ids outside the model's vocabulary of 288"),
        (("--prompt", "x", "--logprobs", "-1"), "logprobs is -1"),
        (("--input", "/absent", "--output", "y"), "/absent"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, folder, argv, message):
    status, out, err = run(capsys, folder, *argv)
    assert (status, out) == (2, "")
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1 == len(err.splitlines())


def test_prompt_ids_of_a_file_have_to_be_integers(capsys, folder, tmp_path):
    file = tmp_path / "prompts.jsonl"
    for bad in ([1.5], "1 2", [True]):
        file.write_text(json.dumps({"prompt_ids": bad}) + "\n")
        status, _, err = run(capsys, folder, "--input", file, "--output", tmp_path / "out.jsonl")
        assert status == 2 and "prompts.jsonl:1: `prompt_ids` is not a list of integers" in err
        assert not (tmp_path / "out.jsonl").exists()
