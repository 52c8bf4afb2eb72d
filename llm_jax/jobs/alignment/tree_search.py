"""MCTS-DPO's pairs: trees of many prompts are searched side by side, a call of the sampler expanding a node of each.

Xie et al. 2024 (arXiv:2405.00451): steps are drawn from the policy of the round's start; a node is worth its outcome,
the policy's own opinion of its steps, or both; the children that the search finds better and worse make the pairs.

Deviations of the authors' code, beside those that `TreeConfig` chooses: it shows the right answer to the policy where
it asks for its opinion, and divides that by the depth less 3; it draws twice as many steps from the root, and merges
steps that are alike by their embeddings, where here equal texts are one; pairs begin at their first token that differs,
which comes to the same, since a token that both have cancels.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llm_jax.data import chat
from llm_jax.data.tokenizers import Tokenizer
from llm_jax.inference.config import SamplingParams
from llm_jax.inference.generator import Completion
from llm_jax.jobs.alignment import tree
from llm_jax.jobs.alignment.making import Made, prompt_seed
from llm_jax.jobs.alignment.methods import is_truncated
from llm_jax.jobs.alignment.prompts import Prompt, step_record
from llm_jax.jobs.alignment.sampler import Sampler, encode
from llm_jax.jobs.alignment.scorers import Scorer
from llm_jax.jobs.alignment.tree import Node, Step
from llm_jax.jobs.alignment.tree_pairs import tree_pairs
from llm_jax.jobs.config import RoundsConfig

# Among so many of the likeliest next tokens a yes or a no is looked for.
OPINIONS = 20
COUNTS = ("samples", "tokens", "truncated", "skipped", "scored", "score_sum", "nodes", "without_pair")

Expansion = tuple[int, Node]
"""Which of the chunk's trees, and the node of it that is to be expanded."""


class TreePairs:
    """The maker of `method=mcts_dpo`."""

    def __init__(self, config: RoundsConfig, tokenizer: Tokenizer, scorer: Scorer | None):
        assert scorer is not None or config.tree.value == "self", "the job opens the scorer of what is scored"
        self.config, self.tokenizer, self.scorer = config, tokenizer, scorer

    def __call__(self, chunk: Sequence[Prompt], sampler: Sampler, seed: int) -> Made:
        counts: dict[str, float] = dict.fromkeys(COUNTS, 0)
        roots = [tree.root() for _ in chunk]
        searches = [tree.search(root, self.config.tree) for root in roots]
        skipped: set[int] = set()
        waiting = [(number, node) for number, one in enumerate(searches) if (node := next(one, None)) is not None]
        while waiting:
            children = self._children(chunk, waiting, sampler, seed, skipped, counts)
            going = []
            for (number, node), steps in zip(waiting, children, strict=True):
                tree.expand(node, steps)
                if number not in skipped and (following := next(searches[number], None)) is not None:
                    going.append((number, following))
            waiting = going
        counts["skipped"] = len(skipped)
        kept = [(prompt, root) for i, (prompt, root) in enumerate(zip(chunk, roots, strict=True)) if i not in skipped]
        records, notes = [], []
        for prompt, root in kept:
            own = self._records(prompt, root)
            counts["nodes"] += sum(1 for _ in tree.every_node(root))
            counts["without_pair"] += not own
            records += own
            notes.append({"prompt": _shown(prompt), "answer": prompt.answer, "tree": tree.as_json(root)})
        return Made(records, counts, notes)

    def _records(self, prompt: Prompt, root: Node) -> list[dict[str, Any]]:
        records = []
        for pair in tree_pairs(root, self.config.tree):
            chosen, rejected = pair.chosen, pair.rejected
            assert chosen.parent is not None
            columns = {"chosen_score": chosen.quality, "rejected_score": rejected.quality}
            if self.config.tree.smoothing != "none":
                columns["label_smoothing"] = pair.label_smoothing
            ends = (chosen.step.ended, rejected.step.ended)
            steps = (chosen.step.text, rejected.step.text)
            records.append(step_record(prompt, chosen.parent.text, *steps, ends, **columns))
        return records

    def _children(
        self,
        chunk: Sequence[Prompt],
        waiting: Sequence[Expansion],
        sampler: Sampler,
        seed: int,
        skipped: set[int],
        counts: dict[str, float],
    ) -> list[list[Step]]:
        """The steps that follow each node, drawn in one call and valued in another."""
        config, drop = self.config, self.config.pairs.truncated == "drop"
        ids = [encode(self.tokenizer, chunk[number], node.text) for number, node in waiting]
        params = [self._params(chunk[number], node, seed) for number, node in waiting]
        drawn: list[list[Step]] = [[] for _ in waiting]
        for done in sampler.generate(ids, params):
            counts["samples"] += 1
            counts["tokens"] += len(done.tokens)
            counts["truncated"] += is_truncated(done)
            if not done.text.strip() or (drop and is_truncated(done)):
                continue
            step = self._step(done, params[done.prompt], full=len(ids[done.prompt]) + len(done.tokens))
            if step.text not in [other.text for other in drawn[done.prompt]]:
                drawn[done.prompt].append(step)
        answers = [
            [node.text + step.text for step in steps if step.terminal]
            for (_, node), steps in zip(waiting, drawn, strict=True)
        ]
        opinions = [[0.0] * len(steps) for steps in drawn]
        if config.tree.value != "outcome":
            opinions = self._opinions(chunk, waiting, drawn, sampler)
        outcomes = [iter(()) for _ in drawn]
        if self.scorer is not None:
            asked = [i for i, texts in enumerate(answers) if texts]
            scores = self.scorer([chunk[waiting[i][0]] for i in asked], [answers[i] for i in asked])
            for i, found in zip(asked, scores, strict=True):
                if found is None:
                    skipped.add(waiting[i][0])
                    continue
                counts["scored"] += len(found)
                counts["score_sum"] += float(found.sum())
                outcomes[i] = iter((2 * found - 1 if config.scorer.kind == "answer" else found).tolist())
        return [
            [
                replace(step, value=opinion + (next(own, 0.0) if step.terminal else 0.0))
                for step, opinion in zip(steps, said, strict=True)
            ]
            for steps, said, own in zip(drawn, opinions, outcomes, strict=True)
        ]

    def _params(self, prompt: Prompt, node: Node, seed: int) -> SamplingParams:
        """Of the last step a tree may have nothing but the answer's end is the end."""
        last = node.depth + 1 >= self.config.tree.depth
        stop = () if last else (self.config.tree.separator,)
        return replace(self.config.sampling, stop=stop, seed=prompt_seed(seed, prompt.number, node.text))

    def _step(self, done: Completion, params: SamplingParams, full: int) -> Step:
        """A step, not valued yet. It ends its answer where no separator closed it; one as long as a row has no room to
        go on."""
        closed = bool(params.stop) and not is_truncated(done) and params.stop[0] in self.tokenizer.decode(done.tokens)
        text = done.text + params.stop[0] if closed else done.text
        ended = not closed and not is_truncated(done)
        terminal = not closed or full >= self.config.data.window
        return Step(text, sum(done.logprobs), len(done.tokens), 0.0, terminal, ended)

    def _opinions(
        self, chunk: Sequence[Prompt], waiting: Sequence[Expansion], drawn: Sequence[Sequence[Step]], sampler: Sampler
    ) -> list[list[float]]:
        """How likely the policy says yes rather than no to its steps; 0 where neither is among the likeliest tokens."""
        asked = [
            self._asking(chunk[number], node.text + step.text)
            for (number, node), steps in zip(waiting, drawn, strict=True)
            for step in steps
        ]
        if not asked:
            return [[] for _ in drawn]
        params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=OPINIONS)
        said = iter([self._yes(done) for done in sampler.generate(asked, params)])
        return [[next(said) for _ in steps] for steps in drawn]

    def _asking(self, prompt: Prompt, text: str) -> list[int]:
        question = self.config.tree.question
        if isinstance(prompt.content, str):
            return self.tokenizer.encode(f"{prompt.content}{text}\n{question}\n", add_special_tokens=True)
        turns = ({"role": "assistant", "content": text}, {"role": "user", "content": question})
        return chat.render(self.tokenizer, (*prompt.content, *turns), add_generation_prompt=True)[0]

    def _yes(self, done: Completion) -> float:
        likely = {"yes": 0.0, "no": 0.0}
        for token, logprob in done.top_logprobs[0]:
            word = self.tokenizer.decode([token]).strip().casefold()
            if word in likely:
                likely[word] += math.exp(logprob)
        total = sum(likely.values())
        return likely["yes"] / total if total else 0.0


def _shown(prompt: Prompt) -> str:
    return prompt.content if isinstance(prompt.content, str) else "\n".join(m["content"] for m in prompt.content)
