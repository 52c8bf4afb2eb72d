"""What can be told about records before anything is made: whether each can be read, rendered, and fits its window."""

import itertools
from collections.abc import Iterator, Sequence

from llm_jax.base.errors import UserError
from llm_jax.base.progress import Progress
from llm_jax.data.chat import with_template
from llm_jax.data.config import DataConfig
from llm_jax.data.corpus import Located, check, check_packing, numbered_examples, parts, readers
from llm_jax.data.encode import encode_examples
from llm_jax.data.examples import Conversation, Example, Kind, Pair, Text
from llm_jax.data.fitting import Counts, fit
from llm_jax.data.holdout import held_out_below
from llm_jax.data.judged import Labelled, Ranking, Steps
from llm_jax.data.sources import read_records
from llm_jax.data.stepwise import StepPair
from llm_jax.data.templating import assistant_spans, load_template, refuse_lost, render_marked
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.data.turns import Messages, Tools

EMBEDDED_CHECKED = 512


def check_records(kind: Kind, data: DataConfig) -> None:
    """Reads every record of local data, and renders it where the template is known without a checkpoint.

    Raises:
      UserError: names the file and line of the first record that cannot be used.
    """
    check(data)
    check_packing(kind, data)
    template = None if data.chat_template is None or kind == "pretrain" else load_template(data.chat_template)
    if template is None and data.path is None and not data.mixture:
        return
    for located in every_example(kind, data):
        if template is not None:
            _check_rendering(template, *located)


def every_example(kind: Kind, data: DataConfig) -> Iterator[Located]:
    """Every record of local data once, of both sides; of embedded data, which are all of a kind, the first few.

    Raises:
      UserError: a record cannot be used, or nothing could be held out.
    """
    with Progress("checking records") as progress:
        for one in parts(data).values():
            if one.path is None:
                for read in [r for side in ("train", "eval") for r in readers(kind, one, side).values()]:
                    yield from ((where, example) for _, where, example in itertools.islice(read(0), EMBEDDED_CHECKED))
                continue
            if one.eval_path is None:
                held_out_below(one.path, one.max_records, one.eval_fraction)
            for path, limit in ((one.path, one.max_records), (one.eval_path, None)):
                records = read_records(path, limit) if path is not None else ()
                for number, where, example in numbered_examples(kind, enumerate(records), one.unpair):
                    progress.update(records=number)
                    yield where, example


def check_lengths(kind: Kind, data: DataConfig, tokenizer: Tokenizer) -> None:
    """Encodes every record of local data, for a tokenizer that is known before anything is trained.

    Of embedded data, which are all of a kind, it takes the first few.

    Raises:
      UserError: the first record that the template refuses or that is too long for the window.
    """
    if kind == "pretrain":
        return
    tokenizer = with_template(tokenizer, data.chat_template)
    encoded = encode_examples(kind, every_example(kind, data), tokenizer)
    whole = data.packing == "concat_split"
    for _ in encoded if whole else fit(encoded, data.window, data.on_long, Counts(), data.on_unusable):
        pass


def check_numbers(data: DataConfig, columns: Sequence[str], loss: str) -> None:
    """Raises UserError, naming file and line, for the first pair that lacks a number which `loss` takes, or whose
    number is no probability."""
    if not columns:
        return
    if data.path is None and not data.mixture:
        raise UserError(f"loss_type={loss} needs `{columns[0]}` of every pair, which embedded data do not have")
    for where, example in every_example("preference", data):
        for name in columns:
            if not isinstance(example, Pair | StepPair) or name not in example.numbers:
                raise UserError(f"{where}: loss_type={loss} needs `{name}`, which the record does not have")
            if not 0 <= example.numbers[name] <= 1:
                raise UserError(
                    f"{where}: `{name}` is {example.numbers[name]:g}; loss_type={loss} takes it for a probability to"
                    " win, in [0, 1]"
                )


def check_classes(kind: Kind, data: DataConfig, count: int) -> None:
    """Raises UserError, naming file and line, for the first label that is not below `count`."""
    if data.path is None and not data.mixture:
        return
    for where, example in every_example(kind, data):
        labels = example.labels if isinstance(example, Steps) else (getattr(example, "label", 0),)
        if (most := max(labels)) >= count:
            raise UserError(f"{where}: label {most} is out of range: num_labels={count} knows 0 to {count - 1}")


def _check_rendering(template: str, where: str, example: Example) -> None:
    # Any names will do: what is checked is whether the template takes the messages and shows the answers.
    variables = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    try:
        inner = example.example if isinstance(example, Labelled) else example
        if isinstance(inner, Conversation):
            specials = tuple(variables.values())
            assistant_spans(template, inner.messages, variables, specials, inner.tools, inner.learned)
            return
        for prompt, answer, tools in _turns(example):
            refuse_lost(template, (*prompt, *answer), variables, tools)
            opened, _ = render_marked(template, prompt, variables, add_generation_prompt=True, tools=tools)
            whole, _ = render_marked(template, (*prompt, *answer), variables, tools=tools)
            if opened.startswith(whole):
                raise UserError("chat template: it leaves out the assistant's answer (an all-zero loss mask)")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _turns(example: Example) -> list[tuple[Messages, Messages, Tools]]:
    if isinstance(example, Labelled):
        return _turns(example.example)
    if isinstance(example, Text | Conversation) or isinstance(example.prompt, str):
        return []
    if isinstance(example, Ranking):
        return [(example.prompt, answer, example.tools) for answer in example.answers]  # pyright: ignore[reportReturnType]
    if isinstance(example, Steps):
        return [(example.prompt, ({"role": "assistant", "content": "".join(example.steps)},), example.tools)]
    if isinstance(example, StepPair):
        answers = [({"role": "assistant", "content": example.prefix + s},) for s in (example.chosen, example.rejected)]
    else:
        answers = (example.chosen, example.rejected) if isinstance(example, Pair) else (example.completion,)
    return [(example.prompt, answer, example.tools) for answer in answers]  # pyright: ignore[reportReturnType]
