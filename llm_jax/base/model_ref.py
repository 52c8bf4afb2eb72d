"""The type of a config field that names a model."""

from typing import NewType

ModelRef = NewType("ModelRef", str)
"""A Hugging Face folder, a name on its hub (`owner/name[@revision]`), a workdir, or another config file
(`FILE.py[:variant]`), which is run first if need be."""
