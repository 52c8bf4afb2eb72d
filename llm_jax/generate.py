"""`python -m llm_jax.generate MODEL --prompt "..."`: an answer from a model, a file of them, or a conversation."""

import argparse
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llm_jax.base.door import run_door
from llm_jax.base.errors import UserError
from llm_jax.base.logging import log
from llm_jax.base.nearest import nearest
from llm_jax.inference.config import SamplingParams

if TYPE_CHECKING:
    from llm_jax.data.tokenizers import Tokenizer
    from llm_jax.inference.generator import Generator
    from llm_jax.jobs.generate import TokenIds

SAMPLING = {
    "max_tokens": "new tokens at most",
    "temperature": "divides the logits; 0 is greedy",
    "top_p": "keep the likeliest tokens up to this total probability",
    "top_k": "keep the k likeliest tokens; 0 keeps all",
    "min_p": "drop tokens less likely than this share of the likeliest",
    "repetition_penalty": "above 1 discourages repeating tokens",
    "n": "samples",
    "seed": "equal seeds give equal samples",
    "logprobs": "show this many of the likeliest tokens at each place, with log-probabilities",
}
"""Fields of `SamplingParams` that are options by the same name."""
MODES = ("prompt", "prompt_ids", "input", "chat")


class Parser(argparse.ArgumentParser):
    """One line and status 2 for every mistake."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse_all(self, argv: list[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            guess = nearest(flag, known)
            raise UserError(f"unknown argument {flag}" + (f"; the nearest is {guess}" if guess else ""))
        # Not argparse's `required` and exclusive groups: a misspelt --prompt would be reported as a missing one.
        modes = [f"--{name.replace('_', '-')}" for name in MODES if hasattr(args, name)]
        if not modes:
            raise UserError(
                "--prompt is missing: the text to answer or continue, or - for stdin (or --prompt-ids, --input, --chat)"
            )
        if len(modes) > 1:
            raise UserError(f"{modes[0]} and {modes[1]} are two ways to ask: leave one of them out")
        only = {"output": "--input", "system": "--chat"}
        for name, mode in only.items():
            if hasattr(args, name) and mode != modes[0]:
                raise UserError(f"--{name} goes with {mode} only")
        if modes[0] == "--input" and not hasattr(args, "output"):
            raise UserError("--output is missing: the file for the answers to --input")
        if modes[0] != "--input" and len(getattr(args, "adapter", ())) > 1:
            raise UserError(f"{modes[0]} takes one --adapter: the prompts of --input choose among several")
        for name in {"--chat": ("stream", "raw", "n", "logprobs"), "--input": ("stream",)}.get(modes[0], ()):
            if hasattr(args, name):
                raise UserError(f"--{name} does not go with {modes[0]}")
        return args


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m llm_jax.generate",
        description="Samples from a Hugging Face folder or a workdir. The model's chat template is put around the "
        "prompt where it has one. Sampling options that are not given come from the model's generation_config.json, "
        "then from the defaults below.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hugging Face folder, native folder or workdir")
    add(
        "--adapter",
        action="append",
        metavar="NAME=FOLDER",
        help="an adapter on the model: a PEFT folder, or the workdir of a run that trained one; repeatable, and each "
        "prompt of --input then has an `adapter`, one of the names or null for the model alone",
    )
    add("--prompt", metavar="TEXT", help="text to answer or continue; - reads stdin")
    add("--prompt-ids", metavar="IDS", help="the same as token ids, with nothing around them: '1 2 3'")
    add("--input", metavar="FILE", help="JSONL of `prompt` (text or messages), `messages` or `prompt_ids`")
    add(
        "--output",
        metavar="FILE",
        help="JSONL of the answers to --input as they come; those it has are not made again",
    )
    add("--chat", action="store_true", help="a conversation in the terminal; /help lists its commands")
    add("--system", metavar="TEXT", help="system prompt of --chat")
    add("--raw", action="store_true", help="give the prompt to the model as it is, without chat template")
    for name, text in SAMPLING.items():
        default = getattr(SamplingParams(), name)
        add(f"--{name.replace('_', '-')}", type=type(default), help=f"{text} (default: {default})")
    add("--stop", action="append", metavar="STR", help="string that ends the output; repeatable")
    add("--ignore-eos", action="store_true", help="go on after an end token")
    add("--no-generation-config", action="store_true", help="leave the model's generation_config.json aside")
    choices = ("float32", "bfloat16")
    add("--dtype", choices=choices, help="of weights, caches and computation (default: float32)")
    add("--stream", action=argparse.BooleanOptionalAction, help="print text as it comes (default: for a single sample)")
    return parser


def main(argv: list[str]) -> None:
    args = make_parser().parse_all(argv)
    given: dict[str, Any] = {name: value for name, value in vars(args).items() if name in (*SAMPLING, "ignore_eos")}
    if hasattr(args, "stop"):
        given["stop"] = tuple(args.stop)
    stream = getattr(args, "stream", given.get("n", 1) == 1)
    if stream and given.get("n", 1) > 1:
        raise UserError(f"--stream shows one sample, --n is {args.n}: leave one of them out")
    from llm_jax.inference.requests import check_sampling

    check_sampling(SamplingParams(**given))
    adapters = read_adapters(getattr(args, "adapter", ()))
    content = read_ids(args.prompt_ids) if hasattr(args, "prompt_ids") else ""
    if hasattr(args, "prompt"):
        content = read_prompt(args.prompt)

    from llm_jax.adapters.loading import check_adapter
    from llm_jax.inference.generation_config import FILE, GenerationDefaults, read_generation_config
    from llm_jax.inference.generator import Generator
    from llm_jax.inference.requests import check_prompt
    from llm_jax.jobs.adapted import open_adapted
    from llm_jax.jobs.external import check_external
    from llm_jax.jobs.generate import Prompt, encode_prompt, file_prompts, open_model

    source, tokenizer = open_model(args.model, "MODEL")
    check_external(source.path)
    for folder in adapters.values():
        check_adapter(folder, source.model)
    defaults = GenerationDefaults()
    if not hasattr(args, "no_generation_config"):
        defaults = read_generation_config(source.tokenizer)
    defaults = defaults.under(given)
    params = SamplingParams(**{**defaults.sampling, **given})
    check_sampling(params)
    if str(defaults):
        log(f"from {source.tokenizer / FILE}: {defaults}")
    raw, dtype = hasattr(args, "raw"), getattr(args, "dtype", "float32")
    if hasattr(args, "input"):
        prompts = file_prompts(args.input, None, tuple(adapters))
    else:
        prompts = [Prompt("the prompt", content, adapter=next(iter(adapters), None))]
    by_row = len({prompt.adapter for prompt in prompts}) > 1
    ids = [] if hasattr(args, "chat") else [encode_prompt(tokenizer, prompt.content, raw) for prompt in prompts]
    # Before the weights are read: what is wrong with the prompts.
    for prompt, tokens in zip(prompts, ids):
        check_prompt(tokens, prompt.where, source.model.max_position_embeddings, tokenizer.vocab_size)
    each = [defaults.fitted(params, len(tokens), prompt.where) for prompt, tokens in zip(prompts, ids)]

    def open_generator() -> Generator:
        model = open_adapted(args.model, adapters, [prompt.adapter for prompt in prompts], dtype)
        rows = 32 * params.n if hasattr(args, "input") else params.n
        return Generator(model, tokenizer, max_batch=rows, stop_ids=defaults.end_ids)

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    if hasattr(args, "chat"):
        from llm_jax.inference.session import Session
        from llm_jax.jobs.chat import Chat

        conversation = Chat(
            tokenizer, params, defaults, source.model.max_position_embeddings, getattr(args, "system", None)
        )
        conversation.run(Session(open_generator()))
    elif hasattr(args, "input"):
        from llm_jax.jobs.prompt_file import OutputFile, answer_prompts, settings_hash

        of: dict[str, Any] = {"model": str(source.path.resolve()), "raw": raw, "dtype": dtype}
        if adapters:
            of["adapters"] = {name: str(Path(folder).resolve()) for name, folder in adapters.items()}
        settings = settings_hash(params, defaults=str(defaults), **of)
        with OutputFile(args.output, prompts, settings) as output:
            answer_prompts(open_generator, tokenizer, prompts, ids, each, output, by_row)
    else:
        answer(open_generator(), tokenizer, ids[0], each[0], stream, f"{dtype}, n={params.n}")


def answer(
    generator: "Generator", tokenizer: "Tokenizer", ids: list[int], params: SamplingParams, stream: bool, how: str
) -> None:
    """Prints the answers to one prompt, and the log-probabilities of their tokens where they are asked for."""
    from llm_jax.jobs.token_table import token_table

    per_token, total = generator.cache_bytes([len(ids)], params)
    log(f"cache: {per_token:,} bytes per token, {total:,} bytes in all ({how})")
    began, tables, count = time.perf_counter(), [], 0
    if stream:
        tokens, logprobs, tops = [], [], []
        for delta in generator.stream([ids], params):
            print(delta.text, end="", flush=True)
            tokens, logprobs, tops = tokens + delta.tokens, logprobs + delta.logprobs, tops + delta.top_logprobs
        print()
        count = len(tokens)
        tables.append((tokens, logprobs, tops))
    else:
        for done in generator.generate([ids], params):
            print(f"--- sample {done.sample} ({done.finish_reason})\n{done.text}" if params.n > 1 else done.text)
            count += len(done.tokens)
            tables.append((done.tokens, done.logprobs, done.top_logprobs))
    seconds = time.perf_counter() - began
    for number, table in enumerate(tables if params.logprobs else []):
        print(f"\n--- tokens of sample {number}" if params.n > 1 else "")
        print(token_table(tokenizer, *table))
    log(f"{count} tokens in {seconds:.2f} s, compilation included ({len(ids)} tokens of prompt)")


def read_prompt(text: str) -> str:
    """The prompt itself, or stdin for `-`. Raises UserError for an empty one and for bytes that are not UTF-8."""
    if text == "-":
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"the prompt on stdin is not UTF-8 (byte {error.start})") from None
    if not text:
        raise UserError("the prompt is empty")
    return text


def read_ids(text: str) -> "TokenIds":
    """Token ids between spaces or commas. Raises UserError for anything else, and for none."""
    from llm_jax.jobs.generate import TokenIds

    words = text.replace(",", " ").split()
    for word in words:
        if not word.isascii() or not word.isdigit():
            raise UserError(f"--prompt-ids: {word!r} is not a token id")
    if not words:
        raise UserError("--prompt-ids has no ids")
    return TokenIds(int(word) for word in words)


def read_adapters(given: Sequence[str]) -> dict[str, str]:
    """Folders by name. Raises UserError for what is no `NAME=FOLDER`, and for a name that comes twice."""
    found: dict[str, str] = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise UserError(f"--adapter {text}: expected NAME=FOLDER")
        if name in found:
            raise UserError(f"--adapter {text}: {name} is {found[name]} already")
        found[name] = folder
    return found


if __name__ == "__main__":
    sys.exit(run_door(main, sys.argv[1:]))
