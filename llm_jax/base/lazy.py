"""Package `__init__`s that cost nothing to import: names are looked up on first use (PEP 562)."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_exports(namespace: dict[str, Any], exports: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns a package's `__getattr__`, and gives it `__dir__` and `__all__`, for `{public name: module it lives in}`.

    A value `module:name` takes another name from the module; `module:*` is the module itself.
    """
    package = namespace["__name__"]

    def load(name: str) -> Any:
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module_name, _, attribute = exports[name].partition(":")
        module = importlib.import_module(module_name)
        value = module if attribute == "*" else getattr(module, attribute or name)
        namespace[name] = value
        return value

    namespace["__dir__"] = lambda: sorted({*namespace, *exports})
    namespace["__all__"] = sorted(exports)
    return load
