"""The state-space dual in plain torch, for every device: matrix products inside chunks, a short scan between them.

Mamba-2, section 6: a chunk's positions see one another through a masked, decayed C B^T, and what came before the
chunk through its state.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from genossm.ops.rows import dropped_states, real_positions

_CHUNK = 64
"""Positions of a chunk: the fastest of 32 to 256 on CPUs (measured)."""


def ssd(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D: Tensor | None = None,
    z_BLHP: Tensor | None = None,
    dt_bias_H: Tensor | None = None,
    *,
    dt_softplus: bool = True,
    initial_state_BHPN: Tensor | None = None,
    return_state: bool = False,
    reverse: bool = False,
    lengths_B: Tensor | None = None,
    resets_BL: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan in chunks; see `genossm.ops.ssd.ssd`."""
    length = x_BLHP.shape[1]
    dtype = torch.float64 if x_BLHP.dtype == torch.float64 else torch.float32
    x, dt, A = x_BLHP.to(dtype), dt_BLH.to(dtype), A_H.to(dtype)
    if dt_bias_H is not None:
        dt = dt + dt_bias_H.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    real_BL = real_positions(lengths_B, length)
    if real_BL is not None:
        # A step of size 0 leaves the state as it is.
        dt = torch.where(real_BL[..., None], dt, 0.0)
        x = torch.where(real_BL[..., None, None], x, 0.0)
    drop_BL = dropped_states(resets_BL, lengths_B, reverse)
    state = (
        x.new_zeros(*x[:, 0].shape, B_BLGN.shape[-1]) if initial_state_BHPN is None else initial_state_BHPN.to(dtype)
    )
    y, state = _chunked(x, dt, A, B_BLGN.to(dtype), C_BLGN.to(dtype), drop_BL, state, reverse)
    if D is not None:
        y = y + (D if D.ndim == 2 else D[:, None]).to(dtype) * x
    if z_BLHP is not None:
        y = y * F.silu(z_BLHP.to(dtype))
    if real_BL is not None:
        y = torch.where(real_BL[..., None, None], y, 0.0)
    y = y.to(x_BLHP.dtype)
    return (y, state) if return_state else y


def _chunks(x: Tensor) -> Tensor:
    """Split time into chunks (B, K, Q, …); the last is filled up with zeros: steps of size 0."""
    missing = -x.shape[1] % _CHUNK
    padded = F.pad(x, [0, 0] * (x.ndim - 2) + [0, missing])
    return padded.unflatten(1, (-1, _CHUNK))


def _running(x: Tensor, reverse: bool) -> Tensor:
    """Sum along the third axis over what the scan has met up to and including each position."""
    total = x.cumsum(2)
    return total[:, :, -1:] - total + x if reverse else total


def _chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    drop_BL: Tensor | None,
    state: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    length, heads, groups = x.shape[1], x.shape[2], B.shape[2]
    step = _chunks(dt)
    input_ = _chunks(x) * step[..., None]
    B, C = _chunks(B), _chunks(C)
    log_decay = step * A
    met = None
    if drop_BL is not None:
        dropped = _chunks(drop_BL[..., None])
        # A dropped state has no decay; the count of drops says which positions see one another.
        log_decay = torch.where(dropped, 0.0, log_decay)
        met = _running(dropped.int(), reverse)[..., 0]
    reach = _running(log_decay, reverse)
    last = 0 if reverse else -1
    # (B, K, H, Q, Q): what each position keeps of what each earlier one added.
    between = (reach[:, :, :, None] - reach[:, :, None]).permute(0, 1, 4, 2, 3)
    order = torch.ones(_CHUNK, _CHUNK, dtype=torch.bool, device=x.device)
    seen = order.triu() if reverse else order.tril()
    to_end, from_start = reach[:, :, last, None] - reach, reach
    if met is not None:
        seen = (seen & (met[..., None] == met[..., None, :]))[:, :, None]
        to_end = to_end.masked_fill((met != met[:, :, last, None])[..., None], -torch.inf)
        from_start = from_start.masked_fill((met != 0)[..., None], -torch.inf)
    between = between.masked_fill(~seen, -torch.inf).exp()
    scores = torch.einsum("bkqgn,bksgn->bkgqs", C, B).repeat_interleave(heads // groups, dim=2)
    y = torch.einsum("bkhqs,bkshp->bkqhp", scores * between, input_)
    B_heads = B.repeat_interleave(heads // groups, dim=3)
    added = torch.einsum("bkqhn,bkqhp->bkhpn", B_heads * to_end.exp()[..., None], input_)
    kept = from_start[:, :, last].exp()
    before = [state] * added.shape[1]
    for k in reversed(range(added.shape[1])) if reverse else range(added.shape[1]):
        before[k] = state
        state = kept[:, k, :, None, None] * state + added[:, k]
    C_heads = C.repeat_interleave(heads // groups, dim=3) * from_start.exp()[..., None]
    y = y + torch.einsum("bkqhn,bkhpn->bkqhp", C_heads, torch.stack(before, dim=1))
    return y.flatten(1, 2)[:, :length], state
