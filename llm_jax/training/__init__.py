"""The loop, the step, the optimizer, and what a run leaves behind."""

from llm_jax.base.lazy import lazy_exports

__getattr__ = lazy_exports(
    globals(),
    {
        "CheckpointConfig": "llm_jax.training.config",
        "AdafactorConfig": "llm_jax.training.config",
        "GroupConfig": "llm_jax.training.config",
        "LionConfig": "llm_jax.training.config",
        "MuonConfig": "llm_jax.training.config",
        "OptimizerConfig": "llm_jax.training.config",
        "SGDConfig": "llm_jax.training.config",
        "TrainConfig": "llm_jax.training.config",
        "TrainingJob": "llm_jax.training.loop",
        "train": "llm_jax.training.loop",
        "make_optimizer": "llm_jax.training.optimizer",
        "make_schedule": "llm_jax.training.schedule",
        "abstract_state": "llm_jax.training.state",
        "init_state": "llm_jax.training.state",
        "state_shardings": "llm_jax.training.state",
        "weights_in_use": "llm_jax.training.state",
        "evaluate": "llm_jax.training.step",
        "make_eval_step": "llm_jax.training.step",
        "make_grads": "llm_jax.training.step",
        "make_train_step": "llm_jax.training.step",
        "Objective": "llm_jax.training.terms",
        "Statistics": "llm_jax.training.terms",
    },
)
