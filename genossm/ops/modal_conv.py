"""Long convolutions whose filters are sums of exponentials (modal form), so that they also run as a recurrence.

StripedHyena (Poli et al. 2023) and Evo (Nguyen et al. 2024): filter h[t] = Re(sum_m R_m p_m^t), state s_m of each mode.
"""

from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from genossm.ops.fftconv import fftconv

_SMALLEST = 1e-30
"""Modulus that a pole of zero is taken for: its power 0 is 1 and all others vanish."""


def modal_conv_ref(
    x_BLD: Float[Tensor, "B L D"],
    p_DM: Complex[Tensor, "D M"],
    r_DM: Complex[Tensor, "D M"],
    skip_D: Float[Tensor, " D"] | None = None,
    initial_state_BDM: Complex[Tensor, "B D M"] | None = None,
    return_state: bool = False,
) -> Any:
    """Run the recurrence, the truth that `modal_conv` is held to: s = p s + x; y = Re(sum_m r s) + skip x."""
    s_BDM = torch.zeros_like(p_DM).expand(x_BLD.shape[0], -1, -1) if initial_state_BDM is None else initial_state_BDM
    rows: list[Tensor] = []
    for x_BD in x_BLD.unbind(1):
        y_BD, s_BDM = modal_step(x_BD, s_BDM, p_DM, r_DM, skip_D)
        rows.append(y_BD)
    y_BLD = torch.stack(rows, 1)
    return (y_BLD, s_BDM) if return_state else y_BLD


def modal_step(
    x_BD: Float[Tensor, "B D"],
    s_BDM: Complex[Tensor, "B D M"],
    p_DM: Complex[Tensor, "D M"],
    r_DM: Complex[Tensor, "D M"],
    skip_D: Float[Tensor, " D"] | None = None,
) -> tuple[Float[Tensor, "B D"], Complex[Tensor, "B D M"]]:
    """Run one position; returns y_BD and the state after it, in O(D M) time and memory."""
    s_BDM = p_DM * s_BDM + x_BD[..., None]
    y_BD = (r_DM * s_BDM).real.sum(-1)
    y_BD = y_BD if skip_D is None else y_BD + skip_D * x_BD
    return y_BD.to(x_BD.dtype), s_BDM


def modal_filter(
    p_DM: Complex[Tensor, "D M"], r_DM: Complex[Tensor, "D M"], length: int, first: int = 0
) -> Float[Tensor, "D L"]:
    """Return the filters at the times `first`, `first + 1`, …: h[t] = Re(sum_m r_m p_m^t), in float32."""
    time_L = torch.arange(first, first + length, device=p_DM.device, dtype=torch.float32)
    h_DL = torch.zeros(p_DM.shape[0], length, device=p_DM.device)
    for p_D, r_D in zip(p_DM.unbind(1), r_DM.unbind(1), strict=True):
        h_DL = h_DL + _mode(p_D, r_D, time_L)
    return h_DL


def _mode(p_D: Tensor, r_D: Tensor, time_L: Tensor) -> Tensor:
    """Return Re(r p^t) of one mode, in real numbers: a complex (D, L) would take twice the memory."""
    decay_DL, angle_DL = _powers(p_D, time_L)
    return decay_DL * (r_D.real[:, None] * angle_DL.cos() - r_D.imag[:, None] * angle_DL.sin())


def _powers(p_D: Tensor, time_L: Tensor) -> tuple[Tensor, Tensor]:
    """Return |p|^t and arg(p) t."""
    modulus_D = (p_D.real.square() + p_D.imag.square()).clamp(min=_SMALLEST).log() / 2
    return torch.exp(modulus_D[:, None] * time_L), p_D.angle()[:, None] * time_L


def modal_conv(
    x_BLD: Float[Tensor, "B L D"],
    p_DM: Complex[Tensor, "D M"],
    r_DM: Complex[Tensor, "D M"],
    skip_D: Float[Tensor, " D"] | None = None,
    initial_state_BDM: Complex[Tensor, "B D M"] | None = None,
    return_state: bool = False,
) -> Any:
    """Convolve each channel with its own sum of exponentials, through FFTs: O(L log L).

    Args:
        x_BLD: input.
        p_DM: poles of M modes a channel; stable inside the unit circle.
        r_DM: residues. Only the real part of each product counts: there are no conjugate twins.
        skip_D: weight of the input itself.
        initial_state_BDM: state before the first position; None is zero.
        return_state: also return the state after the last position.

    Returns:
        y_BLD, or (y_BLD, state_BDM).
    """
    length = x_BLD.shape[1]
    y_BLD = fftconv(x_BLD, modal_filter(p_DM, r_DM, length), skip_D)
    if initial_state_BDM is not None:
        time_L = torch.arange(1, length + 1, device=x_BLD.device, dtype=torch.float32)
        y_BLD = y_BLD + _echo(p_DM, r_DM, initial_state_BDM, time_L).to(y_BLD.dtype)
    if not return_state:
        return y_BLD
    ahead_L = torch.arange(length - 1, -1, -1, device=x_BLD.device, dtype=torch.float32)
    state = torch.stack([_gather(p_D, x_BLD, ahead_L) for p_D in p_DM.unbind(1)], -1)
    if initial_state_BDM is not None:
        decay_DM1, angle_DM1 = _powers(p_DM.flatten(), torch.full((1,), float(length), device=x_BLD.device))
        state = state + initial_state_BDM * torch.polar(decay_DM1, angle_DM1).reshape(p_DM.shape)
    return y_BLD, state


def _echo(p_DM: Tensor, r_DM: Tensor, state_BDM: Tensor, time_L: Tensor) -> Tensor:
    """Return what a state adds at later times: Re(sum_m r p^t s)."""
    weight_BDM = r_DM * state_BDM
    echo_BDL = torch.zeros(*state_BDM.shape[:2], len(time_L), device=time_L.device)
    for m, p_D in enumerate(p_DM.unbind(1)):
        decay_DL, angle_DL = _powers(p_D, time_L)
        real_BD1, imaginary_BD1 = weight_BDM[..., m, None].real, weight_BDM[..., m, None].imag
        echo_BDL = echo_BDL + decay_DL * (real_BD1 * angle_DL.cos() - imaginary_BD1 * angle_DL.sin())
    return echo_BDL.transpose(1, 2)


def _gather(p_D: Tensor, x_BLD: Tensor, ahead_L: Tensor) -> Tensor:
    """Return sum_t p^(last - t) x_t of one mode, complex."""
    decay_DL, angle_DL = _powers(p_D, ahead_L)
    x_BLD = x_BLD.float()
    real_BD = torch.einsum("bld,dl->bd", x_BLD, decay_DL * angle_DL.cos())
    return torch.complex(real_BD, torch.einsum("bld,dl->bd", x_BLD, decay_DL * angle_DL.sin()))
