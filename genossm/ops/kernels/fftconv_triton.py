"""The long convolution on a GPU: two real channels to a complex transform, gates and skip fused around it.

The transform of channels a and b as a + i b costs half of two real ones that are padded alone; products with filters,
which are each channel's own, untangle bins f and n - f in registers. The kernels do what is not a transform: gate, cast
and pad into its buffer; multiply spectra; crop, add the skip, gate and cast. Channels go in groups, which bounds the
buffers. Spectra are kept for the backward pass only where they are small beside the memory of a GPU.
"""

from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from genossm.ops.kernels.ahead import together
from genossm.ops.kernels.triton_launch import launch, pieces
from genossm.ops.kernels.triton_parts import cut, of_length, whole
from genossm.ops.rows import whole_length

KEPT_BYTES = 1 << 30
"""The spectra of a call, or of its filters alone, are kept for the backward pass up to this size, else made again."""
LONG = range(1 << 18, (1 << 23) + 1)
"""Sizes, all powers of two, that `fftconv_long_triton` takes: half as many points, for it needs no padding."""
_T = 1024
_LOG2E = tl.constexpr(1.4426950408889634)
# The first pair of a group of channels, of which there may be any number.
_jit = triton.jit(do_not_specialize=["first"])


@triton.jit
def element(x, b, c, t, x_b, x_c, x_t, seen):
    """Load x of a row, channels and times, in float32."""
    return tl.load(x + b * x_b + c.to(tl.int64) * x_c + t.to(tl.int64) * x_t, seen, 0.0).to(tl.float32)


@triton.jit
def windowed(decay, times, shift, c, t, L, width):
    """Return the window of implicit filters."""
    rate = tl.abs(tl.load(decay + c, c < width, 0.0).to(tl.float32)) * _LOG2E
    return tl.exp2(-rate * tl.load(times + t, t < L, 0.0).to(tl.float32)) + shift


@_jit
def _pack(
    x, gate, behind, decay, times, out, shift, L, size, first, width, x_b, x_c, x_t, g_b, g_c, g_t, r_c, r_t,
    HAS_GATE: tl.constexpr, HAS_BEHIND: tl.constexpr, HAS_WINDOW: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Write x times gate or window, padded with zeros, as pairs; filters of what follows at the end, lag -1 last."""
    b = tl.program_id(2).to(tl.int64)
    pair = tl.program_id(1)
    t = tl.program_id(0) * T + tl.arange(0, T)
    c = 2 * (first + pair) + tl.arange(0, 2)[None, :]
    seen = (t < L)[:, None] & (c < width)
    value = element(x, b, c, t[:, None], x_b, x_c, x_t, seen)
    if HAS_GATE:
        value *= element(gate, b, c, t[:, None], g_b, g_c, g_t, seen)
    if HAS_WINDOW:
        value *= windowed(decay, times, shift, c, t[:, None], L, width)
    if HAS_BEHIND:
        lag = size - 1 - t
        tail = ((lag >= 0) & (lag < L - 1))[:, None] & (c < width)
        value += tl.load(behind + c.to(tl.int64) * r_c + lag[:, None] * r_t, tail, 0.0).to(tl.float32)
    at = (b * tl.num_programs(1) + pair) * size * 2
    tl.store(out + at + t[:, None] * 2 + tl.arange(0, 2)[None, :], value, (t < size)[:, None])


@triton.jit
def _bin(x, f, seen):
    both = tl.load(x + 2 * f[:, None] + tl.arange(0, 2)[None, :], seen[:, None], 0.0)
    return tl.split(both)


@triton.jit
def _store_bin(x, f, re, im, seen):
    tl.store(x + 2 * f[:, None] + tl.arange(0, 2)[None, :], tl.join(re, im), seen[:, None])


@triton.jit
def _untangle(f_re, f_im, g_re, g_im):
    """Return the spectra of the two real channels at bin f from the pair's bins f and n - f."""
    return 0.5 * (f_re + g_re), 0.5 * (f_im - g_im), 0.5 * (f_im + g_im), 0.5 * (g_re - f_re)


@triton.jit
def _channels(x, f, g, seen):
    f_re, f_im = _bin(x, f, seen)
    g_re, g_im = _bin(x, g, seen)
    return _untangle(f_re, f_im, g_re, g_im)


@triton.jit
def _store_channels(x, f, g, a_re, a_im, b_re, b_im, seen):
    """Write two real channels' spectra at bin f, and so at n - f, as a pair."""
    _store_bin(x, f, a_re - b_im, a_im + b_re, seen)
    _store_bin(x, g, a_re + b_im, b_re - a_im, seen)


@triton.jit
def _multiply(z, w, out, size, scale, T: tl.constexpr):
    """Multiply each channel's spectrum in z by that of its filter in w; `out` may be z."""
    pair = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + pair
    f = tl.program_id(0) * T + tl.arange(0, T)
    seen = 2 * f <= size
    g = tl.where(f == 0, 0, size - f)
    a_re, a_im, b_re, b_im = _channels(z + row * size * 2, f, g, seen)
    ka_re, ka_im, kb_re, kb_im = _channels(w + pair * size * 2, f, g, seen)
    _store_channels(
        out + row * size * 2, f, g,
        scale * (a_re * ka_re - a_im * ka_im), scale * (a_re * ka_im + a_im * ka_re),
        scale * (b_re * kb_re - b_im * kb_im), scale * (b_re * kb_im + b_im * kb_re), seen,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch"])
def _correlate(d, z, w, dw, size, batch, scale, ALONE: tl.constexpr, T: tl.constexpr):
    """Replace the gradient's spectrum d by the input's gradient, and write the filter's, summed over the batch."""
    pair = tl.program_id(1).to(tl.int64)
    f = tl.program_id(0) * T + tl.arange(0, T)
    seen = 2 * f <= size
    g = tl.where(f == 0, 0, size - f)
    ka_re, ka_im, kb_re, kb_im = _channels(w + pair * size * 2, f, g, seen)
    sa_re = tl.zeros([T], tl.float32)
    sa_im = tl.zeros([T], tl.float32)
    sb_re = tl.zeros([T], tl.float32)
    sb_im = tl.zeros([T], tl.float32)
    # One row alone, the usual case of long ones, takes a third fewer registers.
    for b in range(1 if ALONE else batch):
        at = (b * tl.num_programs(1) + pair) * size * 2
        da_re, da_im, db_re, db_im = _channels(d + at, f, g, seen)
        a_re, a_im, b_re, b_im = _channels(z + at, f, g, seen)
        sa_re += a_re * da_re + a_im * da_im
        sa_im += a_re * da_im - a_im * da_re
        sb_re += b_re * db_re + b_im * db_im
        sb_im += b_re * db_im - b_im * db_re
        _store_channels(
            d + at, f, g,
            scale * (ka_re * da_re + ka_im * da_im), scale * (ka_re * da_im - ka_im * da_re),
            scale * (kb_re * db_re + kb_im * db_im), scale * (kb_re * db_im - kb_im * db_re), seen,
        )  # fmt: skip
    _store_channels(
        dw + pair * size * 2, f, g, scale * sa_re, scale * sa_im, scale * sb_re, scale * sb_im, seen
    )  # fmt: skip


@triton.jit
def _place(T: tl.constexpr):
    """Return row, pair and positions of a program that reads a packed buffer."""
    return tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0) * T + tl.arange(0, T)


@_jit
def _finish(
    packed, x, gate_in, gate_out, skip, y, conv, L, size, first, width, x_b, x_c, x_t, i_b, i_c, i_t, o_b, o_c, o_t,
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, HAS_SKIP: tl.constexpr, KEEP: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Crop the convolution, add the skip, gate it; also keep it before the gate, which its gradient needs."""
    b, pair, t = _place(T)
    c = 2 * (first + pair) + tl.arange(0, 2)[:, None]
    seen = (t < L)[None, :] & (c < width)
    at = (b * tl.num_programs(1) + pair) * size * 2
    value = tl.load(packed + at + 2 * t[None, :] + tl.arange(0, 2)[:, None], seen, 0.0)
    if HAS_SKIP:
        u = element(x, b, c, t[None, :], x_b, x_c, x_t, seen)
        if HAS_IN:
            u *= element(gate_in, b, c, t[None, :], i_b, i_c, i_t, seen)
        value += tl.load(skip + c, c < width, 0.0).to(tl.float32) * u
    to = (b * width + c).to(tl.int64) * L + t[None, :]
    if KEEP:
        value = value.to(conv.dtype.element_ty)
        tl.store(conv + to, value, seen)
        # Gated as it is kept, so that a checkpointed layer, which gates it again, finds the same.
        value = value.to(tl.float32)
    if HAS_OUT:
        value *= element(gate_out, b, c, t[None, :], o_b, o_c, o_t, seen)
    tl.store(y + to, value.to(y.dtype.element_ty), seen)


@_jit
def _finish_backward(
    packed, dy, x, gate_in, gate_out, skip, conv, dx, d_in, d_out, d_skip, L, size, first, width,
    y_b, y_c, y_t, x_b, x_c, x_t, i_b, i_c, i_t, o_b, o_c, o_t, d_b, d_c,
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, HAS_SKIP: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Crop the input's gradient, add the skip's share and pass it through the gates."""
    b, pair, t = _place(T)
    c = 2 * (first + pair) + tl.arange(0, 2)[:, None]
    seen = (t < L)[None, :] & (c < width)
    at = (b * tl.num_programs(1) + pair) * size * 2
    du = tl.load(packed + at + 2 * t[None, :] + tl.arange(0, 2)[:, None], seen, 0.0)
    to = b * d_b + c.to(tl.int64) * d_c + t[None, :]
    dconv = element(dy, b, c, t[None, :], y_b, y_c, y_t, seen)
    if HAS_OUT:
        kept = tl.load(conv + (b * width + c).to(tl.int64) * L + t[None, :], seen, 0.0).to(tl.float32)
        tl.store(d_out + to, (dconv * kept).to(d_out.dtype.element_ty), seen)
        dconv *= element(gate_out, b, c, t[None, :], o_b, o_c, o_t, seen)
    value = element(x, b, c, t[None, :], x_b, x_c, x_t, seen)
    gate = element(gate_in, b, c, t[None, :], i_b, i_c, i_t, seen) if HAS_IN else 1.0
    if HAS_SKIP:
        du += tl.load(skip + c, c < width, 0.0).to(tl.float32) * dconv
        part = tl.sum(dconv * value * gate, 1)
        part_at = (b * tl.num_programs(0) + tl.program_id(0)) * width + 2 * (first + pair) + tl.arange(0, 2)
        tl.store(d_skip + part_at, part, 2 * (first + pair) + tl.arange(0, 2) < width)
    if HAS_IN:
        tl.store(d_in + to, (du * value).to(d_in.dtype.element_ty), seen)
    tl.store(dx + to, (du * gate).to(dx.dtype.element_ty), seen)


@triton.jit
def _unpack_filter(
    packed, dk, dbehind, decay, times, shift, L, size, width, k_c, r_c,
    HAS_BEHIND: tl.constexpr, HAS_WINDOW: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Crop the filters' gradient, times their window."""
    _, pair, t = _place(T)
    c = 2 * pair + tl.arange(0, 2)[:, None]
    side = tl.arange(0, 2)[:, None]
    at = pair.to(tl.int64) * size * 2
    seen = (t < L)[None, :] & (c < width)
    value = tl.load(packed + at + 2 * t[None, :] + side, seen, 0.0)
    if HAS_WINDOW:
        value *= windowed(decay, times, shift, c, t[None, :], L, width)
    tl.store(dk + c.to(tl.int64) * k_c + t[None, :], value.to(dk.dtype.element_ty), seen)
    if HAS_BEHIND:
        seen = (t < L - 1)[None, :] & (c < width)
        value = tl.load(packed + at + 2 * (size - 1 - t)[None, :] + side, seen, 0.0)
        tl.store(dbehind + c.to(tl.int64) * r_c + t[None, :], value.to(dbehind.dtype.element_ty), seen)


class Window(NamedTuple):
    """What taps stand under, exp(-|decay| t) + shift: tensors (D) and (L)."""

    decay: Tensor
    times: Tensor
    shift: float


class Filters(Protocol):
    """Filters that are made, and whose gradients are taken, a group of channels at a time."""

    window: Window | None
    group_bytes: int
    """Memory of one of the complex buffers of a group of channels."""

    def rows(self, first: int, count: int) -> Tensor:
        """Return the taps of some channels, (count, K), before their window."""
        ...

    def place(self, first: int, count: int, length: int) -> Tensor:
        """Return where the gradient of those taps of some channels is to be written, over the sequence's length."""
        ...

    def add(self, first: int, d_GL: Tensor) -> None:
        """Take that gradient."""
        ...


class Given:
    """Filters that are there as a whole."""

    window = None
    group_bytes = 1 << 28

    def __init__(self, k: Tensor):
        self.k = k
        self.dk: Tensor | None = None

    def rows(self, first: int, count: int) -> Tensor:
        return self.k[first : first + count]

    def place(self, first: int, count: int, length: int) -> Tensor:
        if self.dk is None:
            self.dk = torch.empty_like(self.k, memory_format=torch.contiguous_format)
            self.dk[:, length:] = 0
        return self.dk[first : first + count, :length]

    def add(self, first: int, d_GL: Tensor) -> None:
        """Nothing: it stands where it belongs."""

    def gradient(self, taps: int) -> Tensor:
        """Return the gradient of filters of which these are `fitted`."""
        assert self.dk is not None
        return of_length(self.dk, taps)


def _whole(
    x: Tensor, k: Tensor, skip: Tensor | None, behind: Tensor | None, gate_in: Tensor | None, gate_out: Tensor | None
) -> tuple[Any, ...]:
    """Return what a convolution takes, over a whole length."""
    behind = None if behind is None else fitted(behind, x.shape[1])
    gates = (None if gate is None else whole(gate) for gate in (gate_in, gate_out))
    return whole(x), fitted(k, x.shape[1]), skip, behind, *gates


def fitted(k: Tensor, length: int) -> Tensor:
    """Return filters for sequences of so many positions over a whole length: what they have more changes nothing."""
    return of_length(k, whole_length(length)) if k.shape[1] % 16 or k.shape[1] < length else k


@together
class FFTConv(torch.autograd.Function):
    """x, k, skip, k_reverse, gate_in, gate_out, size, whether gradients are on -> y; as in `genossm.ops.fftconv`."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        *tensors, size, train = given
        train = train and any(ctx.needs_input_grad)
        x, k, skip, behind, gate_in, gate_out = _whole(*tensors)
        keep = KEPT_BYTES if train else 0
        y, conv, spectra = convolve(x, Given(k), skip, behind, gate_in, gate_out, size, train=train, keep=keep)
        ctx.save_for_backward(*tensors, conv, *spectra)
        ctx.size = size
        return cut(y, tensors[0].shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Asked once: a checkpoint gives them out no second time.
        *tensors, conv, spectra = (*(saved := ctx.saved_tensors)[:7], saved[7:])
        (_, length, _), taps = tensors[0].shape, tensors[1].shape[1]
        x, k, skip, behind, gate_in, gate_out = _whole(*tensors)
        dx, d_in, d_out = (
            None if like is None else torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format)
            for like in (x, gate_in, gate_out)
        )
        filters = Given(k)
        d_skip, d_behind = convolve_backward(
            whole(grads[0]), x, filters, skip, behind, gate_in, gate_out, conv, spectra, ctx.size, dx, d_in, d_out
        )
        d_in, d_out, dx = (None if d is None else cut(d.transpose(1, 2), length) for d in (d_in, d_out, dx))
        d_behind = None if d_behind is None else of_length(d_behind, tensors[3].shape[1])
        return dx, filters.gradient(taps), d_skip, d_behind, d_in, d_out, None, None


def convolve(
    x: Tensor,
    filters: Filters,
    skip: Tensor | None,
    behind: Tensor | None,
    gate_in: Tensor | None,
    gate_out: Tensor | None,
    size: int,
    train: bool,
    keep: int,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Return the result, and for `convolve_backward` what stood before the gate and spectra of up to `keep` bytes."""
    batch, length, width = x.shape
    keeps, keeps_both = (spectra_bytes(size, width, several) <= keep for several in (0, batch))
    if size in LONG:
        from genossm.ops.kernels import fftconv_long_triton

        given = (x, filters, skip, behind, gate_in, gate_out, size // 2)
        return fftconv_long_triton.convolve(*given, train=train, keeps=keeps, keeps_both=keeps_both)
    step = _step(filters, size, batch)
    y = torch.empty(batch, width, length, dtype=x.dtype, device=x.device)
    conv = torch.empty_like(y) if train and gate_out is not None else None
    spectra: list[Tensor] = []
    for first in range(0, width, step):
        pairs = (min(step, width - first) + 1) // 2
        z = torch.fft.fft(_packed(x, gate_in, None, first, pairs, size))
        w = _filter_spectrum(filters, behind, first, min(step, width - first), length, size)
        if keeps:
            spectra.append(w)
        if keeps_both:
            spectra.append(z)
        product = torch.empty_like(z) if keeps_both else z
        launch(
            _multiply, (pieces(size // 2 + 1, _T), pairs, batch),
            (z, w, product), (size, 1 / size), T=_T,
        )  # fmt: skip
        # The 1 / n of the inverse transform is in the product.
        del z, w
        product = torch.fft.ifft(product, norm="forward")
        launch(
            _finish, (pieces(length, _T), pairs, batch),
            (product, x, gate_in, gate_out, skip, y, conv),
            (length, size, first // 2, width, *steps(x), *steps(gate_in), *steps(gate_out)),
            HAS_IN=gate_in is not None, HAS_OUT=gate_out is not None, HAS_SKIP=skip is not None,
            KEEP=conv is not None, T=_T,
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
    """Write the gradients of x and the gates into (B, D, L) with the same strides; hand the filters theirs.

    Returns:
        Those of the skip and of the filters of what follows.
    """
    batch, length, width = x.shape
    if size in LONG:
        from genossm.ops.kernels import fftconv_long_triton

        given = (dy, x, filters, skip, behind, gate_in, gate_out, conv, spectra, size // 2, dx, d_in, d_out)
        return fftconv_long_triton.convolve_backward(*given)
    blocks, step = pieces(length, _T), _step(filters, size, batch)
    d_skip = None if skip is None else torch.empty(batch, blocks, width, device=x.device)
    d_behind = None if behind is None else torch.zeros_like(behind, memory_format=torch.contiguous_format)
    spectra = list(spectra)
    both = len(spectra) > pieces(width, step)
    for first in range(0, width, step):
        pairs = (min(step, width - first) + 1) // 2
        count = min(step, width - first)
        w = spectra.pop(0) if spectra else _filter_spectrum(filters, behind, first, count, length, size)
        z = spectra.pop(0) if both else torch.fft.fft(_packed(x, gate_in, None, first, pairs, size))
        d = torch.fft.fft(_packed(dy, gate_out, None, first, pairs, size))
        dw = torch.empty_like(w)
        launch(
            _correlate, (pieces(size // 2 + 1, _T // 2), pairs),
            (d, z, w, dw), (size, batch, 1 / size),
            ALONE=batch == 1, T=_T // 2,
        )  # fmt: skip
        del z, w
        dw = torch.fft.ifft(dw, norm="forward")
        dk = filters.place(first, count, length)
        d_next = None if d_behind is None else d_behind[first : first + count]
        window = _rows(filters.window, first)
        decay, times, shift = window or (None, None, 0.0)
        launch(
            _unpack_filter, (blocks, pairs, 1), (dw, dk, d_next, decay, times),
            (shift, length, size, count, dk.stride(0), 0 if d_next is None else d_next.stride(0)),
            HAS_BEHIND=behind is not None, HAS_WINDOW=window is not None,
            T=_T,
        )  # fmt: skip
        filters.add(first, dk)
        del dw
        d = torch.fft.ifft(d, norm="forward")
        launch(
            _finish_backward, (blocks, pairs, batch),
            (d, dy, x, gate_in, gate_out, skip, conv, dx, d_in, d_out, d_skip),
            (length, size, first // 2, width, *steps(dy), *steps(x), *steps(gate_in), *steps(gate_out),
             *dx.stride()[:2]),
            HAS_IN=gate_in is not None, HAS_OUT=gate_out is not None, HAS_SKIP=skip is not None, T=_T,
        )  # fmt: skip
    return None if d_skip is None or skip is None else d_skip.sum((0, 1)).to(skip.dtype), d_behind


def spectra_bytes(size: int, width: int, batch: int) -> int:
    """Return what the spectra of the filters and of so many rows of inputs take."""
    return 4 * size * width * (1 + batch)


def _step(filters: Filters, size: int, batch: int) -> int:
    """Return the channels of a group."""
    return max(1, filters.group_bytes // (8 * size * batch)) * 2


def _filter_spectrum(filters: Filters, behind: Tensor | None, first: int, count: int, length: int, size: int) -> Tensor:
    """Return the transforms of a group's filters."""
    taps = filters.rows(first, count)[None].transpose(1, 2)
    after = None if behind is None else behind[first : first + count]
    window = _rows(filters.window, first)
    return torch.fft.fft(_packed(taps, None, after, 0, (count + 1) // 2, size, length, window))


def _rows(window: Window | None, first: int) -> Window | None:
    return None if window is None else window._replace(decay=window.decay[first:])


def _packed(
    x_BLD: Tensor,
    gate_BLD: Tensor | None,
    behind_DL: Tensor | None,
    first: int,
    pairs: int,
    size: int,
    length: int | None = None,
    window: Window | None = None,
) -> Tensor:
    """Return channels `first` to `first + 2 * pairs`, gated or windowed, padded, as complex (B, pairs, size)."""
    batch, width = x_BLD.shape[0], x_BLD.shape[2]
    out = torch.empty(batch, pairs, size, dtype=torch.complex64, device=x_BLD.device)
    decay, times, shift = window or (None, None, 0.0)
    launch(
        _pack, (pieces(size, _T), pairs, batch),
        (x_BLD, gate_BLD, behind_DL, decay, times, out),
        (shift, length or x_BLD.shape[1], size, first // 2, width,
         *steps(x_BLD), *steps(gate_BLD), *((0, 0) if behind_DL is None else behind_DL.stride())),
        HAS_GATE=gate_BLD is not None, HAS_BEHIND=behind_DL is not None, HAS_WINDOW=window is not None, T=_T,
    )  # fmt: skip
    return out


def steps(x_BLD: Tensor | None) -> tuple[int, int, int]:
    """Return the strides of batch, channel and time."""
    return (0, 0, 0) if x_BLD is None else (x_BLD.stride(0), x_BLD.stride(2), x_BLD.stride(1))
