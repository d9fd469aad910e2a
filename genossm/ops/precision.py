"""How exactly float32 matrices are multiplied: float32 throughout, or factors rounded where the hardware has units."""

import contextlib
from collections.abc import Iterator

import torch


def rounds_fast() -> bool:
    """Tell whether this CPU has units for matrices of bfloat16, which multiply two to four times as fast (AMX)."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16", False))


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Multiply float32 matrices inside the `with` block at one precision, in every thread.

    Args:
        precision: "highest" (float32), "high" (factors rounded to TF32 on a GPU) or "medium" (rounded to bfloat16 on a
            CPU that has units for it). Sums are float32 in all three.
    """
    before = torch.get_float32_matmul_precision()
    if before == precision or torch.compiler.is_compiling():
        yield
        return
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
