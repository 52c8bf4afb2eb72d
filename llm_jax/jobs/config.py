"""The fields of each job. A config file's values are merged onto these."""

from dataclasses import dataclass, field
from typing import Literal

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
    """Answers shown in the report."""


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
    """Strength of the pull to the reference; IPO's tau, ORPO's lambda, SimPO's scale of rewards."""
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
    sync_ref_model: bool = False
    """TR-DPO: the reference follows the policy (needs reference_logps=live)."""
    ref_model_mixup_alpha: float = 0.6
    """TR-DPO: the policy's share in the reference's update; 1 replaces it (hard)."""
    ref_model_sync_steps: int = 512
    """TR-DPO: steps between two updates of the reference; 1 with a small mixup is the soft update."""
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


JOBS = {
    "pretrain": PretrainConfig,
    "sft": SFTConfig,
    "preference": PreferenceConfig,
    "reward": RewardConfig,
    "generate": GenerateConfig,
}
