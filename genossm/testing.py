"""What tests, ours and users', compare with: one tolerance table by dtype, the same everywhere."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

TOLERANCE: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1e-2, 1e-2),
    torch.float16: (2e-3, 2e-3),
}
"""(absolute, relative) tolerance of a result of each dtype; the absolute one is scaled by the largest true value."""


def assert_close(got: Tensor, truth: Tensor, name: str = "result", dtype: torch.dtype | None = None) -> None:
    """Compare a tensor with its truth, in float64, under the tolerance of its own dtype.

    Args:
        got: what was computed.
        truth: what it should be, of any dtype of at least that precision.
        name: what the message calls it.
        dtype: whose tolerance to take instead of that of `got`.

    Raises:
        AssertionError: a shape differs, a value is not finite where the truth is, or differs by more than allowed.
    """
    absolute, relative = TOLERANCE[dtype or got.dtype]
    scale = float(truth.detach().abs().max()) if truth.numel() else 1.0
    torch.testing.assert_close(
        got.detach().double().cpu(),
        truth.detach().double().cpu(),
        atol=absolute * max(1.0, scale),
        rtol=relative,
        msg=lambda text: f"{name}: {text}",
    )


def assert_equals_reference(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    options: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Hold every result and every gradient of an op to its reference, which runs in float64 on the CPU.

    Args:
        op, reference: functions of the inputs and the options; they give one tensor or several.
        inputs: tensors by name, all differentiated.
        options: further arguments, the same for both.
        dtype: whose tolerance to take instead of that of each result.

    Raises:
        AssertionError: a result or gradient differs; the message names it.
    """
    ours = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    truths = {name: tensor.detach().double().cpu().requires_grad_() for name, tensor in inputs.items()}
    on_cpu = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in options.items()}
    results, wanted = op(**ours, **options), reference(**truths, **on_cpu)
    results = results if isinstance(results, tuple) else (results,)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    for index, (got, truth) in enumerate(zip(results, wanted, strict=True)):
        assert_close(got, truth, f"result {index}", dtype)
    weights = [torch.randn_like(truth) for truth in wanted]
    for_ours = [weight.to(got) for weight, got in zip(weights, results, strict=True)]
    gradients = torch.autograd.grad(results, list(ours.values()), for_ours)
    for_truth = [weight.to(got.dtype).double().cpu() for weight, got in zip(weights, results, strict=True)]
    for name, got, truth in zip(
        ours, gradients, torch.autograd.grad(wanted, list(truths.values()), for_truth), strict=True
    ):
        assert_close(got, truth, f"gradient of {name}", dtype)
