"""Hyena's mixing of order 2 on a GPU: the short and the long convolution's kernels, with nothing kept that is cheap.

The short convolution is made again in the backward pass, as are the taps of implicit filters, group by group; and the
gradients of the short convolution's three results are written side by side, as its own backward pass reads them.
"""

import weakref
from typing import Any

import torch
from torch import Tensor

from genossm.ops import kept
from genossm.ops.kernels import causal_conv1d_triton, fftconv_triton
from genossm.ops.kernels.ahead import together
from genossm.ops.kernels.triton_parts import cut, of_length, whole
from genossm.ops.time_last import product, product_sum

_KEPT_BYTES = 1 << 30
"""A checkpointed layer keeps its long convolution up to this size, and makes it again above: there memory counts."""


_SHORT_BYTES = 1 << 24
"""Projections up to this size are kept with what the short convolution made of them: launching takes longer."""
_SHARE = 16
"""Part of a GPU's memory that the spectra of all checkpointed layers may take; those of one, half of it."""
_keeping: "list[weakref.ref[Tensor]]" = []


class _Implicit:
    """Filters made of their network's last layer; their gradients are added up into that layer's."""

    # Few groups, for each reads that layer, which is long.
    group_bytes = 1 << 29

    def __init__(self, length: int, h: Tensor, w: Tensor, decay: Tensor, t: Tensor, shift: float):
        self.h, self.w = of_length(h, length), w
        times = t if len(t) == length else of_length(t[None], length)[0]
        self.window = fftconv_triton.Window(decay, times, shift)
        self.dh = self.dw = torch.empty(0)

    def rows(self, first: int, count: int) -> Tensor:
        return self.w[first : first + count] @ self.h

    def place(self, first: int, count: int, length: int) -> Tensor:
        return torch.empty(count, length, device=self.h.device)

    def add(self, first: int, d_GL: Tensor) -> None:
        rows = slice(first, first + len(d_GL))
        if len(d_GL) == len(self.w):
            self.dh, self.dw = self.w.T @ d_GL, d_GL @ self.h.T
            return
        if first == 0:
            self.dw = torch.empty_like(self.w)
            self.dh = self.w[rows].T @ d_GL
        else:
            self.dh.addmm_(self.w[rows].T, d_GL)
        self.dw[rows] = d_GL @ self.h.T


@together
class HyenaConv(torch.autograd.Function):
    """u, w, bias, skip, k, size, whether gradients are on -> y; tensors as in `genossm.ops.hyena_conv`."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        u, *short, skip, k, size, train = given
        train = train and any(ctx.needs_input_grad)
        filters = fftconv_triton.Given(fftconv_triton.fitted(k, u.shape[1]))
        y, conv, spectra, _ = _mix(whole(u), None, short, skip, filters, size, train)
        ctx.save_for_backward(u, *short, skip, k, conv, *spectra)
        ctx.size = size
        return cut(y, u.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, w, bias, skip, k, conv, *spectra = ctx.saved_tensors
        length = u.shape[1]
        filters = fftconv_triton.Given(fftconv_triton.fitted(k, length))
        dy, u = whole(grads[0]), whole(u)
        mixed = causal_conv1d_triton.convolve(u, w, bias)
        d_BLC, d_skip = _mix_backward(dy, mixed, skip, filters, ctx.size, conv, spectra)
        du, dw, d_bias = causal_conv1d_triton.convolve_backward(d_BLC, u, w, bias)
        return cut(du, length), dw, d_bias, d_skip, filters.gradient(k.shape[1]), None, None


@together
class ImplicitHyenaConv(torch.autograd.Function):
    """Projections' x, weight, bias (or they, None, None), w, bias, skip, those of an implicit filter, size, train -> y.

    An implicit filter has h, w, decay, t, shift; `train` tells whether gradients are on, which no forward pass sees.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, weight, shift, w, bias, skip, h, last, decay, t, floor, size, train = given
        dtypes = x.dtype, None if weight is None else weight.dtype
        if weight is not None and torch.is_autocast_enabled("cuda"):
            # As the product takes them, so that the backward pass need not round them again; what follows is float32's.
            x, weight = (given.to(torch.get_autocast_dtype("cuda")) for given in (x, weight))
        u = whole(x) if weight is None else _projected(whole(x), weight)
        with torch.autocast("cuda", enabled=False):
            filters = _Implicit(u.shape[1], h, last, decay, t, floor)
            train = train and any(ctx.needs_input_grad)
            y, conv, spectra, mixed = _mix(u, shift, [w, bias], skip, filters, size, train)
        held = (u, mixed) if u.nbytes <= _SHORT_BYTES and not kept.inside() else (None, None)
        ctx.save_for_backward(x, weight, shift, w, bias, skip, h, last, decay, t, conv, *held, *spectra)
        ctx.options = (floor, size, *dtypes)
        return cut(y, x.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, shift, w, bias, skip, h, last, decay, t, conv, u, mixed, *spectra = ctx.saved_tensors
        floor, size, x_dtype, weight_dtype = ctx.options
        length, x = x.shape[1], whole(x)
        if u is None:
            u = x if weight is None else _projected(x, weight)
        if mixed is None:
            mixed = causal_conv1d_triton.convolve(u, w, bias, shift=shift)
        filters = _Implicit(u.shape[1], h, last, decay, t, floor)
        d_BLC, d_skip = _mix_backward(whole(grads[0]), mixed, skip, filters, size, conv, spectra)
        of_filters = (d_skip, of_length(filters.dh, h.shape[1]), filters.dw, *[None] * 5)
        if weight is None:
            du, dw, d_bias = causal_conv1d_triton.convolve_backward(d_BLC, u, w, bias)
            return (cut(du, length), None, None, dw, d_bias, *of_filters)
        du, dw, d_bias, d_shift = causal_conv1d_triton.convolve_shifted_backward(d_BLC, u, w, bias, shift)
        dx = cut(product(du, weight), length).to(x_dtype)
        d_weight = product_sum(du.transpose(1, 2), x).to(weight_dtype)
        return (dx, d_weight, d_shift, dw, d_bias, *of_filters)


def _projected(x: Tensor, weight: Tensor) -> Tensor:
    """Return the projections before their bias, (B, L, C) with time contiguous."""
    return product(weight, x.transpose(1, 2)).transpose(1, 2)


def _mix(
    u: Tensor,
    shift: Tensor | None,
    short: list[Tensor],
    skip: Tensor,
    filters: fftconv_triton.Filters,
    size: int,
    train: bool,
) -> tuple[Tensor, Tensor | None, list[Tensor], Tensor | None]:
    """Return the result and what the backward pass needs of it, at last the short convolution's where it was made.

    A checkpointed layer keeps the long convolution, which it gates again, and where there is room the spectra.
    """
    w, bias = short
    width = u.shape[2] // 3
    small = u.nbytes // 3 <= _KEPT_BYTES
    if small and kept.remaking():
        conv, *spectra = kept.kept()
        own = None if shift is None else shift[:width]
        x0 = causal_conv1d_triton.convolve(u[..., :width], w[:width], bias[:width], shift=own)
        return (conv * x0.transpose(1, 2)).transpose(1, 2), conv, spectra, None
    mixed = causal_conv1d_triton.convolve(u, w, bias, shift=shift)
    x0, x1, v = mixed.chunk(3, dim=-1)
    keep = fftconv_triton.KEPT_BYTES if train else 0
    if kept.inside():
        taken = fftconv_triton.spectra_bytes(size, width, len(u))
        keep = taken if small and taken <= _room(u.device) else 0
    y, made, spectra = fftconv_triton.convolve(v, filters, skip, None, x1, x0, size, train=train, keep=keep)
    if small and made is not None:
        kept.keep(made, *spectra)
        _keeping.extend(weakref.ref(spectrum) for spectrum in spectra if kept.inside())
    return y, made, spectra, mixed


def _room(device: torch.device) -> int:
    """Return the bytes of spectra that a checkpointed layer may keep beside those of others."""
    whole = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 1 << 36
    _keeping[:] = [spectrum for spectrum in _keeping if spectrum() is not None]
    held = sum(spectrum.nbytes for spectrum in (reference() for reference in _keeping) if spectrum is not None)
    return min(whole // (2 * _SHARE), whole // _SHARE - held)


def _mix_backward(
    dy: Tensor,
    mixed: Tensor,
    skip: Tensor,
    filters: fftconv_triton.Filters,
    size: int,
    conv: Tensor,
    spectra: list[Tensor],
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the short convolution's results, side by side, and of skip; filters take their own."""
    x0, x1, v = mixed.chunk(3, dim=-1)
    batch, length, width = mixed.shape
    d_BCL = torch.empty(batch, width, length, dtype=mixed.dtype, device=mixed.device)
    d_out, d_in, dx = d_BCL.chunk(3, dim=1)
    d_skip, _ = fftconv_triton.convolve_backward(
        dy, v, filters, skip, None, x1, x0, conv, spectra, size, dx, d_in, d_out
    )
    return d_BCL.transpose(1, 2), d_skip
