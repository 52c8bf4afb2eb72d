"""The valid name a mistyped one was probably meant to be."""

from collections.abc import Iterable
from difflib import SequenceMatcher


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most like `name`, or None if none is much like it.

    Dotted names are compared whole and by their last part, so that `train.learning_rate` finds
    `train.optimizer.learning_rate`.
    """

    def ratio(a: str, b: str) -> float:
        return SequenceMatcher(None, a.lower(), b.lower()).ratio()

    def likeness(choice: str) -> float:
        whole, last = ratio(name, choice), ratio(name.rsplit(".", 1)[-1], choice.rsplit(".", 1)[-1])
        return whole + last if whole + last >= 1.0 or whole >= 0.75 else 0.0

    return max((c for c in choices if likeness(c)), key=likeness, default=None)
