"""Hyena's mixing of order 2 in one pass: short convolution, gate, long convolution, skip, gate.

On the CPU the cost of these is memory traffic, not arithmetic: done op by op, each pass writes a fresh tensor as large
as the input. Here channels go through all of them in groups that stay in cache, and the backward pass computes the
short convolution again instead of keeping it.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy.typing as npt
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from genossm.ops.backend import choose
from genossm.ops.causal_conv1d import causal_conv1d, causal_conv1d_ref
from genossm.ops.fftconv import fftconv, fftconv_ref, good_size, gpu_size
from genossm.ops.kernels.threads_numba import array, copied, run_shared, threads_for
from genossm.ops.precision import products
from genossm.ops.rows import check_shapes
from genossm.ops.time_last import ToTime

_GROUP = 1 << 18
"""FFT elements of a group: its buffers fit the caches of a core (measured: 2^17 to 2^19 are alike)."""
_ROWS = 4
"""Least rows of a batched transform: one alone costs three to seven times as much a row (measured with MKL)."""
_SHARE = 1 << 18
"""Elements a thread has at least: torch's own threads are still awake after the transform before, and in the way."""


class ImplicitFilter(NamedTuple):
    """A long filter as its network's last layer and window, k = (w h) (exp(-|decay| t) + shift), not yet made.

    A GPU makes its taps a group of channels at a time, and again in the backward pass: they are as large as the input.
    """

    h_FL: Tensor
    w_DF: Tensor
    decay_D: Tensor
    t_L: Tensor
    shift: float

    def part(self, rows: slice) -> "ImplicitFilter":
        """Return the filters of some channels."""
        return self._replace(w_DF=self.w_DF[rows], decay_D=self.decay_D[rows])

    def scaled(self, scale: float) -> "ImplicitFilter":
        """Return the filters times a number."""
        return self if scale == 1 else self._replace(w_DF=self.w_DF * scale)

    def taps(self) -> Tensor:
        """Return the taps k_DL."""
        with torch.autocast(self.h_FL.device.type, enabled=False), products("highest"):
            if torch.is_grad_enabled():
                window_DL = torch.exp(-self.decay_D.abs()[:, None] * self.t_L) + self.shift
                return (self.w_DF @ self.h_FL) * window_DL
            # The same, in the memory of the first product: a fresh tensor as long as the input costs a pass of faults.
            window_DL = torch.outer(-self.decay_D.abs(), self.t_L).exp_().add_(self.shift)
            return (self.w_DF @ self.h_FL).mul_(window_DL)


class Projection(NamedTuple):
    """The projections x0, x1, v as what makes them, w x + bias, not yet made.

    A GPU makes them again in the backward pass, being three times as wide as x, and adds the bias where it reads them:
    the product itself would take two passes over memory more for it.
    """

    x_BLD: Tensor
    w_CD: Tensor
    bias_C: Tensor

    def made(self) -> Tensor:
        """Return the projections u_BLC, time contiguous, with no transposed copy."""
        return cast(Tensor, ToTime.apply(self.x_BLD, self.w_CD, self.bias_C)).transpose(1, 2)


def hyena_conv_ref(
    u_BLC: Float[Tensor, "B L C"],
    w_CW: Float[Tensor, "C W"],
    bias_C: Float[Tensor, " C"],
    k_DL: Float[Tensor, "D K"],
    skip_D: Float[Tensor, " D"],
) -> Float[Tensor, "B L D"]:
    """Mix by the definition, the truth that `hyena_conv` is held to; C is 3 D.

    x0, x1, v = the short convolution of u;  y = x0 * (k * (x1 v) + skip x1 v) (Poli et al. 2023, section 3).
    """
    short_BLC = causal_conv1d_ref(u_BLC, w_CW, bias_C)
    assert isinstance(short_BLC, Tensor)
    x0_BLD, x1_BLD, v_BLD = short_BLC.chunk(3, dim=-1)
    return fftconv_ref(v_BLD, k_DL, skip_D, gate_in_BLD=x1_BLD, gate_out_BLD=x0_BLD)


def hyena_conv(
    u_BLC: Float[Tensor, "B L C"] | Projection,
    w_CW: Float[Tensor, "C W"],
    bias_C: Float[Tensor, " C"],
    k_DL: Float[Tensor, "D K"] | Complex[Tensor, "D F"] | ImplicitFilter,
    skip_D: Float[Tensor, " D"],
) -> Float[Tensor, "B L D"]:
    """Mix the three projections of a causal Hyena of order 2 along time.

    Args:
        u_BLC: the projections x0, x1, v side by side, C = 3 D, before the short convolution; time contiguous in
            memory (`u_BCL.transpose(1, 2)`) is the fast case and the result's form. Or how to make them.
        w_CW, bias_C: the short convolution.
        k_DL: the long filter over lags 0, 1, …, at least L of them, or how to make it; or, where no gradient is
            needed, its transform of `good_size(2 L - 1)` lags.
        skip_D: weight of the long convolution's own input.

    Returns:
        y_BLD, in the dtype of u.

    Raises:
        ValueError: the filter is shorter than the sequence, its transform has another size, or shapes don't fit.
    """
    if isinstance(u_BLC, Projection):
        x_BLD = u_BLC.x_BLD
        best = choose("hyena_conv", x_BLD.device, ["triton", "numba", "torch", "reference"]).name
        if best == "triton" and isinstance(k_DL, ImplicitFilter) and x_BLD.dtype != torch.float64:
            _check(x_BLD.shape[:2], u_BLC.w_CD.shape[0], w_CW, bias_C, k_DL, skip_D)
            check_shapes(w_CD=(u_BLC.w_CD, (len(bias_C), x_BLD.shape[2])), bias_C=(u_BLC.bias_C, (len(bias_C),)))
            kernels = importlib.import_module("genossm.ops.kernels.hyena_conv_triton")
            size = gpu_size(x_BLD.shape[1])
            return kernels.ImplicitHyenaConv.apply(*u_BLC, w_CW, bias_C, skip_D, *k_DL, size, torch.is_grad_enabled())
        return hyena_conv(u_BLC.made(), w_CW, bias_C, k_DL, skip_D)
    _check(u_BLC.shape[:2], u_BLC.shape[2], w_CW, bias_C, k_DL, skip_D)
    if isinstance(k_DL, Tensor) and k_DL.is_complex():
        return _hyena_conv_kept(u_BLC, w_CW, bias_C, k_DL, skip_D)
    best = choose("hyena_conv", u_BLC.device, ["triton", "numba", "torch", "reference"]).name
    if best == "triton" and isinstance(k_DL, ImplicitFilter) and u_BLC.dtype != torch.float64:
        kernels = importlib.import_module("genossm.ops.kernels.hyena_conv_triton")
        size = gpu_size(u_BLC.shape[1])
        return kernels.ImplicitHyenaConv.apply(
            u_BLC, None, None, w_CW, bias_C, skip_D, *k_DL, size, torch.is_grad_enabled()
        )
    k_DL = k_DL if isinstance(k_DL, Tensor) else k_DL.taps()
    fits = _numba_takes(u_BLC, w_CW, bias_C, k_DL, skip_D)
    offered = (
        (["triton"] if u_BLC.dtype != torch.float64 else []) + (["numba"] if fits else []) + ["torch", "reference"]
    )
    chosen = choose("hyena_conv", u_BLC.device, offered).name
    if chosen == "reference":
        return hyena_conv_ref(u_BLC, w_CW, bias_C, k_DL, skip_D)
    if chosen == "numba":
        return _HyenaConv.apply(u_BLC.transpose(1, 2), w_CW, bias_C, k_DL, skip_D).transpose(1, 2)
    if chosen == "triton":
        kernels = importlib.import_module("genossm.ops.kernels.hyena_conv_triton")
        size = gpu_size(u_BLC.shape[1])
        return kernels.HyenaConv.apply(u_BLC, w_CW, bias_C, skip_D, k_DL, size, torch.is_grad_enabled())
    x0_BLD, x1_BLD, v_BLD = causal_conv1d(u_BLC, w_CW, bias_C).chunk(3, dim=-1)
    return fftconv(v_BLD, k_DL, skip_D, gate_in_BLD=x1_BLD, gate_out_BLD=x0_BLD)


def _check(
    rows: torch.Size, channels: int, w_CW: Tensor, bias_C: Tensor, k_DL: Tensor | ImplicitFilter, skip_D: Tensor
) -> None:
    """Refuse what doesn't fit projections of so many (rows, positions) and channels."""
    width = (k_DL if isinstance(k_DL, Tensor) else k_DL.w_DF).shape[0]
    if channels != 3 * width:
        raise ValueError(f"u_BLC must have {3 * width} channels, to fit the others; got {channels}.")
    check_shapes(w_CW=(w_CW, (channels, w_CW.shape[-1])), bias_C=(bias_C, (channels,)), skip_D=(skip_D, (width,)))
    taps = k_DL.shape[1] if isinstance(k_DL, Tensor) else k_DL.h_FL.shape[1]
    complete = isinstance(k_DL, Tensor) and k_DL.is_complex()
    if taps < rows[1] and not complete:
        raise ValueError(f"The filter has {taps} taps, the sequence {rows[1]}; a filter must cover it.")


def _numba_takes(u_BLC: Tensor, w_CW: Tensor, *others: Tensor) -> bool:
    one_dtype = {tensor.dtype for tensor in (u_BLC, w_CW, *others)} == {torch.float32}
    return u_BLC.device.type == "cpu" and w_CW.shape[1] == 3 and one_dtype and not torch.compiler.is_compiling()


def _hyena_conv_kept(u_BLC: Tensor, w_CW: Tensor, bias_C: Tensor, k_DF: Tensor, skip_D: Tensor) -> Tensor:
    """Mix with filters whose transform was kept; backends that can't use it make the filters of it again."""
    length = u_BLC.shape[1]
    size = good_size(2 * length - 1)
    if k_DF.shape[1] != size // 2 + 1:
        raise ValueError(
            f"The filter's transform has {k_DF.shape[1]} frequencies; a sequence of {length} takes {size // 2 + 1}."
        )
    takes = _numba_takes(u_BLC, w_CW, bias_C, skip_D)
    if takes and choose("hyena_conv", u_BLC.device, ["numba", "torch", "reference"]).name == "numba":
        with torch.no_grad():
            return _HyenaConv.apply(u_BLC.transpose(1, 2), w_CW, bias_C, k_DF, skip_D).transpose(1, 2)
    return hyena_conv(u_BLC, w_CW, bias_C, torch.fft.irfft(k_DF, n=size)[:, :length].to(u_BLC.dtype), skip_D)


class _HyenaConv(torch.autograd.Function):
    """The CPU's way, time contiguous: groups of channels that stay in cache, numba around torch's transforms."""

    @staticmethod
    def forward(ctx: Any, u_BCL: Tensor, w_CW: Tensor, bias_C: Tensor, k_DL: Tensor, skip_D: Tensor) -> Tensor:
        from genossm.ops.kernels import hyena_conv_numba as kernels

        u_BCL = u_BCL.contiguous()
        plan = _Plan(u_BCL)
        given = plan.split(u_BCL, w_CW, bias_C)
        y_BDL = u_BCL.new_empty(u_BCL.shape[0], plan.width, plan.length)
        keeps = any(ctx.needs_input_grad)
        kept_BDL = torch.empty_like(y_BDL) if keeps else y_BDL
        padded_BGN = plan.padded(u_BCL)
        skip, kept, y, gated = copied(skip_D), *(array(t) for t in (kept_BDL, y_BDL, padded_BGN))
        for rows in plan.groups():
            plan.run(rows, kernels.gate_in, *given, gated)
            spectrum_BGF = torch.fft.rfft(plan.part(padded_BGN, rows)).mul_(plan.spectrum(k_DL[rows]))
            conv = array(torch.fft.irfft(spectrum_BGF, n=plan.size))
            plan.run(rows, kernels.gate_out, *given, gated, conv, skip, kept, keeps, y)
        ctx.save_for_backward(u_BCL, w_CW, bias_C, k_DL, skip_D, kept_BDL if keeps else None)
        return y_BDL

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        from genossm.ops.kernels import hyena_conv_numba as kernels

        u_BCL, w_CW, bias_C, k_DL, skip_D, kept_BDL = ctx.saved_tensors
        plan = _Plan(u_BCL)
        given = plan.split(u_BCL, w_CW, bias_C)
        batch, width, length = u_BCL.shape[0], plan.width, plan.length
        du_B3DL = u_BCL.new_empty(batch, 3, width, length)
        dw_B3DX, dskip_BD = u_BCL.new_empty(batch, 3, width, 4), u_BCL.new_empty(batch, width)
        dk_DL = torch.zeros_like(k_DL)
        gated_BGN, dconv_BGN = plan.padded(u_BCL), plan.padded(u_BCL)
        scratch_B2GL = u_BCL.new_empty(batch, 2, plan.rows, length)
        kept, dy, gated, dconv = (array(t) for t in (kept_BDL, grads[0], gated_BGN, dconv_BGN))
        du, dw, dskip, scratch = (array(t) for t in (du_B3DL, dw_B3DX, dskip_BD, scratch_B2GL))
        skip = copied(skip_D)
        for rows in plan.groups():
            plan.run(rows, kernels.backward_in, *given, kept, dy, gated, dconv, du, dw, scratch)
            dconv_BGF = torch.fft.rfft(plan.part(dconv_BGN, rows))
            gated_BGF = torch.fft.rfft(plan.part(gated_BGN, rows))
            # Correlation with the input, summed over the batch, is the filter's gradient at every lag.
            lags_GF = gated_BGF.conj_physical_().mul_(dconv_BGF).sum(0)
            dk_DL[rows, :length] = torch.fft.irfft(lags_GF, n=plan.size)[:, :length]
            dconv_BGF *= plan.spectrum(k_DL[rows]).conj_physical_()
            dgated = array(torch.fft.irfft(dconv_BGF, n=plan.size))
            plan.run(rows, kernels.backward_out, *given, gated, dconv, dgated, skip, du, dw, dskip, scratch)
        dw_CX = dw_B3DX.sum(0).flatten(0, 1)
        return du_B3DL.flatten(1, 2), dw_CX[:, :3], dw_CX[:, 3], dk_DL, dskip_BD.sum(0)


class _Plan:
    """How channels are grouped: the transform's size and the channels that go through it at once."""

    def __init__(self, u_BCL: Tensor):
        self.batch, self.width, self.length = u_BCL.shape[0], u_BCL.shape[1] // 3, u_BCL.shape[2]
        self.size = good_size(2 * self.length - 1)
        self.rows = min(self.width, max(1, _GROUP // (self.size * self.batch), -(-_ROWS // self.batch)))

    def groups(self) -> list[slice]:
        """Return the groups of channels."""
        return [slice(first, min(first + self.rows, self.width)) for first in range(0, self.width, self.rows)]

    def run(self, rows: slice, kernel: Callable[..., None], *arguments: Any) -> None:
        """Run a kernel over a group, on as many threads as torch may use."""
        count = rows.stop - rows.start
        shares = min(self.batch * count, self.batch * count * self.length // _SHARE)
        run_shared(kernel, (*arguments, rows.start, count), threads_for(shares))

    def split(self, u_BCL: Tensor, w_CW: Tensor, bias_C: Tensor) -> tuple[npt.NDArray[Any], ...]:
        """Return the projections and the short convolution by (x0, x1, v) and channel."""
        shape = (3, self.width)
        return array(u_BCL.unflatten(1, shape)), copied(w_CW.unflatten(0, shape)), copied(bias_C.unflatten(0, shape))

    def padded(self, u_BCL: Tensor) -> Tensor:
        """Return a buffer of a group's transform inputs, whose end is and stays zero."""
        padded_BGN = u_BCL.new_empty(self.batch, self.rows, self.size)
        padded_BGN[..., self.length :] = 0
        return padded_BGN

    def part(self, padded_BGN: Tensor, rows: slice) -> Tensor:
        """Return what a group, the last of which may be smaller, takes of a buffer."""
        return padded_BGN[:, : rows.stop - rows.start]

    def spectrum(self, k_GL: Tensor) -> Tensor:
        """Return the transform of some filters, which may be what is given."""
        return k_GL if k_GL.is_complex() else torch.fft.rfft(k_GL[:, : self.length], n=self.size)
