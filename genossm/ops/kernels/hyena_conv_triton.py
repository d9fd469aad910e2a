"""Hyena's mixing of order 2 on a GPU: the short and the long convolution's kernels, with nothing kept that is cheap.

The short convolution is made again in the backward pass, and the gradients of its three results are written side by
side, as its own backward pass reads them.
"""

from typing import Any

import torch
from torch import Tensor

from genossm.ops.kernels import causal_conv1d_triton, fftconv_triton


class HyenaConv(torch.autograd.Function):
    """u, w, bias, k, skip, size -> y; tensors as in `genossm.ops.hyena_conv`."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        u, w, bias, k, skip, size = given
        x0, x1, v = causal_conv1d_triton.convolve(u, w, bias).chunk(3, dim=-1)
        y, conv, spectra = fftconv_triton.convolve(v, k, skip, None, x1, x0, size, train=any(ctx.needs_input_grad))
        ctx.save_for_backward(u, w, bias, k, skip, conv, *spectra)
        ctx.size = size
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, w, bias, k, skip, conv, *spectra = ctx.saved_tensors
        x0, x1, v = causal_conv1d_triton.convolve(u, w, bias).chunk(3, dim=-1)
        batch, length, width = u.shape
        d_BCL = torch.empty(batch, width, length, dtype=u.dtype, device=u.device)
        d_out, d_in, dx = d_BCL.chunk(3, dim=1)
        dk, d_skip, _ = fftconv_triton.convolve_backward(
            grads[0], v, k, skip, None, x1, x0, conv, spectra, ctx.size, dx, d_in, d_out
        )
        del x0, x1, v
        return (*causal_conv1d_triton.convolve_backward(d_BCL.transpose(1, 2), u, w, bias), dk, d_skip, None)
