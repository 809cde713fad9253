"""Compile the Triton kernels of a module for a Hopper GPU, as a first launch there does; no GPU is needed.

python compile_worker.py MODULE.py: a line for each kernel and setting, with the formats that came out of it.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any, Final

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER: Final = GPUTarget("cuda", 90, 32)
LOGITS: Final = ("*bf16", "*fp16", "*fp32")
TYPES: Final = {
    "columns": "*i64",
    "gradients": "*bf16",
    "owned": "*i1",
    **dict.fromkeys(("maximum", "sums", "log_sum_exp", "scale", "factor", "entropy"), "*fp32"),
    **dict.fromkeys(("row_stride", "sum_stride", "gradient_stride", "vocabulary"), "i32"),
    "temperature": "fp32",
    **dict.fromkeys(("WITH_ENTROPY", "BLOCK"), "constexpr"),
}
"""Of the kernels' arguments, as a launch finds them."""


def compiled(kernel: Any, logits: str, with_entropy: bool, block: int) -> list[str]:
    """The formats that the compiler makes of a kernel, machine code last."""
    names = kernel.arg_names
    constants = {(names.index("WITH_ENTROPY"),): with_entropy, (names.index("BLOCK"),): block}
    signature = {name: {"logits": logits, **TYPES}[name] for name in names}
    return list(triton.compile(ASTSource(kernel, signature, constants), target=HOPPER).asm)


def main(path: str) -> None:
    """Import the module and compile what is in it."""
    spec = importlib.util.spec_from_file_location("kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernels = [value for value in vars(module).values() if isinstance(value, triton.JITFunction)]
    for kernel in kernels:
        for logits in LOGITS:
            for with_entropy in (False, True):
                print(kernel.__name__, logits, with_entropy, *compiled(kernel, logits, with_entropy, module.BLOCK))


if __name__ == "__main__":
    main(sys.argv[1])
