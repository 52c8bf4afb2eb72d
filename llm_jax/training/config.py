"""How long, how fast, how often: the fields every training job has."""

from dataclasses import dataclass, field
from typing import Literal

RuleName = Literal["adamw", "lion", "adafactor", "muon", "sgd"]


@dataclass(frozen=True)
class GroupConfig:
    match: str = ".*"
    """Regular expression on the parameter's path (`segments/0/0/attention/q/weight`); the first match wins."""
    rule: RuleName | None = None
    """Replaces optimizer.rule for the group; None keeps it."""
    learning_rate_multiplier: float = 1.0
    """Multiplies the scheduled learning rate; 0 freezes the group."""
    weight_decay: float | None = None
    """Replaces optimizer.weight_decay for the group; None keeps it."""


@dataclass(frozen=True)
class LionConfig:
    beta1: float = 0.9
    """Share of the momentum in the sign's argument."""
    beta2: float = 0.99
    """Decay of the momentum."""


@dataclass(frozen=True)
class AdafactorConfig:
    decay_rate: float = 0.8
    """Second moments at step t decay by 1 - t^-decay_rate."""
    eps: float = 1e-30
    """Added to squared gradients."""
    clip_threshold: float = 1.0
    """Root mean square above which a layer's update is scaled down."""
    scale_parameter: bool = True
    """Multiplies a layer's update by the root mean square of its parameter, so that learning_rate is relative."""
    min_scale: float = 1e-3
    """Least value of that root mean square."""


@dataclass(frozen=True)
class MuonConfig:
    momentum: float = 0.95
    """Decay of the sum of gradients."""
    nesterov: bool = True
    """Looks one step of momentum ahead."""
    ns_steps: int = 5
    """Newton-Schulz iterations."""
    ns_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the Newton-Schulz products; the authors' code has bfloat16."""
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    """Factor by shape, as torch.optim.Muon names it: original is sqrt(max(1, out/in)) (Jordan), match_rms_adamw
    0.2 sqrt(max(out, in)) (Moonshot), with which AdamW's learning rate, which embeddings and norms use, fits both."""


@dataclass(frozen=True)
class SGDConfig:
    momentum: float = 0.9
    """Decay of the sum of gradients; 0 keeps none."""
    nesterov: bool = False
    """Looks one step of momentum ahead."""


@dataclass(frozen=True)
class OptimizerConfig:
    rule: RuleName = "adamw"
    """Update rule; muon is for matrices between layers, and leaves embedding, head, norms and biases to adamw."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: float = 0.1
    """Decoupled decay, for the parameters that declare it (matrices, not norms or biases)."""
    clip_norm: float | None = 1.0
    """Global gradient norm above which gradients are scaled down; None does not clip."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """Shape after warm-up: wsd is warm-up, stable, linear decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    decay_steps: int | None = None
    """wsd: length of the final decay; None means a fifth of the steps."""
    final_fraction: float = 0.0
    """Learning rate at the end as a share of the peak."""
    groups: tuple[GroupConfig, ...] = ()
    """Exceptions by parameter path; the first match wins, a group that matches nothing is an error."""
    lion: LionConfig = field(default_factory=LionConfig)
    adafactor: AdafactorConfig = field(default_factory=AdafactorConfig)
    muon: MuonConfig = field(default_factory=MuonConfig)
    sgd: SGDConfig = field(default_factory=SGDConfig)


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500
    """Steps between saves; the last step is always saved."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_best: int = 0
    """Further checkpoints kept by the best value of best_metric."""
    best_metric: str = "eval_loss"
    """Evaluation metric that ranks checkpoints; lower is better for names ending in loss, higher otherwise."""
    export: bool = True
    """Write `export/` in Hugging Face layout at the end."""


@dataclass(frozen=True)
class BalancingConfig:
    load_balance: float = 0.0
    """Coefficient of Switch's loss on the experts' load: E times the sum over experts of load share and probability."""
    sequence_balance: float = 0.0
    """Coefficient of DeepSeek's, the same within each document."""
    router_z: float = 0.0
    """Coefficient of the mean squared log-sum-exp of the router's logits (ST-MoE)."""
    importance: float = 0.0
    """Coefficient of the squared coefficient of variation of the experts' summed weights (Shazeer et al. 2017)."""
    load: float = 0.0
    """Coefficient of the same of a noisy router's smooth load."""
    bias_rate: float = 0.0
    """Step of the correction biases towards an equal load, after each batch (DeepSeek-V3: 0.001)."""


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 8
    """Rows (windows) per optimizer step, over all devices and microbatches."""
    microbatches: int = 1
    """Pieces a batch is cut into; gradients are accumulated over them."""
    seed: int = 0
    """Seed of init, data order and every random number of the run."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products; masters, norms, softmax and losses stay float32."""
    remat: Literal["none", "full", "dots"] = "none"
    """What is recomputed in the backward pass: nothing, whole blocks, or all but matrix products."""
    ema_decay: float | None = None
    """Decay of a moving average of the weights (None: none), which evaluation, samples, export and children take."""
    neftune_noise_alpha: float | None = None
    """NEFTune: uniform noise of alpha / sqrt(T D) on the embeddings of a document of T tokens, in training only."""
    residual_dropout: float = 0.0
    """Share of each sublayer's output that is dropped before it joins the residual stream, in training only."""
    attention_dropout: float = 0.0
    """Share of attention weights that is dropped, in training only; runs the plain attention, in memory B N T T."""
    z_loss: float = 0.0
    """Coefficient of the squared log-sum-exp of the logits, averaged over target tokens, in the training loss."""
    mtp_weight: float = 0.0
    """Weight of the loss on further tokens, of models that predict some (`model.mtp`); 0 leaves their layers alone."""
    balancing: BalancingConfig = field(default_factory=BalancingConfig)
    """What keeps experts equally busy, in training only; nothing of it is on by itself."""
    freeze: tuple[str, ...] = ()
    """Regular expressions on `layers.3.attention.q.weight`, `embed.weight`, ...: these keep their values."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    eval_batches: int = 16
    """Held-out batches per evaluation, at most."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass(frozen=True)
class WandbConfig:
    project: str | None = None
    """W&B project; None means $WANDB_PROJECT, or llm_jax."""
    name: str | None = None
    """Name of the run on its page; None means the name of the config."""
    entity: str | None = None
    """Team or user; None means the account's default."""
    group: str | None = None
    """Runs of one group are shown together."""
    tags: tuple[str, ...] = ()
    """Labels to filter by."""
    mode: Literal["online", "offline"] | None = None
    """offline writes to the workdir only, for `wandb sync` later; None means $WANDB_MODE, or online."""


@dataclass(frozen=True)
class LoggingConfig:
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where the lines of metrics.jsonl, which is always written, go besides: tensorboard,wandb."""
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass(frozen=True)
class ProfileConfig:
    steps: str | None = None
    """START:STOP writes a trace of steps START to STOP - 1 to `profile/` in the workdir, for xprof and Perfetto."""
