"""One folder per op: `reference.py` (plain jnp), `xla.py` (memory-lean, any backend), the public op in `__init__.py`.

The op `flash_attention` and the folder it lives in share a name. Python binds a submodule to its parent once the
submodule is loaded, so this package keeps the *function* under that name, whoever imports the folder first.
A submodule is reached by `from llm_jax.kernels.OP import NAME`, not by `import a.b.c as x`.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llm_jax.base.lazy import lazy_exports

if TYPE_CHECKING:
    from llm_jax.kernels.causal_conv1d import causal_conv1d as causal_conv1d
    from llm_jax.kernels.choice import explain as explain
    from llm_jax.kernels.choice import supports as supports
    from llm_jax.kernels.decode_attention import decode_attention as decode_attention
    from llm_jax.kernels.flash_attention import flash_attention as flash_attention
    from llm_jax.kernels.grouped_matmul import grouped_matmul as grouped_matmul
    from llm_jax.kernels.grouped_swiglu import grouped_swiglu as grouped_swiglu
    from llm_jax.kernels.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
    from llm_jax.kernels.linear_cross_entropy import partial_linear_cross_entropy as partial_linear_cross_entropy
    from llm_jax.kernels.matmul import QuantizedArray as QuantizedArray
    from llm_jax.kernels.matmul import matmul as matmul
    from llm_jax.kernels.matmul import quantize as quantize
    from llm_jax.kernels.ragged_paged_attention import Pages as Pages
    from llm_jax.kernels.ragged_paged_attention import init_pages as init_pages
    from llm_jax.kernels.ragged_paged_attention import ragged_paged_attention as ragged_paged_attention
    from llm_jax.kernels.ragged_paged_attention import write_pages as write_pages
    from llm_jax.kernels.selective_scan import selective_scan as selective_scan
    from llm_jax.kernels.ssd import ssd as ssd

OPS = (
    "causal_conv1d",
    "decode_attention",
    "flash_attention",
    "grouped_matmul",
    "grouped_swiglu",
    "linear_cross_entropy",
    "matmul",
    "ragged_paged_attention",
    "selective_scan",
    "ssd",
)

__getattr__ = lazy_exports(
    globals(),
    {op: f"llm_jax.kernels.{op}" for op in OPS}
    | {
        "partial_linear_cross_entropy": "llm_jax.kernels.linear_cross_entropy",
        "Pages": "llm_jax.kernels.ragged_paged_attention.pages",
        "init_pages": "llm_jax.kernels.ragged_paged_attention.pages",
        "write_pages": "llm_jax.kernels.ragged_paged_attention.pages",
        "QuantizedArray": "llm_jax.kernels.matmul.quantized",
        "quantize": "llm_jax.kernels.matmul.quantized",
        "explain": "llm_jax.kernels.choice",
        "supports": "llm_jax.kernels.choice",
    },
)


class _Kernels(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in OPS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Kernels
