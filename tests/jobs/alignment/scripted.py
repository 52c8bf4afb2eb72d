"""A policy that says what a test wants, and a tokenizer for it."""

from collections.abc import Callable, Sequence

from llm_jax.data.chat import with_template
from llm_jax.data.config import EmbeddedConfig
from llm_jax.data.embedded.problems import stories
from llm_jax.data.tokenizer_training import train_bpe
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.inference.config import SamplingParams
from llm_jax.inference.generator import Completion

OPENED = "<|im_start|>assistant\n"


def small_tokenizer() -> Tokenizer:
    texts = [record["text"] for record in stories(EmbeddedConfig(records=64), "train")]
    return with_template(train_bpe(texts, 400), "chatml")


class Scripted:
    """A sampler whose `reply` to (the answer so far, the sample's number) is whole answers' rests; it keeps to
    `max_tokens` and stop strings as a Generator does, and counts calls and rows."""

    def __init__(self, tokenizer: Tokenizer, reply: Callable[[str, int], str]):
        self.tokenizer, self.reply = tokenizer, reply
        self.calls: list[int] = []
        self.seeds: list[int] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        self.calls.append(len(prompts))
        self.seeds += [one.seed for one in each]
        return [
            self._completion(i, sample, list(ids), own)
            for i, (ids, own) in enumerate(zip(prompts, each, strict=True))
            for sample in range(own.n)
        ]

    def _completion(self, prompt: int, sample: int, ids: list[int], params: SamplingParams) -> Completion:
        assert self.tokenizer.eos_id is not None
        text = self.reply(self.tokenizer.decode(ids).rpartition(OPENED)[2], sample)
        stop = next((s for s in params.stop if s in text), None)
        shown = text if stop is None else text[: text.index(stop)]
        tokens = self.tokenizer.encode(shown + (stop or "")) + ([] if stop else [self.tokenizer.eos_id])
        reason = "stop"
        if len(tokens) > params.max_tokens:
            tokens, reason = tokens[: params.max_tokens], "length"
            shown = self.tokenizer.decode(tokens)
        top = [[(token, -0.5)] for token in tokens] if params.logprobs else []
        return Completion(prompt, sample, tokens, shown, reason, [-0.5] * len(tokens), top)
