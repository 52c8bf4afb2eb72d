"""What fields and files tell of a job of rounds before anything is sampled, and the configuration of a round."""

import importlib.util
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llm_jax.adapters.adapters import Adapters
from llm_jax.adapters.merging import merged_config
from llm_jax.adapters.sites import Adaptation
from llm_jax.base.errors import UserError
from llm_jax.data.tokenizers import Tokenizer, load_tokenizer
from llm_jax.inference.requests import check_prompt, check_sampling
from llm_jax.jobs.alignment.evaluation import held_out
from llm_jax.jobs.alignment.methods import METHODS, Method, scored
from llm_jax.jobs.alignment.prompts import read_prompts, training_prompts
from llm_jax.jobs.alignment.sampler import encode
from llm_jax.jobs.alignment.scorers import check_scorer
from llm_jax.jobs.alignment.step_checks import STEPWISE, check_steps
from llm_jax.jobs.config import PairsConfig, PreferenceConfig, RoundsConfig, ScorerConfig, TaskEvalConfig
from llm_jax.jobs.origin import Origin, check_tokenizer, origin
from llm_jax.jobs.preference import checked_loss
from llm_jax.jobs.setup import check_shapes, check_training
from llm_jax.models import Decoder
from llm_jax.models.families.heads import PAIRWISE
from llm_jax.objectives.preference.named import LOSSES
from llm_jax.sharding import check_divides, make_plan
from llm_jax.storage.hashes import file_sha256
from llm_jax.training.loop import check_least

if TYPE_CHECKING:
    from etils import epath

    from llm_jax.jobs.graph import Node

LEAST = {"rounds": 1, "prompts_per_round": 1, "chunk": 1, "sample_every": 1, "keep_rounds": 0, "batch_size": 1}
LOOPS_OWN = ("job", "init_from", "reference", "data", "mesh", "task_eval")
"""Fields of a round's training that the loop sets."""


def round_config(config: RoundsConfig, policy: str | None, pairs: "epath.Path | None" = None) -> PreferenceConfig:
    """The training of a round, from a policy, on its pairs; before there are any, on embedded ones, to be checked."""
    path = None if pairs is None else str(pairs)
    data = replace(config.data, path=path, eval_path=None, max_records=None, embedded="problems")
    checkpoint = replace(config.preference.train.checkpoint, export=False)
    train = replace(config.preference.train, checkpoint=checkpoint)
    own = {"init_from": policy, "data": data, "train": train, "mesh": config.mesh}
    return replace(config.preference, **own, task_eval=TaskEvalConfig(problems=0))


def check_rounds(node: "Node") -> None:
    """Raises UserError for whatever is wrong with a configuration, its prompts, or the models it names."""
    config: RoundsConfig = node.config
    if config.init_from is None:
        raise UserError("init_from is not set: rounds needs a policy to begin with")
    for name, least in LEAST.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")
    if not 0 <= config.seed < 2**63:
        raise UserError(f"seed is {config.seed}; it must be between 0 and 2**63 - 1")
    method = METHODS[config.method]
    _check_method(config, method)
    _check_sampling(config, method)
    _check_pairs(config)
    check_steps(config)
    check_least(config.task_eval, "task_eval", {"problems": 0, "max_tokens": 1, "samples": 0})
    _check_training(node)
    prompts = [*training_prompts(config), *read_prompts(config.data, "eval")]
    checked = method.answers or (scored(config) and config.scorer.kind == "answer")
    wanted = (("answer", checked), ("written", method.written))
    for name, needed in wanted:
        lacking = next((prompt for prompt in prompts if needed and getattr(prompt, name) is None), None)
        if lacking is not None:
            what = "an `answer` to check against" if name == "answer" else "an answer that is preferred"
            raise UserError(f"{lacking.where}: the prompt comes without {what}")
    held_out(config)
    for field, parent in node.parents.items():
        if not hasattr(parent, "workdir"):
            source = origin(parent, field)
            if field == "init_from":
                check_shapes(round_config(config, config.init_from), make_plan(config.mesh), source.model)
                check_texts(node, source, load_tokenizer(source.tokenizer))
            else:
                check_judge(source, config.method)


def check_texts(node: "Node", source: Origin, tokenizer: Tokenizer) -> None:
    """Raises UserError for prompts that leave the model no room, and for what else its architecture tells."""
    config: RoundsConfig = node.config
    source.model.check_predicts("init_from")
    check_tokenizer(source.model, tokenizer.vocab_size, "init_from")
    model = source.model.resolved()
    check_divides(make_plan(config.mesh), model.cut_sizes())
    training = training_prompts(config)
    for number, prompt in enumerate([*training, *held_out(config)]):
        ids = encode(tokenizer, prompt)
        check_prompt(ids, prompt.where, model.max_position_embeddings, tokenizer.vocab_size)
        if number < len(training) and config.data.on_long == "error":
            _check_room(config, prompt.where, len(ids))
    if "scorer.model" in node.parents:
        check_judge(origin(node.parents["scorer.model"], "scorer.model"), config.method)
    if config.preference.adapter is not None:
        base = Decoder(source.model)
        merged = merged_config(Adapters(base, [Adaptation(base, config.preference.adapter)]))
        if merged != base.config:
            raise UserError(
                "preference.adapter is on the embedding, which init_from ties to its head: added to it, as a round's"
                " policy has it, the two are no longer one; leave the embedding out"
            )


def _check_room(config: RoundsConfig, where: str, prompt: int) -> None:
    """Raises UserError where two answers may be longer than a row: the training would end at them, after the sampling.
    Of methods that go step by step it is not known before."""
    most = 2 * (prompt + config.sampling.max_tokens)
    if config.method not in STEPWISE and most > config.data.window:
        raise UserError(
            f"{where}: two answers of sampling.max_tokens={config.sampling.max_tokens} with the prompt of {prompt}"
            f" tokens in each may have {most}, but data.window is {config.data.window}: raise it, or set data.on_long"
            " to drop or truncate"
        )


def check_judge(source: Origin, method: str) -> None:
    """Raises UserError for a model that does not give one score to a text, or that compares what is scored alone."""
    head = source.model.head
    if head.labels != 1 or head.pooling == "none":
        gives = "logits of next tokens" if head.labels is None else f"{head.labels} scores"
        what = f"{gives} of each token" if head.pooling == "none" else gives
        raise UserError(f"scorer.model: {source.path} gives {what}; a reward model gives one score to a text")
    if method == "mcts_dpo" and source.extra.get(PAIRWISE):
        raise UserError(
            f"scorer.model: {source.path} compares two answers (pairwise=True); method=mcts_dpo scores one at a time"
        )


def function_hash(config: ScorerConfig) -> dict[str, str]:
    """The content of the file that a scoring function is defined in, where it can be found without importing it."""
    if config.function is None:
        return {}
    try:
        spec = importlib.util.find_spec(config.function.rpartition(".")[0])
    except (ImportError, ValueError):
        spec = None  # `check` says so, in its own words.
    return {"function": file_sha256(spec.origin)} if spec is not None and spec.has_location and spec.origin else {}


def _check_method(config: RoundsConfig, method: Method) -> None:
    if scored(config):
        check_scorer(config.scorer)
    else:
        reader = f"method={config.method}" if not method.scored else f"tree.value={config.tree.value}"
        _refuse_changed(config.scorer, ScorerConfig(), "scorer", reader)
    if config.method not in ("spo", "sppo") and config.scorer.win_probability != "sigmoid":
        raise UserError(f"scorer.win_probability={config.scorer.win_probability} is not read by method={config.method}")
    if config.method == "online_dpo":
        _check_online(config)
    elif config.sample_every != 1:
        raise UserError(f"sample_every={config.sample_every} is not read by method={config.method}")


def _check_sampling(config: RoundsConfig, method: Method) -> None:
    sampling = config.sampling
    check_sampling(sampling)
    if sampling.seed:
        raise UserError(f"sampling.seed={sampling.seed} is not read: every prompt has a seed of its own, by `seed`")
    if sampling.n < method.samples:
        raise UserError(f"sampling.n is {sampling.n}; method={config.method} needs at least {method.samples} samples")
    if sampling.n > 1 and sampling.temperature == 0:
        raise UserError(f"sampling.temperature is 0, and all {sampling.n} samples of a prompt would be the same")
    for name in ("logprobs", "ignore_eos"):
        if getattr(sampling, name):
            raise UserError(f"sampling.{name}={getattr(sampling, name)} is not read by the job rounds")


def _check_pairs(config: RoundsConfig) -> None:
    pairs, chosen = config.pairs, config.method in ("iterative_dpo", "iterative_rpo", "online_dpo")
    if not chosen:
        allowed = PairsConfig(truncated=pairs.truncated)
        _refuse_changed(pairs, allowed, "pairs", f"method={config.method}")
    for name in ("above", "below"):
        given = getattr(pairs, name) is not None
        if given != (pairs.choose == "thresholds"):
            raise UserError(
                f"pairs.{name}={getattr(pairs, name)} with pairs.choose={pairs.choose}: thresholds needs it"
            )
    if pairs.above is not None and pairs.below is not None and not pairs.below < pairs.above:
        raise UserError(f"pairs.below is {pairs.below}; it must be less than pairs.above, {pairs.above}")
    if pairs.most is not None and (pairs.most < 1 or pairs.choose == "max_min"):
        raise UserError(f"pairs.most is {pairs.most}; it must be at least 1, with pairs.choose=thresholds or all")


def _check_training(node: "Node") -> None:
    """The training of a round, as far as it can be told without its pairs."""
    config: RoundsConfig = node.config
    for name in LOOPS_OWN:
        if getattr(config.preference, name) != getattr(PreferenceConfig(), name):
            raise UserError(f"preference.{name} is set, but the loop gives each round its own: see {_instead(name)}")
    # This node stands for the policy: a run whose model is not known yet.
    training = replace(node, config=round_config(config, config.init_from), parents={"init_from": node})
    try:
        loss = checked_loss(training.config)
        check_training(training, "preference")
    except UserError as error:
        raise UserError(f"preference: {error}") from None
    method, names = config.method, [term.name for term in loss.terms]
    if loss.unpaired:
        raise UserError(f"preference.loss_type={names[0]} takes unpaired answers; method={method} makes pairs")
    wanted = METHODS[method].losses
    if wanted and not {LOSSES[name].function for name in wanted} & {term.named.function for term in loss.terms}:
        raise UserError(
            f"preference.loss_type={','.join(names)}: method={method} is trained with {' or '.join(wanted)}"
        )
    across = next((term.name for term in loss.terms if not term.named.pairwise), None)
    if method == "spo" and across is not None:
        raise UserError(f"preference.loss_type={across} has no loss of a single pair, which method=spo weights")
    if loss.columns and not METHODS[method].probabilities:
        raise UserError(f"preference.loss_type={','.join(names)} takes probabilities to win, which method=sppo makes")


def _check_online(config: RoundsConfig) -> None:
    if config.rounds != 1:
        raise UserError(f"rounds is {config.rounds}; method=online_dpo is one training, of preference.train.steps")
    if config.prompts_per_round is None:
        raise UserError("prompts_per_round is not set: of method=online_dpo these prompts are evaluated on")
    if config.pairs.choose != "max_min":
        raise UserError(f"pairs.choose={config.pairs.choose} is not read by method=online_dpo, which has max_min")
    if config.data.packing != "one_per_row":
        raise UserError(f"data.packing={config.data.packing}: method=online_dpo has a pair in each row (one_per_row)")
    if config.preference.reference_logps == "stored":
        raise UserError(
            "preference.reference_logps=stored: method=online_dpo makes its pairs while it trains; set live"
        )


def _instead(name: str) -> str:
    return {"reference": "init_from", "job": "method"}.get(name, name)


def _refuse_changed(given: Any, allowed: Any, group: str, reader: str) -> None:
    for name, value in vars(given).items():
        if value != getattr(allowed, name):
            raise UserError(f"{group}.{name}={value} is not read by {reader}")
