from llm_jax.base.nearest import nearest


def test_by_spelling():
    assert nearest("stpes", ["seed", "steps", "batch_size"]) == "steps"
    assert nearest("Steps", ["seed", "steps"]) == "steps"


def test_a_field_is_found_in_another_group():
    fields = ["config.train", "config.train.steps", "config.train.optimizer.learning_rate", "config.data.window"]
    assert nearest("config.train.learning_rate", fields) == "config.train.optimizer.learning_rate"
    assert nearest("config.window", fields) == "config.data.window"


def test_none_when_nothing_is_like_it():
    assert nearest("qqqq", ["steps", "window"]) is None
    assert nearest("steps", []) is None
