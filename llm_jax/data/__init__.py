"""Tokenizers, chat templates, record formats, packing, rows and loaders."""

from llm_jax.base.lazy import lazy_exports

__getattr__ = lazy_exports(
    globals(),
    {
        "Loader": "llm_jax.data.loader",
        "Prepared": "llm_jax.data.prepare",
        "RowSet": "llm_jax.data.rowset",
        "Tokenizer": "llm_jax.data.tokenizers",
        "check_records": "llm_jax.data.checking",
        "held_out_problems": "llm_jax.data.corpus",
        "load_tokenizer": "llm_jax.data.tokenizers",
        "pretrain_texts": "llm_jax.data.bpe_text",
        "render": "llm_jax.data.chat",
        "source_manifest": "llm_jax.data.corpus",
        "train_bpe": "llm_jax.data.tokenizer_training",
        "train_sentencepiece": "llm_jax.data.tokenizer_training",
    },
)
