"""Long causal convolutions whose input comes one position at a time: exact, O(log^2 L) a position, amortised.

The filter is known, so what a finished block of inputs gives to later positions can be added there at once, by one
transform: after position t the last 2^i inputs, 2^i the largest power of two that divides t, give to the next 2^i
positions (relaxed multiplication, van der Hoeven 2002; Flash Inference, Oncescu et al. 2024). The newest inputs, fewer
than `BLOCK`, are multiplied out. When what was prepared runs out, all inputs so far are brought to as many positions
again as there are inputs.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from genossm.ops.fftconv import fftconv, fftconv_ref, good_size

BLOCK = 64
"""Inputs that are multiplied out; a power of two."""
LEAST = 256
"""Positions prepared at once, at least; a multiple of BLOCK."""
_GROUP = 1 << 22
"""Elements of a transform over all inputs: bounds its memory."""

OnlineState = dict[str, Any]
"""inputs_BDT: buffer of the inputs so far; ahead_BDH: what inputs before `origin` and finished blocks give to the
positions from `origin` on; length, origin: whole numbers; filled: inputs that the buffers hold (0-dimensional), which
differs from `length` in a state that another one went on from."""


class Taps:
    """A filter and the transforms of its beginnings, each made once.

    Args:
        k_DL: taps at lags 0, 1, …
    """

    def __init__(self, k_DL: Tensor):
        self.k_DL = k_DL
        self._spectra: dict[int, Tensor] = {}
        self._parts: dict[int, Taps] = {}

    def part(self, index: int, width: int) -> "Taps":
        """Return the taps of channels `index * width` to `(index + 1) * width`."""
        if index not in self._parts:
            self._parts[index] = Taps(self.k_DL[index * width : (index + 1) * width])
        return self._parts[index]

    def spectrum(self, size: int) -> Tensor:
        """Return the transform of the first `size` taps."""
        if size not in self._spectra:
            self._spectra[size] = torch.fft.rfft(self.k_DL[:, :size], n=size)
        return self._spectra[size]


def online_conv_ref(x_BLD: Float[Tensor, "B L D"], k_DL: Float[Tensor, "D K"]) -> Float[Tensor, "B L D"]:
    """Convolve all at once by the definition, the truth that any sequence of extensions and steps is held to."""
    return fftconv_ref(x_BLD, k_DL)


def online_conv_state(batch: int, width: int, like: Tensor) -> OnlineState:
    """Return the state before the first input, with the dtype and device of `like`."""
    return {
        "inputs_BDT": like.new_zeros(batch, width, 0),
        "ahead_BDH": like.new_zeros(batch, width, 0),
        "filled": torch.zeros((), dtype=torch.int64),
        "length": 0,
        "origin": 0,
    }


def online_conv(
    x_BLD: Float[Tensor, "B L D"], taps: Taps, state: OnlineState
) -> tuple[Float[Tensor, "B L D"], OnlineState]:
    """Convolve more positions after those that made `state`; buffers are shared with it where it is not used again.

    Args:
        x_BLD: inputs at the next positions; one is the fast case.
        taps: the filter; at least as many lags as inputs in all.
        state: of the same batch and width.

    Returns:
        (y_BLD, the state after it).

    Raises:
        ValueError: the filter is shorter than all inputs.
    """
    length, more = state["length"], x_BLD.shape[1]
    after = length + more
    if taps.k_DL.shape[1] < after:
        raise ValueError(f"The filter has {taps.k_DL.shape[1]} taps; position {after} needs as many.")
    state = _append(x_BLD.transpose(1, 2), state)
    if more == 1 and length > 0:
        return _step(taps, state), state
    inputs_BLD = state["inputs_BDT"][..., :after].transpose(1, 2)
    y_BLD = fftconv(inputs_BLD, taps.k_DL)[:, length:]
    return y_BLD, {**state, "ahead_BDH": state["ahead_BDH"][..., :0], "origin": after}


def _append(x_BDL: Tensor, state: OnlineState) -> OnlineState:
    length, inputs_BDT, ahead_BDH = state["length"], state["inputs_BDT"], state["ahead_BDH"]
    after, filled, origin = length + x_BDL.shape[-1], state["filled"], state["origin"]
    if int(filled) != length:
        # Another state went on from this one and wrote into its buffers: leave those to it.
        inputs_BDT, ahead_BDH, origin = inputs_BDT[..., :length].clone(), ahead_BDH[..., :0], length
        filled = filled.clone()
    if after > inputs_BDT.shape[-1]:
        grown_BDT = inputs_BDT.new_empty(*inputs_BDT.shape[:2], max(LEAST, after, after * 3 // 2 if length else after))
        grown_BDT[..., :length] = inputs_BDT[..., :length]
        inputs_BDT, ahead_BDH, filled = grown_BDT, ahead_BDH.clone(), filled.clone()
    inputs_BDT[..., length:after] = x_BDL
    filled.fill_(after)
    return {
        "inputs_BDT": inputs_BDT,
        "ahead_BDH": ahead_BDH,
        "filled": filled,
        "length": after,
        "origin": origin,
    }


def _step(taps: Taps, state: OnlineState) -> Tensor:
    """Return y_BLD of the newest input and bring what its block completes to later positions."""
    inputs_BDT, after = state["inputs_BDT"], state["length"]
    if after - 1 - state["origin"] >= state["ahead_BDH"].shape[-1]:
        state["origin"] = after - 1
        state["ahead_BDH"] = _prepare(inputs_BDT[..., : after - 1], taps)
    ahead_BDH = state["ahead_BDH"]
    count = after - state["origin"]
    newest = (count - 1) % BLOCK + 1
    y_BD = (inputs_BDT[..., after - newest : after] * taps.k_DL[:, :newest].flip(-1)).sum(-1)
    y_BD = y_BD + ahead_BDH[..., count - 1]
    if count % BLOCK == 0 and count < ahead_BDH.shape[-1]:
        block = count & -count
        spectrum_BDF = torch.fft.rfft(inputs_BDT[..., after - block : after], n=2 * block)
        given_BDQ = torch.fft.irfft(spectrum_BDF * taps.spectrum(2 * block), n=2 * block)[..., block:]
        there_BDQ = ahead_BDH[..., count : count + block]
        there_BDQ += given_BDQ[..., : there_BDQ.shape[-1]]
    return y_BD[:, None]


def _prepare(inputs_BDT: Tensor, taps: Taps) -> Tensor:
    """Return what all inputs give to the next positions: at least as many as half the inputs, as far as taps go."""
    batch, width, length = inputs_BDT.shape
    reach = min(max(LEAST, 1 << (length.bit_length() - 1)), taps.k_DL.shape[1] - length)
    ahead_BDH = inputs_BDT.new_empty(batch, width, reach)
    size = good_size(length + reach)
    group = max(1, _GROUP // (size * batch))
    for first in range(0, width, group):
        rows = slice(first, first + group)
        spectrum_BGF = torch.fft.rfft(inputs_BDT[:, rows], n=size)
        spectrum_BGF *= torch.fft.rfft(taps.k_DL[rows, : length + reach], n=size)
        ahead_BDH[:, rows] = torch.fft.irfft(spectrum_BGF, n=size)[..., length : length + reach]
    return ahead_BDH
