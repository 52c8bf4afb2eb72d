"""The fields of each job. A config file's values are merged onto these."""

from dataclasses import dataclass, field
from typing import Literal

from llm_jax.adapters.config import LoraConfig
from llm_jax.base.model_ref import ModelRef
from llm_jax.data.config import DataConfig, TokenizerConfig
from llm_jax.inference.config import SamplingParams
from llm_jax.models.config import ModelConfig
from llm_jax.sharding.config import MeshConfig
from llm_jax.training.config import LoggingConfig, ProfileConfig, TrainConfig


@dataclass(frozen=True)
class TaskEvalConfig:
    problems: int | None = None
    """Held-out word problems answered greedily at the end; None means 400 for the embedded problems, else none."""
    max_tokens: int = 128
    """New tokens per answer, at most."""
    samples: int = 4
    """Answers shown in the report: to these problems, or to a preference run's first held-out prompts."""


@dataclass(frozen=True)
class PretrainConfig:
    job: Literal["pretrain"] = "pretrain"
    init_from: ModelRef | None = None
    """Model to continue from; None starts at random."""
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    task_eval: TaskEvalConfig = field(default_factory=TaskEvalConfig)


@dataclass(frozen=True)
class SFTConfig:
    job: Literal["sft"] = "sft"
    init_from: ModelRef | None = None
    """Model to fine-tune."""
    adapter: LoraConfig | None = None
    """LoRA: trains an adapter in place of the model; None trains the model."""
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    task_eval: TaskEvalConfig = field(default_factory=TaskEvalConfig)


@dataclass(frozen=True)
class PreferenceConfig:
    job: Literal["preference"] = "preference"
    init_from: ModelRef | None = None
    """Policy to align; frozen, it is the reference too unless `reference` names another."""
    reference: ModelRef | None = None
    """Frozen reference model; None means init_from."""
    reference_logps: Literal["stored", "live", "none"] = "stored"
    """stored: computed once before training and kept beside the data; live: the reference runs in every step; none: for
    losses without a reference (others measure their distance from it all the same)."""
    loss_type: tuple[str, ...] | str = "sigmoid"
    """A loss by TRL's name (`llm_jax.objectives.preference.named`), or several, which are added: `sigmoid,sft`."""
    loss_weights: tuple[float, ...] | None = None
    """Factor of each of several losses; None: 1."""
    beta: float = 0.1
    """Strength of the pull to the reference. IPO's tau, ORPO's lambda, SimPO's scale of rewards."""
    label_smoothing: float = 0.0
    """Probability that a preference label is flipped (cDPO, robust DPO, EXO's epsilon)."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js", "js_divergence", "alpha", "alpha_divergence"] = (
        "reverse_kl"
    )
    """What keeps the policy near the reference; `alpha` is the paper's, `alpha_divergence` TRL's."""
    f_alpha_divergence_coef: float = 0.5
    """Alpha of those two divergences."""
    ld_alpha: float | None = None
    """LD-DPO: weight of an answer's tokens beyond the shorter answer's length; None: 1."""
    use_weighting: bool = False
    """WPO: weighs pairs by how likely the policy is to write them."""
    discopop_tau: float = 0.05
    """Temperature of DiscoPOP's mixture."""
    simpo_gamma: float = 0.5
    """SimPO: margin by which the chosen answer's reward is to win."""
    cpo_alpha: float = 1.0
    """CPO: weight of the chosen answers' negative log-likelihood (0 for SimPO as in its paper)."""
    rpo_alpha: float = 1.0
    """RPO: weight of the chosen answers' negative log-likelihood per token."""
    dpop_lambda: float = 50.0
    """DPO-positive: penalty on chosen answers that become less likely than under the reference."""
    alpha: float = 0.25
    """AlphaPO: shape of the reward, (1 - p^-alpha) / alpha; 0 is the logarithm, SimPO's."""
    desirable_weight: float = 1.0
    """KTO: weight of desirable answers."""
    undesirable_weight: float = 1.0
    """KTO: weight of undesirable answers."""
    running_delta: bool = False
    """bco, bco_unpaired: the reward shift is of all batches so far (the paper's moving average), not of this batch."""
    sync_ref_model: bool = False
    """TR-DPO: the reference follows the policy (needs reference_logps=live)."""
    ref_model_mixup_alpha: float = 0.6
    """TR-DPO: the policy's share in the reference's update; 1 replaces it (hard)."""
    ref_model_sync_steps: int = 512
    """TR-DPO: steps between two updates of the reference; 1 with a small mixup is the soft update."""
    adapter: LoraConfig | None = None
    """LoRA: trains an adapter in place of the model, which without it is the reference; None trains the model."""
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    task_eval: TaskEvalConfig = field(default_factory=TaskEvalConfig)


@dataclass(frozen=True)
class RewardConfig:
    job: Literal["reward"] = "reward"
    init_from: ModelRef | None = None
    """Model to start from: a language model, which gets a new head, or one that ends in as many scores already."""
    task: Literal["pairs", "rankings", "classify", "steps"] = "pairs"
    """What is learned: which of two answers is better, the order of several, the class of a text, the class of each
    step of an answer (a process reward model)."""
    pairwise: bool = False
    """pairs: the model reads both answers, one behind the other, and learns P(chosen over rejected | prompt) in both
    orders at once, in place of a score of each."""
    ranking_loss: Literal["all_pairs", "plackett_luce"] = "all_pairs"
    """rankings: the mean over all pairs of a ranking (InstructGPT), or the likelihood of the whole order."""
    center_rewards_coefficient: float | None = None
    """pairs: pull of the sum of both rewards to 0 (0.01 is advised); None: none."""
    num_labels: int = 2
    """classify, steps: how many classes there are."""
    label_names: tuple[str, ...] = ()
    """classify, steps: what the classes are called in the exported folder (`id2label`)."""
    pooling: Literal["last", "mean"] = "last"
    """What a score is read from: a text's last token, or the mean over its tokens, which no Hugging Face folder has."""
    adapter: LoraConfig | None = None
    """LoRA: trains an adapter in place of the model, and the scores' projection whole; None trains the model."""
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


@dataclass(frozen=True)
class GenerateConfig:
    job: Literal["generate"] = "generate"
    init_from: ModelRef | None = None
    """Model to sample from."""
    prompts: str | None = None
    """JSONL file of `prompt` or `messages`; None takes held-out embedded problems."""
    max_prompts: int | None = None
    """Reads no more than this many prompts."""
    raw: bool = False
    """Gives prompts to the model as they are, without its chat template."""
    batch_size: int = 32
    """Prompts decoded together."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    mesh: MeshConfig = field(default_factory=MeshConfig)


@dataclass(frozen=True)
class ScorerConfig:
    kind: Literal["answer", "reward", "function"] = "answer"
    """answer: 1 where the final answer is right, else 0; reward: a reward model's score, or of one trained with
    `pairwise` its probabilities; function: any Python function's."""
    model: ModelRef | None = None
    """The reward model."""
    function: str | None = None
    """Dotted name, called as TRL calls reward functions, `f(prompts, completions, **columns) -> [score or None, ...]`
    with all samples of one prompt; with `pairwise` each completion is a pair of answers, and the value the probability
    that the first is better."""
    pairwise: bool = False
    """function: judges pairs of answers."""
    timeout: float = 10.0
    """function: seconds that one call may take; it runs in a process of its own."""
    on_error: Literal["error", "skip"] = "error"
    """function: what a call that raises or takes too long does: ends the run, or leaves out its prompt (counted)."""
    win_probability: Literal["sigmoid", "compare"] = "sigmoid"
    """How two scores make a probability to win, for spo and sppo: sigmoid of their difference, or 1, 1/2 and 0."""


@dataclass(frozen=True)
class PairsConfig:
    choose: Literal["max_min", "thresholds", "all"] = "max_min"
    """max_min: the best over the worst; thresholds: those from `above` on over those up to `below`; all: each over each
    with a lower score."""
    above: float | None = None
    """thresholds: least score of a chosen answer."""
    below: float | None = None
    """thresholds: greatest score of a rejected answer."""
    most: int | None = None
    """thresholds, all: pairs of one prompt at most, drawn at random; None takes all."""
    truncated: Literal["drop", "keep"] = "drop"
    """Samples that max_tokens cut off: no part of any pair (counted), or taken as if they had ended there."""


@dataclass(frozen=True)
class StepsConfig:
    locate: Literal["equations", "continuations"] = "equations"
    """How the first wrong step of a wrong answer is found: by its equations (those of word problems, GSM8K's marks), or
    as the first behind which none of `sampling.n` continuations is right."""
    most: int = 2
    """Wrong answers of one prompt that are corrected, at most."""


@dataclass(frozen=True)
class TreeConfig:
    simulations: int = 32
    """From the root; with `every_depth` from each node of the path that is taken."""
    root_factor: int = 1
    """Times as many from the root itself (the authors' code: 4)."""
    every_depth: bool = False
    """Searches again from the best child, and so on to an answer's end (the authors' code), or from the root alone."""
    depth: int = 5
    """Most steps of an answer; the last one is the whole rest."""
    separator: str = "\n"
    """What closes a step."""
    value: Literal["outcome", "self", "both"] = "outcome"
    """R of a node. outcome: of a whole answer its score (right 1, wrong -1), else 0; self: how likely the policy finds
    that the steps are right; both: their sum (paper)."""
    question: str = "Are all of these steps right? Answer with yes or no."
    """self, both: what the policy is asked about its steps."""
    exploration: float = 1.0
    """c of PUCT (the authors' `w_exp`)."""
    discount: float = 1.0
    """gamma of the backup."""
    length_penalty: float = 1.25
    """lambda of the prior, the exponent of a step's number of tokens."""
    prior: Literal["authors", "paper"] = "authors"
    """authors: p = exp(log pi(a|s) / |a|^lambda), as in their code; paper: p = pi(a|s) / |a|^lambda, which of a dozen
    tokens is so small that nothing is explored."""
    weights: Literal["paper", "authors"] = "paper"
    """Of V's mean. paper: visits N(s, a), 0 for a child that was never visited; authors: max(1, N(s, a))."""
    visits: Literal["paper", "authors"] = "paper"
    """paper: one per node and simulation; authors: two of the node that is searched from."""
    pairs_of: Literal["path", "all"] = "path"
    """Whose children make pairs: the nodes' on the path of most visits, one pair a depth (paper), or every node's."""
    rejected: Literal["worst", "second"] = "worst"
    """The child of the lowest Q (paper; the authors' --choose_worst), or of the second highest (the authors' code)."""
    unvisited: bool = False
    """Takes children too that no simulation went through, whose Q is their own reward (the authors' code)."""
    smoothing: Literal["visits", "none"] = "visits"
    """visits: conservative DPO, each pair's label_smoothing from its visits (paper; the authors' --conservative)."""


@dataclass(frozen=True)
class RoundsConfig:
    job: Literal["rounds"] = "rounds"
    init_from: ModelRef | None = None
    """Policy of the first round."""
    method: Literal["iterative_dpo", "iterative_rpo", "online_dpo", "spo", "sppo", "spin", "step_dpo", "mcts_dpo"] = (
        "iterative_dpo"
    )
    """How pairs are made; `preference.loss_type` says what is minimised on them."""
    rounds: int = 3
    """Rounds of sampling and training; the policy of a round's start is its reference."""
    prompts_per_round: int | None = None
    """Prompts sampled in a round, each round the next ones; None: all prompts, dealt out over the rounds."""
    chunk: int = 64
    """Prompts that are sampled, scored and stored at a time."""
    sample_every: int = 1
    """online_dpo: training steps on one sampling of pairs."""
    keep_rounds: int = 0
    """So many rounds before, whose pairs are trained on again (SPIN: 1)."""
    seed: int = 0
    """Seed of all samples."""
    batch_size: int = 128
    """Samples decoded together, at most."""
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(n=8))
    """n: samples per prompt."""
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    steps: StepsConfig = field(default_factory=StepsConfig)
    """step_dpo: how wrong steps are found."""
    tree: TreeConfig = field(default_factory=TreeConfig)
    """mcts_dpo: how steps are searched; sampling.n: steps drawn from a node, sampling.max_tokens: longest step."""
    data: DataConfig = field(default_factory=DataConfig)
    """path: records of `prompt` (and `answer`), `question` and `answer`, or demonstrations; None: word problems."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """The training of each round; its `init_from`, `reference`, `data`, `mesh` and `task_eval` are the loop's own."""
    task_eval: TaskEvalConfig = field(default_factory=TaskEvalConfig)
    """problems: held-out prompts with an answer, asked greedily after each round; None means 400, or as many as there
    are."""
    mesh: MeshConfig = field(default_factory=MeshConfig)


JOBS = {
    "pretrain": PretrainConfig,
    "sft": SFTConfig,
    "preference": PreferenceConfig,
    "reward": RewardConfig,
    "generate": GenerateConfig,
    "rounds": RoundsConfig,
}
