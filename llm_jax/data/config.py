"""Where records come from and how they become rows."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TokenizerConfig:
    path: str | None = None
    """Folder with a tokenizer.json or a SentencePiece tokenizer.model; None trains one on the job's own text."""
    kind: Literal["bpe", "sentencepiece_bpe", "sentencepiece_unigram"] = "bpe"
    """What is trained: a byte-level BPE, or one of SentencePiece's (with bytes for what the vocabulary lacks)."""
    vocab_size: int = 2048
    """Entries of the trained vocabulary, special tokens included."""
    split_digits: bool = True
    """Every digit is a token of its own."""


@dataclass(frozen=True)
class EmbeddedConfig:
    records: int = 20000
    """Generated records (word problems; for pretraining, stories and equations)."""
    eval_records: int = 512
    """Held-out records."""
    max_number: int = 20
    """Largest number in a word problem."""
    min_operations: int = 1
    """Fewest steps of a word problem."""
    max_operations: int = 3
    """Most steps of a word problem."""
    careful_fraction: float = 0.45
    """SFT: share of demonstrations that show their steps; the rest guess."""
    text_fraction: float = 0.5
    """Pretraining: share of tokens that are text; the rest are stories and equations."""


@dataclass(frozen=True)
class SourceConfig:
    path: str
    """What is read, as for data.path."""
    weight: float = 1.0
    """Share of rows (windows) from this source, relative to the other weights; it is exact at every step."""
    name: str | None = None
    """What its metrics are called (`loss_NAME`, `eval_NAME_loss`); None takes the path's last part, without endings."""
    eval_path: str | None = None
    """Held-out records; None keeps data.eval_fraction of path apart."""
    max_records: int | None = None
    """Reads no more than this many records of path."""


@dataclass(frozen=True)
class DataConfig:
    path: str | None = None
    """Records: a file (.jsonl, .txt, .py, .parquet, .arrow, .array_record, ...), a folder of such, a folder that
    `datasets` saved, `seqio:MODULE:NAME[:SPLIT]` or `hub:OWNER/NAME[/PATH]`; None: embedded data."""
    eval_path: str | None = None
    """Held-out records; None keeps eval_fraction of path apart, by hash of the record."""
    eval_fraction: float = 0.02
    """Share of records held out when eval_path is None; a long text file counts as many records, of about 16 KB."""
    mixture: tuple[SourceConfig, ...] = ()
    """Weighted sources, in place of path; a source that runs out is repeated."""
    embedded: Literal["problems", "docstrings", "steps"] = "problems"
    """Which embedded task, when path is None; steps: preference's problems step by step, the next right one over a
    wrong one."""
    generated: EmbeddedConfig = field(default_factory=EmbeddedConfig)
    window: int = 256
    """Tokens per row."""
    packing: Literal["best_fit", "concat_split", "one_per_row"] = "best_fit"
    """How records share rows. best_fit: whole ones, the longest first (TRL's `bfd`; texts longer than a window are cut,
    as in `bfd_split`); concat_split: one behind the other, cut every window (TRL's `wrapped`), but attention still ends
    where a document does; one_per_row: one each (TRL without packing)."""
    random_prefix: bool = False
    """Pretraining: of each text in a row a first part, of random length, is no target: what a prefix language model
    (model.prefix_lm) reads from both sides."""
    on_long: Literal["error", "truncate", "drop"] = "error"
    """SFT and preference: what to do with a record longer than the window (counted either way)."""
    on_unusable: Literal["error", "drop"] = "drop"
    """Preference: what to do with a pair of equal answers (before or after they are cut), or with an empty answer
    (counted either way)."""
    share_prompts: bool = False
    """Pairs: the two answers share their prompt's tokens, which stand in the row, and are computed, once. Losses and
    gradients are the same (but that a shared prompt counts once in the balance of experts)."""
    unpair: bool = False
    """Losses on unpaired answers: takes each pair's two answers as two records, the chosen one desirable."""
    chat_template: str | None = None
    """Built-in name (`chatml`, `plain`) or Jinja file; None takes the checkpoint's, or chatml where it has none."""
    max_records: int | None = None
    """Reads no more than this many records of path."""
    cache_dir: str | None = None
    """Folder of packed rows that runs share; None: `runs/data`, or inside of an explicit workdir."""
