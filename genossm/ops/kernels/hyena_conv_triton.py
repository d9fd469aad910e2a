"""Hyena's mixing of order 2 on a GPU: the short and the long convolution's kernels, with nothing kept that is cheap.

The short convolution is made again in the backward pass, as are the taps of implicit filters, group by group; and the
gradients of the short convolution's three results are written side by side, as its own backward pass reads them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from genossm.ops.kernels import causal_conv1d_triton, fftconv_triton

_LOG2E = tl.constexpr(1.4426950408889634)
_T = 1024


@triton.jit
def _window(k, decay, t, shift, K, T: tl.constexpr):
    """Multiply a channel's taps by their window, where they stand."""
    i = tl.program_id(0) * T + tl.arange(0, T)
    rate = tl.abs(tl.load(decay + tl.program_id(1)).to(tl.float32)) * _LOG2E
    at = k + tl.program_id(1).to(tl.int64) * K + i
    window = tl.exp2(-rate * tl.load(t + i, i < K, 0.0).to(tl.float32)) + shift
    tl.store(at, tl.load(at, i < K, 0.0) * window, i < K)


class _Implicit:
    """Filters made of their network's last layer; their gradients are added up into that layer's."""

    def __init__(self, length: int, h: Tensor, w: Tensor, decay: Tensor, t: Tensor, shift: float):
        self.h, self.w, self.decay, self.t, self.shift = h[:, :length], w, decay, t, shift
        self.dh = self.dw = torch.empty(0)

    def windowed(self, first: int, k_GL: Tensor) -> Tensor:
        count, length = k_GL.shape
        grid = (triton.cdiv(length, _T), count)
        _window[grid](k_GL, self.decay[first:], self.t, self.shift, length, T=_T)
        return k_GL

    def rows(self, first: int, count: int) -> Tensor:
        return self.windowed(first, self.w[first : first + count] @ self.h)

    def add(self, first: int, d_GL: Tensor) -> None:
        rows = slice(first, first + len(d_GL))
        d_GL = self.windowed(first, d_GL)
        if first == 0:
            self.dw = torch.empty_like(self.w)
            self.dh = self.w[rows].T @ d_GL
        else:
            self.dh.addmm_(self.w[rows].T, d_GL)
        self.dw[rows] = d_GL @ self.h.T


class HyenaConv(torch.autograd.Function):
    """u, w, bias, skip, k, size -> y; tensors as in `genossm.ops.hyena_conv`."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        *kept, k, size = given
        return _forward(ctx, kept, fftconv_triton.Given(k), size, k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *kept, k = ctx.saved_tensors[:5]
        filters = fftconv_triton.Given(k)
        return (*_backward(ctx, grads[0], kept, filters, ctx.saved_tensors[5:]), filters.dk, None)


class ImplicitHyenaConv(torch.autograd.Function):
    """u, w, bias, skip, those of an implicit filter (h, w, decay, t, shift), size -> y."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        u, w, bias, skip, h, last, decay, t, shift, size = given
        ctx.shift = shift
        with torch.autocast("cuda", enabled=False):
            filters = _Implicit(u.shape[1], h, last, decay, t, shift)
            return _forward(ctx, [u, w, bias, skip], filters, size, h, last, decay, t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, w, bias, skip, h, last, decay, t, *spectra = ctx.saved_tensors
        filters = _Implicit(u.shape[1], h, last, decay, t, ctx.shift)
        found = _backward(ctx, grads[0], [u, w, bias, skip], filters, spectra)
        behind = h.shape[1] - u.shape[1]
        dh = torch.nn.functional.pad(filters.dh, (0, behind)) if behind else filters.dh
        return (*found, dh, filters.dw, None, None, None, None)


def _forward(ctx: Any, given: list[Tensor], filters: fftconv_triton.Filters, size: int, *saved: Tensor) -> Tensor:
    """Mix; keep what the backward pass needs."""
    u, w, bias, skip = given
    x0, x1, v = causal_conv1d_triton.convolve(u, w, bias).chunk(3, dim=-1)
    train = any(ctx.needs_input_grad)
    y, conv, spectra = fftconv_triton.convolve(v, filters, skip, None, x1, x0, size, train=train)
    ctx.save_for_backward(*given, *saved, conv, *spectra)
    ctx.size = size
    return y


def _backward(
    ctx: Any, dy: Tensor, given: list[Tensor], filters: fftconv_triton.Filters, kept: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of u, w, bias and skip; the filters take their own."""
    u, w, bias, skip = given
    conv, *spectra = kept
    x0, x1, v = causal_conv1d_triton.convolve(u, w, bias).chunk(3, dim=-1)
    batch, length, width = u.shape
    d_BCL = torch.empty(batch, width, length, dtype=u.dtype, device=u.device)
    d_out, d_in, dx = d_BCL.chunk(3, dim=1)
    d_skip, _ = fftconv_triton.convolve_backward(
        dy, v, filters, skip, None, x1, x0, conv, spectra, ctx.size, dx, d_in, d_out
    )
    del x0, x1, v
    return (*causal_conv1d_triton.convolve_backward(d_BCL.transpose(1, 2), u, w, bias), d_skip)
