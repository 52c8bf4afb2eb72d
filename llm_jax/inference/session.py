"""A conversation's caches, kept from answer to answer: of each new prompt only what is new is run."""

from collections.abc import Generator as Stream
from collections.abc import Sequence

import jax

from llm_jax.base.errors import UserError
from llm_jax.inference.batch import Batch, Past
from llm_jax.inference.config import SamplingParams
from llm_jax.inference.generator import Delta, Generator, deltas
from llm_jax.models.rope import turning_length


class Session:
    """One row of a generator's, from prompt to prompt.

    The longest common beginning of a prompt and of what the caches hold is not run again; of a prefix language model
    all is, since each token of a longer prompt sees more. Answers are those of `Generator.stream`, but for the order of
    the arithmetic.
    """

    def __init__(self, generator: Generator):
        if generator.plan is not None and generator.plan.mesh.shape["data"] > 1:
            raise UserError("a session has one row: it needs a mesh with data=1")
        self.generator = generator
        self.reused = 0
        """Tokens of the last prompt that were in the caches."""
        self._past: Past | None = None

    def stream(self, ids: Sequence[int], params: SamplingParams, every: int = 4) -> Stream[Delta]:
        """One answer to a prompt, as `Generator.stream` gives it. It may be left at any point.

        Raises UserError as `Generator.generate`.
        """
        g = self.generator
        (row,) = g.rows([ids], params)
        past, self._past = self._usable(list(ids)), None
        self.reused = 0 if past is None else len(past.tokens)
        batch = Batch(g, [row], 1, *g.shape([row]), past)
        try:
            yield from deltas(batch.outputs(min(every, g.chunk), live=True))
        finally:
            self._keep(batch)

    def _usable(self, ids: list[int]) -> Past | None:
        """What of the caches the prompt begins with; its last token is always run, for its logits."""
        if self._past is None:
            return None
        held, count = self._past.tokens, 0
        while count < min(len(held), len(ids) - 1) and held[count] == ids[count]:
            count += 1
        # A full ring has lost the tokens that come before the one it would be cut back to; a state goes back to none.
        window = self.generator.config.window
        ringed = window is not None and len(held) > window
        cut_short = count < len(held) and (ringed or self.generator.config.mamba.inner_size > 0)
        turn = turning_length(self.generator.config)
        turned = turn is not None and (len(held) <= turn) != (len(ids) <= turn)
        if not count or cut_short or turned:
            return None
        return Past(self._past.caches, self._past.slots, held[:count])

    def _keep(self, batch: Batch) -> None:
        """The batch's caches with the tokens they hold for certain, unless an interruption came between them."""
        caches, (out,) = batch.caches, batch.results
        if caches is None or any(leaf.is_deleted() for leaf in jax.tree.leaves(caches)):
            return
        if self.generator.config.prefix_lm:  # A longer prompt is read anew from both sides.
            return
        # The newest token is in no cache yet. An interruption, or a stop string inside of a chunk, leaves later ones
        # in the caches: a row of slots forgets them, a ring has lost others to them, a state holds them for good.
        held = [*out.row.ids, *out.tracker.tokens, *out.pending][: int(batch.filled[0])]
        exact = out.reason is not None and len(held) == int(batch.filled[0])
        config = self.generator.config
        if exact or (config.window is None and not config.mamba.inner_size):
            self._past = Past(caches, batch.size, held)
