"""`python -m llm_jax.generate MODEL --prompt "..."`: text from a model, in the terminal."""

import argparse
import io
import sys
import time
from typing import NoReturn

from llm_jax.base.door import run_door
from llm_jax.base.errors import UserError
from llm_jax.base.logging import log
from llm_jax.base.nearest import nearest
from llm_jax.inference.config import SamplingParams


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
        # Not argparse's `required`: a misspelt --prompt would be reported as a missing one.
        if not hasattr(args, "prompt"):
            raise UserError("--prompt is missing: the text to answer or continue, or - for stdin")
        return args


def make_parser() -> Parser:
    d = SamplingParams()
    parser = Parser(
        prog="python -m llm_jax.generate",
        description="Samples from a Hugging Face folder or a workdir. The model's chat template is put around the "
        "prompt where it has one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hugging Face folder, native folder or workdir")
    add("--prompt", default=argparse.SUPPRESS, help="text to answer or continue; - reads stdin")
    add("--raw", action="store_true", help="give the prompt to the model as it is, without chat template")
    add("--max-tokens", type=int, default=d.max_tokens, help="new tokens at most")
    add("--temperature", type=float, default=d.temperature, help="divides the logits; 0 is greedy")
    add("--top-p", type=float, default=d.top_p, help="keep the likeliest tokens up to this total probability")
    add("--top-k", type=int, default=d.top_k, help="keep the k likeliest tokens; 0 keeps all")
    add("--min-p", type=float, default=d.min_p, help="drop tokens less likely than this share of the likeliest")
    add("--repetition-penalty", type=float, default=d.repetition_penalty, help="above 1 discourages repeating tokens")
    add("--n", type=int, default=d.n, help="samples")
    add("--seed", type=int, default=d.seed, help="equal seeds give equal samples")
    add("--stop", action="append", default=[], metavar="STR", help="string that ends the output; repeatable")
    add("--ignore-eos", action="store_true", help="go on after an end token")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of weights, caches and computation")
    add(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="print text as it comes (default: for a single sample)",
    )
    return parser


def main(argv: list[str]) -> None:
    args = make_parser().parse_all(argv)
    stream = getattr(args, "stream", args.n == 1)
    if stream and args.n > 1:
        raise UserError(f"--stream shows one sample, --n is {args.n}: leave one of them out")
    fields = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n", "seed", "ignore_eos")
    params = SamplingParams(**{name: getattr(args, name) for name in fields}, stop=tuple(args.stop))

    from llm_jax.inference.requests import check_sampling

    check_sampling(params)
    prompt = read_prompt(args.prompt)

    from llm_jax.inference.generator import Generator
    from llm_jax.inference.requests import check_prompt
    from llm_jax.jobs.generate import encode_prompt, end_ids, open_model
    from llm_jax.models.loading import load

    source, tokenizer = open_model(args.model, "MODEL")
    ids = encode_prompt(tokenizer, prompt, args.raw)
    # Before the weights are read: what is wrong with the prompt.
    check_prompt(ids, "the prompt", source.model.max_position_embeddings, tokenizer.vocab_size)
    model = load(args.model, dtype=args.dtype)
    generator = Generator(model, tokenizer, max_batch=params.n, stop_ids=end_ids(source.tokenizer))
    per_token, total = generator.cache_bytes([len(ids)], params)
    log(f"cache: {per_token:,} bytes per token, {total:,} bytes in all ({args.dtype}, n={params.n})")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    began, count = time.perf_counter(), 0
    if stream:
        for delta in generator.stream([ids], params):
            print(delta.text, end="", flush=True)
            count += len(delta.tokens)
        print()
    else:
        for done in generator.generate([ids], params):
            print(f"--- sample {done.sample} ({done.finish_reason})\n{done.text}" if params.n > 1 else done.text)
            count += len(done.tokens)
    seconds = time.perf_counter() - began
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


if __name__ == "__main__":
    sys.exit(run_door(main, sys.argv[1:]))
