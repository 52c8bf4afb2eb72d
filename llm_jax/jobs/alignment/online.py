"""Online DPO: a training whose pairs are what the policy says at that very step (Guo et al. 2024, arXiv:2402.04792).

A block is `sample_every` steps on one sampling: a chunk of the store, made before the block's first step and never
again. A run that is resumed within a block finds its pairs there, so that it repeats the uninterrupted one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from llm_jax.data.encode import encode_examples
from llm_jax.data.fitting import Counts, fit
from llm_jax.data.formats import read_examples
from llm_jax.data.rows import empty_row, fill_pair_row, pair_schema
from llm_jax.jobs.adapting import Adapting
from llm_jax.jobs.alignment.making import ChunkStore, PairMaker, prompt_seed
from llm_jax.jobs.alignment.policies import Policies
from llm_jax.jobs.alignment.prompts import Prompt
from llm_jax.jobs.config import RoundsConfig
from llm_jax.sharding import Plan, place_batch
from llm_jax.training import weights_in_use


class OnlineRows:
    """Rows of one pair each for every step (`fit.LiveRows`); those of prompts without a pair are empty.

    Args:
      config: of the job; `preference.train.batch_size` prompts are asked for each step.
      prompts: in the order in which they are asked; begun again at the end, with other seeds.
      store: of the blocks.
      maker: of the method.
      policies: samples.
      seed: of the round.
      adapting: the adapter that is trained in place of the model; the policy then is the model with it in its weights.
    """

    def __init__(
        self,
        config: RoundsConfig,
        prompts: Sequence[Prompt],
        store: ChunkStore,
        maker: PairMaker,
        policies: Policies,
        seed: int,
        adapting: Adapting | None = None,
    ):
        self._config, self._prompts, self._store = config, prompts, store
        self._maker, self._policies, self._seed = maker, policies, seed
        self._block: tuple[int, list[dict[str, np.ndarray]]] | None = None
        self._schema = pair_schema(config.data.window, 1, config.data.share_prompts)
        self._merged = None if adapting is None else jax.jit(adapting.merged)

    def __len__(self) -> int:
        return len(self._prompts)

    def indices(self, step: int) -> np.ndarray:
        """The numbers of the prompts of a step."""
        size = self._config.preference.train.batch_size
        return np.array([p.number for p in self._asked(step * size, size)])

    def iterate(self, start: int, stop: int, part: tuple[int, int] = (0, 1)) -> Iterator[dict[str, np.ndarray]]:
        """The number of each step, in place of its rows, which are made when the policy is there."""
        assert part == (0, 1), "the job runs in one process"
        train = self._config.preference.train
        shape = (train.microbatches, train.batch_size // train.microbatches)
        yield from ({"step": np.full(shape, step, np.int32)} for step in range(start, stop))

    def stepping(self, step: Callable[[Any, Any], Any], plan: Plan) -> Callable[[Any, Any], Any]:
        def run(state: Any, batch: dict[str, Any]) -> Any:
            number = int(np.asarray(batch["step"])[0, 0])
            return step(state, place_batch(self.rows(number, state), plan))

        return run

    def rows(self, step: int, state: Any) -> dict[str, np.ndarray]:
        """The rows of a step, `[microbatches, rows, ...]`; at the first one of a block the policy is asked."""
        train, every = self._config.preference.train, self._config.sample_every
        block, within = divmod(step, every)
        if self._block is None or self._block[0] != block:
            prompts = self._asked(block * every * train.batch_size, every * train.batch_size)
            seed = prompt_seed(self._seed, block, "block")
            made = self._store.obtain(
                block,
                lambda sampler: self._maker(prompts, sampler, seed),
                lambda: self._policies.with_params(self._policy(state)),
            )
            self._block = block, self._encoded(block, made.records)
        # Dealt out one by one, so that no step is left without.
        own = self._block[1][within::every]
        own = own + [empty_row(self._schema, self._policies.tokenizer.pad_id)] * (train.batch_size - len(own))
        shape = (train.microbatches, -1)
        return {name: np.stack([row[name] for row in own]).reshape(*shape, *own[0][name].shape) for name in own[0]}

    def _policy(self, state: Any) -> Mapping[str, Any]:
        trained = weights_in_use(state)
        return trained["policy"] if self._merged is None else self._merged(trained, state["frozen"])

    def _asked(self, first: int, count: int) -> list[Prompt]:
        return [self._prompts[(first + i) % len(self._prompts)] for i in range(count)]

    def _encoded(self, block: int, records: Sequence[dict[str, Any]]) -> list[dict[str, np.ndarray]]:
        """A row for each record that fits the window, as a set of them would be packed."""
        data, tokenizer, where = self._config.data, self._policies.tokenizer, str(self._store.file(block))
        examples = [(where, example) for record in records for example in read_examples("preference", record, where)]
        encoded = encode_examples("preference", examples, tokenizer)
        items = fit(encoded, data.window, data.on_long, Counts(), data.on_unusable, data.share_prompts)
        return [
            fill_pair_row(self._schema, [(number, item)], tokenizer.token_bytes, tokenizer.pad_id, 0)
            for number, item in enumerate(items)
        ]
