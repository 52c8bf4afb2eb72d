"""`python -m llm_jax.score MODEL... --input FILE --output FILE`: what reward models say of answers."""

import sys
from types import ModuleType
from typing import Any

from llm_jax.base.door import run_door
from llm_jax.base.errors import UserError
from llm_jax.base.flags import read_flags

USAGE = """usage: python -m llm_jax.score MODEL... --input=FILE --output=FILE [--batch-size=16]
       python -m llm_jax.score MODEL... --prompt=TEXT --answer=TEXT

MODEL...         workdirs or folders of reward models, classifiers, preference or process reward models; several reward
                 models are an ensemble, whose mean and spread are told
--input=FILE     JSON lines: `prompt` with `completion`, with `chosen` and `rejected`, or with `completions` (steps); or
                 `text`
--output=FILE    the same records with their scores: `score`, `scores`, `chosen_score` and `rejected_score`,
                 `preference` or `step_scores`
--prompt, --answer    one answer, whose score is printed
--batch-size=N   answers that are scored together (16)"""
FLAGS = {"--input": "FILE", "--output": "FILE", "--prompt": "TEXT", "--answer": "TEXT", "--batch-size": "N"}


def main(argv: list[str]) -> None:
    if {"--help", "-h"} & set(argv):
        print(USAGE)
        return
    models, given, batch_size = parse(argv)
    if "--input" in given:
        from llm_jax.jobs.score_file import score_file

        count = score_file(models, given["--input"], given["--output"], batch_size)
        print(f"wrote {given['--output']} ({count} records)")
        return
    from llm_jax.jobs.answer_scores import score

    for model, found in zip(models, score(models, [given["--prompt"]], [given["--answer"]], batch_size=1), strict=True):
        print(f"{model}: {' '.join(f'{value:.6g}' for value in found.ravel())}")


def parse(argv: list[str]) -> tuple[list[str], dict[str, str], int]:
    """Models, flags and the batch size. Raises UserError for what is missing or contradicts itself."""
    models, given, _ = read_flags(argv, FLAGS)
    if not models:
        raise UserError("score takes one or more models; see --help")
    files, texts = ("--input", "--output"), ("--prompt", "--answer")
    wanted, other = (texts, files) if "--prompt" in given or "--answer" in given else (files, texts)
    for name in wanted:
        if name not in given:
            raise UserError(f"{name} is missing: {name}={FLAGS[name]}")
    for name in other:
        if name in given:
            raise UserError(f"{wanted[0]} and {name} are two ways to ask: leave one of them out")
    size = given.get("--batch-size", "16")
    if not size.isdecimal() or int(size) < 1:
        raise UserError(f"--batch-size={size}: it has to be a number of at least 1")
    return models, given, int(size)


class _Callable(ModuleType):
    """`llm_jax.score(model, prompts, answers)` also where something has imported this door, which bears its name."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from llm_jax.jobs.answer_scores import score

        return score(*arguments, **options)


sys.modules[__name__].__class__ = _Callable


if __name__ == "__main__":
    sys.exit(run_door(main, sys.argv[1:]))
