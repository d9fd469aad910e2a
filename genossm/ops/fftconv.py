"""Long convolutions through the FFT: the Hyena operator's sequence mixing, with its gates and skip.

Logical layout is (batch, length, width), as everywhere above `ops`; the fast path wants time contiguous in memory,
i.e. `x_BDL.transpose(1, 2)`, and gives its result in that form.
"""

import importlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from genossm.ops import backend
from genossm.ops.rows import whole_length

_GROUP = 1 << 21
"""FFT elements handled at once: bounds the complex buffers and keeps them in cache (measured on two CPUs)."""


def good_size(n: int) -> int:
    """Return the smallest 2^a * {1, 3, 5, 9, 15} of at least n: sizes with large primes cost up to 20 times more."""
    if n < 1:
        raise ValueError(f"An FFT needs at least one element; got n={n}.")
    return min(odd << max(0, (-(-n // odd) - 1).bit_length()) for odd in (1, 3, 5, 9, 15))


def gpu_size(length: int) -> int:
    """Return the size of a GPU's transform for sequences of so many positions, which it fills up to a `whole_length`.

    It is a multiple of 16; powers of two are so much faster than most sizes that few others pay, and for long sequences
    none does.
    """
    n = 2 * whole_length(length) - 1
    power = 1 << (n - 1).bit_length()
    if 1 << 17 < power <= 1 << 23:
        return power
    return 5 * power // 8 if 5 * power // 8 >= n and power >= 256 else power


def fftconv_ref(
    x_BLD: Float[Tensor, "B L D"],
    k_DL: Float[Tensor, "D K"],
    skip_D: Float[Tensor, " D"] | None = None,
    k_reverse_DL: Float[Tensor, "D K2"] | None = None,
    gate_in_BLD: Float[Tensor, "B L D"] | None = None,
    gate_out_BLD: Float[Tensor, "B L D"] | None = None,
) -> Float[Tensor, "B L D"]:
    """Convolve by the definition, O(L^2): the truth that `fftconv` is held to.

    u = gate_in * x;  y[t] = sum_{j <= t} k[t - j] u[j] + sum_{j > t} k_reverse[j - t - 1] u[j] + skip u[t];
    the result is gate_out * y (Poli et al. 2023, Hyena Hierarchy, section 3).
    """
    length = x_BLD.shape[1]
    u_BLD = x_BLD if gate_in_BLD is None else x_BLD * gate_in_BLD
    lag_LL = torch.arange(length)[:, None] - torch.arange(length)
    toeplitz_DLL = torch.where(lag_LL >= 0, k_DL[:, lag_LL.clamp(min=0)], 0)
    if k_reverse_DL is not None:
        toeplitz_DLL = toeplitz_DLL + torch.where(lag_LL < 0, k_reverse_DL[:, (-lag_LL - 1).clamp(min=0)], 0)
    y_BLD = torch.einsum("dts,bsd->btd", toeplitz_DLL, u_BLD)
    if skip_D is not None:
        y_BLD = y_BLD + skip_D * u_BLD
    return y_BLD if gate_out_BLD is None else y_BLD * gate_out_BLD


def fftconv(
    x_BLD: Float[Tensor, "B L D"],
    k_DL: Float[Tensor, "D K"],
    skip_D: Float[Tensor, " D"] | None = None,
    k_reverse_DL: Float[Tensor, "D K2"] | None = None,
    gate_in_BLD: Float[Tensor, "B L D"] | None = None,
    gate_out_BLD: Float[Tensor, "B L D"] | None = None,
) -> Float[Tensor, "B L D"]:
    """Convolve each channel with its own filter as long as the sequence, in O(L log L).

    Channels go through the transform in groups, so that memory above the result is bounded; nothing complex is kept
    for the backward pass. Transforms are float32 (float64 for float64 input) whatever the dtype, also under autocast.

    Args:
        x_BLD: input.
        k_DL: filter over lags 0, 1, …; at least L of them, more are not used.
        skip_D: weight of the input itself.
        k_reverse_DL: filter over the lags -1, -2, … of what follows a position; None is causal.
        gate_in_BLD, gate_out_BLD: factors of the input and of the result.

    Returns:
        y_BLD, in the dtype of x.

    Raises:
        ValueError: the filter is shorter than the sequence.
    """
    length = x_BLD.shape[1]
    if k_DL.shape[1] < length:
        raise ValueError(f"The filter has {k_DL.shape[1]} taps, the sequence {length}; a filter must cover it.")
    chosen = backend.choose("fftconv", x_BLD.device, ["triton", "torch", "reference"]).name
    tensors = (x_BLD, k_DL, skip_D, k_reverse_DL, gate_in_BLD, gate_out_BLD)
    if chosen == "reference":
        return fftconv_ref(*tensors)
    if chosen == "triton" and x_BLD.dtype != torch.float64:
        kernels = importlib.import_module("genossm.ops.kernels.fftconv_triton")
        return kernels.FFTConv.apply(*tensors, gpu_size(length), torch.is_grad_enabled())
    return _FFTConv.apply(*tensors)


def _kernel_spectrum(k_DL: Tensor, k_reverse_DL: Tensor | None, length: int, size: int) -> Tensor:
    if k_reverse_DL is None:
        return torch.fft.rfft(k_DL[:, :length], n=size)
    # Lags below zero stand at the end of the period: lag -1 last.
    full_DN = k_DL.new_zeros(k_DL.shape[0], size)
    full_DN[:, :length] = k_DL[:, :length]
    if length > 1:
        full_DN[:, size - length + 1 :] = k_reverse_DL[:, : length - 1].flip(-1)
    return torch.fft.rfft(full_DN)


class _FFTConv(torch.autograd.Function):
    """The grouped transform with its own backward: three forward and two inverse transforms a group."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")
    def forward(
        ctx: Any,
        x_BLD: Tensor,
        k_DL: Tensor,
        skip_D: Tensor | None,
        k_reverse_DL: Tensor | None,
        gate_in_BLD: Tensor | None,
        gate_out_BLD: Tensor | None,
    ) -> Tensor:
        batch, length, width = x_BLD.shape
        dtype = torch.float64 if x_BLD.dtype == torch.float64 else torch.float32
        size = good_size(2 * length - 1)
        group = max(1, _GROUP // (size * batch), -(-4 // batch))
        keep_conv = gate_out_BLD is not None and any(ctx.needs_input_grad)
        y_BDL = torch.empty(batch, width, length, dtype=x_BLD.dtype, device=x_BLD.device)
        conv_BDL = torch.empty_like(y_BDL) if keep_conv else None
        for start in range(0, width, group):
            rows = slice(start, start + group)
            u = _input(x_BLD, gate_in_BLD, rows, dtype)
            spectrum = torch.fft.rfft(u, n=size)
            spectrum *= _kernel_spectrum(
                k_DL[rows].to(dtype),
                None if k_reverse_DL is None else k_reverse_DL[rows].to(dtype),
                length,
                size,
            )
            y = torch.fft.irfft(spectrum, n=size)[..., :length]
            if skip_D is not None:
                y = torch.addcmul(y, u, skip_D[rows, None].to(dtype))
            if conv_BDL is not None:
                conv_BDL[:, rows] = y
            if gate_out_BLD is not None:
                y = y * gate_out_BLD[..., rows].transpose(1, 2)
            y_BDL[:, rows] = y
        ctx.save_for_backward(x_BLD, k_DL, skip_D, k_reverse_DL, gate_in_BLD, gate_out_BLD, conv_BDL)
        ctx.plan = (dtype, size, group)
        return y_BDL.transpose(1, 2)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BLD, k_DL, skip_D, k_reverse_DL, gate_in_BLD, gate_out_BLD, conv_BDL = ctx.saved_tensors
        dtype, size, group = ctx.plan
        batch, length, width = x_BLD.shape
        dy_BDL = grads[0].transpose(1, 2)
        dx_BDL = torch.empty(batch, width, length, dtype=x_BLD.dtype, device=x_BLD.device)
        dk_DL = torch.zeros_like(k_DL)
        dskip_D = None if skip_D is None else torch.empty_like(skip_D)
        dk_reverse_DL = None if k_reverse_DL is None else torch.zeros_like(k_reverse_DL)
        dgate_in_BDL = None if gate_in_BLD is None else torch.empty_like(dx_BDL)
        dgate_out_BDL = None
        if gate_out_BLD is not None:
            dgate_out_BDL = (dy_BDL * conv_BDL).to(gate_out_BLD.dtype)
        for start in range(0, width, group):
            rows = slice(start, start + group)
            u = _input(x_BLD, gate_in_BLD, rows, dtype)
            dconv = dy_BDL[:, rows].to(dtype)
            if gate_out_BLD is not None:
                dconv = dconv * gate_out_BLD[..., rows].transpose(1, 2)
            dconv_spectrum = torch.fft.rfft(dconv, n=size)
            # Correlation with the input, summed over the batch, is the filter's gradient at every lag.
            lags = torch.fft.irfft((torch.fft.rfft(u, n=size).conj() * dconv_spectrum).sum(0), n=size)
            dk_DL[rows, :length] = lags[:, :length].to(k_DL.dtype)
            if dk_reverse_DL is not None and length > 1:
                dk_reverse_DL[rows, : length - 1] = lags[:, size - length + 1 :].flip(-1).to(k_DL.dtype)
            kernel = _kernel_spectrum(
                k_DL[rows].to(dtype),
                None if k_reverse_DL is None else k_reverse_DL[rows].to(dtype),
                length,
                size,
            )
            dconv_spectrum *= kernel.conj()
            du = torch.fft.irfft(dconv_spectrum, n=size)[..., :length]
            if skip_D is not None and dskip_D is not None:
                dskip_D[rows] = (dconv * u).sum((0, 2)).to(skip_D.dtype)
                du = torch.addcmul(du, dconv, skip_D[rows, None].to(dtype))
            if gate_in_BLD is not None and dgate_in_BDL is not None:
                dgate_in_BDL[:, rows] = du * x_BLD[..., rows].transpose(1, 2)
                du = du * gate_in_BLD[..., rows].transpose(1, 2)
            dx_BDL[:, rows] = du
        return (
            dx_BDL.transpose(1, 2),
            dk_DL,
            dskip_D,
            dk_reverse_DL,
            None if dgate_in_BDL is None else dgate_in_BDL.transpose(1, 2),
            None if dgate_out_BDL is None else dgate_out_BDL.transpose(1, 2),
        )


def _input(x_BLD: Tensor, gate_in_BLD: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor:
    u = x_BLD[..., rows].transpose(1, 2).to(dtype)
    return u if gate_in_BLD is None else u * gate_in_BLD[..., rows].transpose(1, 2)
