"""Long convolutions of long sequences on a GPU: transforms in two passes over memory, of which one does all else, too.

The columns' pass of a transform reads what it transforms as it is, half precision and gates and all, and that of its
inverse adds the skip, gates and casts; the rows between are short enough for one pass of cuFFT. A transform is taken at
the roots of i (see `fft_triton`), so that it needs no padding, and products of spectra no other bins.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from genossm.ops.kernels.fft_triton import columns, columns_back, joined, load_columns, parted, positions, store_columns
from genossm.ops.kernels.fftconv_triton import Filters, Window, element, steps, windowed
from genossm.ops.kernels.triton_launch import launch

_COLUMN, _LONGEST_ROW = 1 << 7, 1 << 14
"""Numbers of a column, the same of all sizes, so that one set of kernels serves them, and of a row, which is one pass
of cuFFT; larger transforms have longer columns."""
_TILE, _LEAST_T = 1 << 12, 1 << 5
"""Numbers of a program, and its columns at least, which are what it finds side by side in memory."""
_REGISTERS = 128
"""Registers of a thread of the kernel that would take most, so that two programs fit at once."""
_T = 1024
_WARPS = 8
# The first of a group of channels, of which there may be any number.
_jit = triton.jit(do_not_specialize=["first"])


@_jit
def _pack(
    x, gate, behind, decay, times, out, shift, L, size, rows, first, width, x_b, x_c, x_t, g_b, g_c, g_t, r_c, r_t,
    HAS_GATE: tl.constexpr, HAS_BEHIND: tl.constexpr, HAS_WINDOW: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Transform the columns of x times gate or window; filters of what follows are imaginary, lag -1 last."""
    b = tl.program_id(2).to(tl.int64)
    c = first + tl.program_id(1)
    start = tl.program_id(0) * T
    t = positions(start, rows, A, B, T)
    value = element(x, b, c, t, x_b, x_c, x_t, t < L)
    if HAS_GATE:
        value *= element(gate, b, c, t, g_b, g_c, g_t, t < L)
    if HAS_WINDOW:
        value *= windowed(decay, times, shift, c, t, L, width)
    re = parted(tl.trans(value), A, B * T)
    other = tl.zeros_like(value)
    if HAS_BEHIND:
        # Position n is lag n - size, of which the power of the root is -i times as much.
        lag = size - 1 - t
        other -= tl.load(behind + c.to(tl.int64) * r_c + lag * r_t, lag < L - 1, 0.0).to(tl.float32)
    re, im = columns(re, parted(tl.trans(other), A, B * T), start, size, A, B, T)
    at = (b * tl.num_programs(1) + tl.program_id(1)) * size * 2
    store_columns(out + at, re, im, start, rows, A, B, T)


@triton.jit
def _number(x, at, seen):
    return tl.split(tl.load(x + 2 * at[:, None] + tl.arange(0, 2)[None, :], seen[:, None], 0.0))


@triton.jit
def _store(x, at, re, im, seen):
    tl.store(x + 2 * at[:, None] + tl.arange(0, 2)[None, :], tl.join(re, im), seen[:, None])


@triton.jit
def _multiply(z, w, out, numbers, scale, T: tl.constexpr):
    """Multiply the inputs' spectra by those of the filters; `out` may be z."""
    at = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    seen = at < numbers
    a_re, a_im = _number(w, at, seen)
    at += tl.program_id(1).to(tl.int64) * numbers
    b_re, b_im = _number(z, at, seen)
    _store(out, at, scale * (a_re * b_re - a_im * b_im), scale * (a_re * b_im + a_im * b_re), seen)


@triton.jit(do_not_specialize=["batch"])
def _correlate(d, z, w, dw, numbers, batch, scale, ALONE: tl.constexpr, T: tl.constexpr):
    """Replace the gradient's spectrum d by the input's gradient, and write the filter's, summed over the batch."""
    at = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    seen = at < numbers
    w_re, w_im = _number(w, at, seen)
    s_re = tl.zeros([T], tl.float32)
    s_im = tl.zeros([T], tl.float32)
    for b in range(1 if ALONE else batch):
        there = at + b * numbers
        d_re, d_im = _number(d, there, seen)
        z_re, z_im = _number(z, there, seen)
        s_re += z_re * d_re + z_im * d_im
        s_im += z_re * d_im - z_im * d_re
        _store(d, there, scale * (w_re * d_re + w_im * d_im), scale * (w_re * d_im - w_im * d_re), seen)
    _store(dw, at, scale * s_re, scale * s_im, seen)


@_jit
def _finish(
    packed, x, gate_in, gate_out, skip, y, conv, L, size, rows, first, width,
    x_b, x_c, x_t, i_b, i_c, i_t, o_b, o_c, o_t,
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, HAS_SKIP: tl.constexpr, KEEP: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Transform columns back, add the skip, gate; also keep what is before the gate, which its gradient needs."""
    b = tl.program_id(2).to(tl.int64)
    c = first + tl.program_id(1)
    start = tl.program_id(0) * T
    at = (b * tl.num_programs(1) + tl.program_id(1)) * size * 2
    re, im = load_columns(packed + at, start, rows, A, B, T)
    re, im = columns_back(re, im, start, size, A, B, T)
    value = tl.trans(joined(re, A, B * T))
    t = positions(start, rows, A, B, T)
    seen = t < L
    if HAS_SKIP:
        u = element(x, b, c, t, x_b, x_c, x_t, seen)
        if HAS_IN:
            u *= element(gate_in, b, c, t, i_b, i_c, i_t, seen)
        value += tl.load(skip + c).to(tl.float32) * u
    to = (b * width + c) * L + t
    if KEEP:
        value = value.to(conv.dtype.element_ty)
        tl.store(conv + to, value, seen)
        # Gated as it is kept, so that a checkpointed layer, which gates it again, finds the same.
        value = value.to(tl.float32)
    if HAS_OUT:
        value *= element(gate_out, b, c, t, o_b, o_c, o_t, seen)
    tl.store(y + to, value.to(y.dtype.element_ty), seen)


@_jit
def _finish_backward(
    packed, dy, x, gate_in, gate_out, skip, conv, dx, d_in, d_out, d_skip, L, size, rows, first, width,
    y_b, y_c, y_t, x_b, x_c, x_t, i_b, i_c, i_t, o_b, o_c, o_t, d_b, d_c,
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, HAS_SKIP: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Transform the columns of the input's gradient back, add the skip's share and pass it through the gates."""
    b = tl.program_id(2).to(tl.int64)
    c = (first + tl.program_id(1)).to(tl.int64)
    start = tl.program_id(0) * T
    at = (b * tl.num_programs(1) + tl.program_id(1)) * size * 2
    re, im = load_columns(packed + at, start, rows, A, B, T)
    re, im = columns_back(re, im, start, size, A, B, T)
    du = tl.trans(joined(re, A, B * T))
    t = positions(start, rows, A, B, T)
    seen = t < L
    to = b * d_b + c * d_c + t
    dconv = element(dy, b, c, t, y_b, y_c, y_t, seen)
    if HAS_OUT:
        kept = tl.load(conv + (b * width + c) * L + t, seen, 0.0).to(tl.float32)
        tl.store(d_out + to, (dconv * kept).to(d_out.dtype.element_ty), seen)
        dconv *= element(gate_out, b, c, t, o_b, o_c, o_t, seen)
    value = element(x, b, c, t, x_b, x_c, x_t, seen)
    gate = element(gate_in, b, c, t, i_b, i_c, i_t, seen) if HAS_IN else 1.0
    if HAS_SKIP:
        du += tl.load(skip + c).to(tl.float32) * dconv
        part = tl.sum(tl.sum(dconv * value * gate, 1), 0)
        tl.store(d_skip + (b * tl.num_programs(0) + tl.program_id(0)) * width + c, part)
    if HAS_IN:
        tl.store(d_in + to, (du * value).to(d_in.dtype.element_ty), seen)
    tl.store(dx + to, (du * gate).to(dx.dtype.element_ty), seen)


@triton.jit
def _unpack_filter(
    packed, dk, dbehind, decay, times, shift, L, size, rows, width, k_c, r_c,
    HAS_BEHIND: tl.constexpr, HAS_WINDOW: tl.constexpr, A: tl.constexpr, B: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Transform the columns of the filters' gradient back and multiply by their window."""
    c = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * T
    re, im = load_columns(packed + c * size * 2, start, rows, A, B, T)
    re, im = columns_back(re, im, start, size, A, B, T)
    value = tl.trans(joined(re, A, B * T))
    t = positions(start, rows, A, B, T)
    if HAS_WINDOW:
        value *= windowed(decay, times, shift, c, t, L, width)
    tl.store(dk + c * k_c + t, value.to(dk.dtype.element_ty), t < L)
    if HAS_BEHIND:
        lag = size - 1 - t
        value = tl.trans(joined(im, A, B * T))
        tl.store(dbehind + c * r_c + lag, -value.to(dbehind.dtype.element_ty), lag < L - 1)


def convolve(
    x: Tensor,
    filters: Filters,
    skip: Tensor | None,
    behind: Tensor | None,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    size: int,
    train: bool,
    keeps: bool,
    keeps_both: bool,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Do `fftconv_triton.convolve`; the spectra of filters, and of inputs, too, are kept where it says so."""
    batch, length, width = x.shape
    step = _step(filters, size, batch)
    y = torch.empty(batch, width, length, dtype=x.dtype, device=x.device)
    conv = torch.empty_like(y) if train and gate_out is not None else None
    spectra: list[Tensor] = []
    shape, row = _shape(size), _row(size)
    for first in range(0, width, step):
        count = min(step, width - first)
        z = _spectrum(x, gate_in, None, first, count, size, length)
        w = _filter_spectrum(filters, behind, first, count, length, size)
        if keeps:
            spectra.append(w)
        if keeps_both:
            spectra.append(z)
        product = torch.empty_like(z) if keeps_both else z
        launch(
            _multiply, (triton.cdiv(count * size, _T), batch),
            tuple(torch.view_as_real(s) for s in (z, w, product)), (count * size, 1 / size), T=_T,
        )  # fmt: skip
        # The 1 / n of the inverse transform is in the product.
        del z, w
        product = torch.fft.ifft(product, norm="forward")
        launch(
            _finish, (_blocks(size), count, batch),
            (torch.view_as_real(product), x, gate_in, gate_out, skip, y, conv),
            (length, size, row, first, width, *steps(x), *steps(gate_in), *steps(gate_out)),
            HAS_IN=gate_in is not None, HAS_OUT=gate_out is not None, HAS_SKIP=skip is not None,
            KEEP=conv is not None, **shape,
        )  # fmt: skip
    return y.transpose(1, 2), conv, spectra


def convolve_backward(
    dy: Tensor,
    x: Tensor,
    filters: Filters,
    skip: Tensor | None,
    behind: Tensor | None,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    conv: Tensor | None,
    spectra: list[Tensor],
    size: int,
    dx: Tensor,
    d_in: Tensor | None,
    d_out: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Do `fftconv_triton.convolve_backward`."""
    batch, length, width = x.shape
    step, shape, row = _step(filters, size, batch), _shape(size), _row(size)
    d_skip = None if skip is None else torch.empty(batch, _blocks(size), width, device=x.device)
    d_behind = None if behind is None else torch.zeros_like(behind, memory_format=torch.contiguous_format)
    spectra = list(spectra)
    both = len(spectra) > triton.cdiv(width, step)
    for first in range(0, width, step):
        count = min(step, width - first)
        w = spectra.pop(0) if spectra else _filter_spectrum(filters, behind, first, count, length, size)
        z = spectra.pop(0) if both else _spectrum(x, gate_in, None, first, count, size, length)
        d = _spectrum(dy, gate_out, None, first, count, size, length)
        dw = torch.empty_like(w)
        launch(
            _correlate, (triton.cdiv(count * size, _T // 2),), tuple(torch.view_as_real(s) for s in (d, z, w, dw)),
            (count * size, batch, 1 / size), ALONE=batch == 1, T=_T // 2,
        )  # fmt: skip
        del z, w
        dw = torch.fft.ifft(dw, norm="forward")
        dk = filters.place(first, count, length)
        d_next = None if d_behind is None else d_behind[first : first + count]
        decay, times, shift = _rows(filters.window, first) or (None, None, 0.0)
        launch(
            _unpack_filter, (_blocks(size), count), (torch.view_as_real(dw), dk, d_next, decay, times),
            (shift, length, size, row, count, dk.stride(0), 0 if d_next is None else d_next.stride(0)),
            HAS_BEHIND=behind is not None, HAS_WINDOW=decay is not None, **shape,
        )  # fmt: skip
        filters.add(first, dk)
        del dw
        d = torch.fft.ifft(d, norm="forward")
        launch(
            _finish_backward, (_blocks(size), count, batch),
            (torch.view_as_real(d), dy, x, gate_in, gate_out, skip, conv, dx, d_in, d_out, d_skip),
            (length, size, row, first, width, *steps(dy), *steps(x), *steps(gate_in), *steps(gate_out),
             *dx.stride()[:2]),
            HAS_IN=gate_in is not None, HAS_OUT=gate_out is not None, HAS_SKIP=skip is not None, maxnreg=_REGISTERS,
            **shape,
        )  # fmt: skip
    return None if d_skip is None or skip is None else d_skip.sum((0, 1)).to(skip.dtype), d_behind


def _row(size: int) -> int:
    """Return the numbers of a row."""
    return min(_LONGEST_ROW, size // _COLUMN)


def _shape(size: int) -> dict[str, int]:
    """Return how columns are split among a program's registers, and its warps."""
    column = size // _row(size)
    first = 16 if column > 16 else max(1, column // 2)
    columns = min(_row(size), max(_LEAST_T, _TILE // column))
    return {"A": first, "B": column // first, "T": columns, "num_warps": _WARPS}


def _blocks(size: int) -> int:
    """Return the programs of a transform."""
    return _row(size) // _shape(size)["T"]


def _step(filters: Filters, size: int, batch: int) -> int:
    """Return the channels of a group."""
    return max(1, filters.group_bytes // (8 * size * batch))


def _rows(window: Window | None, first: int) -> Window | None:
    return None if window is None else window._replace(decay=window.decay[first:])


def _filter_spectrum(filters: Filters, behind: Tensor | None, first: int, count: int, length: int, size: int) -> Tensor:
    """Return the transforms of a group's filters."""
    taps = filters.rows(first, count)[None].transpose(1, 2)
    after = None if behind is None else behind[first : first + count]
    return _spectrum(taps, None, after, 0, count, size, length, _rows(filters.window, first))


def _spectrum(
    x_BLD: Tensor,
    gate_BLD: Tensor | None,
    behind_DL: Tensor | None,
    first: int,
    count: int,
    size: int,
    length: int,
    window: Window | None = None,
) -> Tensor:
    """Return the transforms of some channels, gated or windowed, as complex (B, channels, columns, rows)."""
    batch, width = x_BLD.shape[0], x_BLD.shape[2]
    row = _row(size)
    out = torch.empty(batch, count, size // row, row, dtype=torch.complex64, device=x_BLD.device)
    decay, times, shift = window or (None, None, 0.0)
    launch(
        _pack, (_blocks(size), count, batch), (x_BLD, gate_BLD, behind_DL, decay, times, torch.view_as_real(out)),
        (shift, length, size, row, first, width, *steps(x_BLD), *steps(gate_BLD),
         *((0, 0) if behind_DL is None else behind_DL.stride())),
        HAS_GATE=gate_BLD is not None, HAS_BEHIND=behind_DL is not None, HAS_WINDOW=window is not None, **_shape(size),
    )  # fmt: skip
    return torch.fft.fft(out)
