# pyright: reportArgumentType=false, reportCallIssue=false
# (seqio's own annotations are not what it does)
"""Tasks for the tests: a module that `seqio:tests.data.readers.seqio_tasks:NAME` imports."""

import functools
import os

import seqio
import tensorflow as tf

WORDS = ["one", "two", "três", "四"]
VOCABULARY = seqio.ByteVocabulary()
TEXT = seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.string, rank=0)
IDS = seqio.Feature(VOCABULARY)


def documents(split: str, shuffle_files: bool = False) -> tf.data.Dataset:
    """The texts of the file that SEQIO_DOCUMENTS names, split at form feeds."""
    del split, shuffle_files
    with open(os.environ["SEQIO_DOCUMENTS"], encoding="utf-8", newline="") as file:
        return tf.data.Dataset.from_tensor_slices({"text": file.read().split("\f")})


def pairs(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed
    return tf.data.Dataset.from_tensor_slices({"inputs": [f"{split} {w}?" for w in WORDS], "targets": WORDS})


def rename(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.map(lambda x: {"inputs": "", "targets": x["targets"]})


def broken(dataset: tf.data.Dataset) -> tf.data.Dataset:
    def check(element):
        refused = tf.debugging.assert_none_equal(element["targets"], "três", message="a word of the test is refused")
        with tf.control_dependencies([refused]):
            return {**element, "targets": tf.identity(element["targets"])}

    return dataset.map(check)


def misspelt(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.map(lambda element: {"inputs": element["imputs"]})


SOURCE = seqio.FunctionDataSource(pairs, splits=["train", "validation"])
STRINGS = {"inputs": TEXT, "targets": TEXT}
add = functools.partial(seqio.TaskRegistry.add, source=SOURCE)
add("lj_pairs", preprocessors=[], output_features=STRINGS)
add("lj_texts", preprocessors=[rename], output_features=STRINGS)
add("lj_ids", preprocessors=[seqio.preprocessors.tokenize], output_features={"inputs": IDS, "targets": IDS})
bare = functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False)
add("lj_bare_ids", preprocessors=[bare], output_features={"inputs": IDS, "targets": IDS})
add("lj_broken", preprocessors=[broken], output_features=STRINGS)
add("lj_misspelt", preprocessors=[misspelt], output_features=STRINGS)
seqio.TaskRegistry.add(
    "lj_documents",
    source=seqio.FunctionDataSource(documents, splits=["train"]),
    preprocessors=[],
    output_features={"text": TEXT},
)
seqio.MixtureRegistry.add("lj_mixture", [("lj_pairs", 2), ("lj_texts", 1)])
seqio.MixtureRegistry.add("lj_id_mixture", [("lj_ids", 1)])
