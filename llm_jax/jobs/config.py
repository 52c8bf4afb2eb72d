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
    reference_logps: Literal["stored", "live"] = "stored"
    """stored: computed once before training and kept beside the data; live: the reference runs in every step."""
    beta: float = 0.1
    """Strength of the pull to the reference."""
    label_smoothing: float = 0.0
    """Probability that a preference label is flipped (cDPO)."""
    adapter: LoraConfig | None = None
    """LoRA: trains an adapter in place of the model, which without it is the reference; None trains the model."""
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    task_eval: TaskEvalConfig = field(default_factory=TaskEvalConfig)


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


JOBS = {"pretrain": PretrainConfig, "sft": SFTConfig, "preference": PreferenceConfig, "generate": GenerateConfig}
