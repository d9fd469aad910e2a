"""Softmax attention with rotary positions: causal or both ways, grouped heads, a cache of keys and values."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from genossm.nn.linear import linear
from genossm.ops.rotary import rotate

_FASTEST = {
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}
"""Kernels on a GPU by speed: torch alone takes flash, a third slower than cuDNN's on Hopper (measured)."""


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021, RoFormer): the two halves of a head turn against each other with position.

    Feature p of the first half and feature p of the second are turned by position * base^(-2p / P), so that a product
    of a query and a key knows only how far apart they are. It has no parameter; the layers of a model share one.

    Args:
        head_width: width P of a head, even.
        base: of the wavelengths.
        scaling: positions are divided by it (linear interpolation, Chen et al. 2023), so that a model can be taken to
            a context `scaling` times the one that it was trained on.

    Raises:
        ValueError: a value is impossible.
    """

    def __init__(self, head_width: int, base: float = 10_000.0, scaling: float = 1.0):
        super().__init__()
        if head_width % 2:
            raise ValueError(f"Rotary positions need heads of an even width; got {head_width}.")
        if base <= 1 or scaling <= 0:
            raise ValueError(f"Rotary positions need base > 1 and scaling > 0; got {base} and {scaling}.")
        self.head_width, self.base, self.scaling = head_width, base, scaling

    def angles(self, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos_LP and sin_LP of half a head's features at `length` positions from `start` on, in float64."""
        # In float32 a position of a million would be off by a twentieth of a turn.
        position_L = torch.arange(start, start + length, device=device, dtype=torch.float64) / self.scaling
        exponent_P = torch.arange(0, self.head_width, 2, device=device, dtype=torch.float64) / self.head_width
        angle_LP = position_L[:, None] * self.base**-exponent_P
        return angle_LP.cos(), angle_LP.sin()

    def forward(self, q_BLHP: Tensor, k_BLGP: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Turn queries and keys that stand at positions `start`, `start + 1`, …"""
        dtype = torch.promote_types(q_BLHP.dtype, torch.float32)
        cos_LP, sin_LP = (table_LP.to(dtype) for table_LP in self.angles(start, q_BLHP.shape[1], q_BLHP.device))
        return rotate(q_BLHP, cos_LP, sin_LP), rotate(k_BLGP, cos_LP, sin_LP)


def attend_ref(
    q_BLHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, mask_BS: Tensor | None = None, causal: bool = True
) -> Tensor:
    """Attend by the definition, O(L S) memory: the truth that `attend` is held to (Vaswani et al. 2017, equation 1)."""
    length, known, heads = q_BLHP.shape[1], k_BSGP.shape[1], q_BLHP.shape[2]
    k_BSHP, v_BSHP = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k_BSGP, v_BSGP))
    score_BHLS = torch.einsum("blhp,bshp->bhls", q_BLHP, k_BSHP) / q_BLHP.shape[-1] ** 0.5
    if causal:
        position_L = torch.arange(known - length, known, device=q_BLHP.device)
        future_LS = torch.arange(known, device=q_BLHP.device) > position_L[:, None]
        score_BHLS = score_BHLS.masked_fill(future_LS, -torch.inf)
    if mask_BS is not None:
        score_BHLS = score_BHLS.masked_fill(~mask_BS[:, None, None], -torch.inf)
    return torch.einsum("bhls,bshp->blhp", score_BHLS.softmax(-1), v_BSHP)


def attend(
    q_BLHP: Tensor,
    k_BSGP: Tensor,
    v_BSGP: Tensor,
    mask_BS: Tensor | None = None,
    causal: bool = True,
    dropout: float = 0.0,
) -> Tensor:
    """Mix values by the softmax of scaled products of queries and keys.

    On a GPU the kernels are tried in the order of their speed there: cuDNN's, flash, memory-efficient, plain.

    Args:
        q_BLHP: queries; the last of them stands where the last key stands.
        k_BSGP, v_BSGP: keys and values; each of the G heads serves H / G neighbouring heads of the queries.
        mask_BS: true at keys that may be seen; None: all. A causal call needs none: padding stands on the right.
        causal: whether a query sees only keys up to its own position.
        dropout: share of the weights that are dropped.

    Returns:
        y_BLHP.
    """
    length, known = q_BLHP.shape[1], k_BSGP.shape[1]
    seen = None if mask_BS is None else mask_BS[:, None, None]
    if causal and (mask_BS is not None or 1 < length < known):
        past_LS = torch.ones(length, known, dtype=torch.bool, device=q_BLHP.device).tril(known - length)
        seen = past_LS if seen is None else seen & past_LS
    half = q_BLHP.is_cuda and q_BLHP.dtype in (torch.float16, torch.bfloat16)
    # A kernel that the caller has switched off stays off.
    allowed = [kernel for kernel, enabled in _FASTEST.items() if enabled()]
    with sdpa_kernel(allowed, set_priority=True) if half else contextlib.nullcontext():
        y_BHLP = F.scaled_dot_product_attention(
            q_BLHP.transpose(1, 2),
            k_BSGP.transpose(1, 2),
            v_BSGP.transpose(1, 2),
            attn_mask=seen,
            dropout_p=dropout,
            is_causal=causal and seen is None and length == known,
            enable_gqa=k_BSGP.shape[2] != q_BLHP.shape[2],
        )
    return y_BHLP.transpose(1, 2)


def attend_documents(q_BLHP: Tensor, k_BLGP: Tensor, v_BLGP: Tensor, resets_BL: Tensor, dropout: float = 0.0) -> Tensor:
    """Attend causally inside each document of packed rows: no query sees a key of another document.

    Each document runs by itself, so that time and memory are those of the documents and not of the row squared.

    Args:
        q_BLHP, k_BLGP, v_BLGP: see `attend`.
        resets_BL: true where a document starts; a row's first position always does.
        dropout: share of the weights that are dropped.

    Returns:
        y_BLHP.
    """
    length = q_BLHP.shape[1]
    rows: list[Tensor] = []
    for row, resets_L in enumerate(resets_BL.tolist()):
        starts = [0, *(t for t in range(1, length) if resets_L[t])]
        sizes = [end - start for start, end in zip(starts, [*starts[1:], length], strict=True)]
        documents = zip(*(x[row : row + 1].split(sizes, dim=1) for x in (q_BLHP, k_BLGP, v_BLGP)), strict=True)
        rows.append(torch.cat([attend(q, k, v, dropout=dropout) for q, k, v in documents], dim=1))
    return torch.cat(rows)


class Attention(nn.Module):
    """Multi-head attention as a mixer: projections, rotary positions, `attend`, projection.

    Args:
        d_model: width D.
        n_head: heads H of the queries.
        n_kv_head: heads G of the keys and values (Ainslie et al. 2023, GQA), a divisor of H; None is H.
        causal: whether a position sees only those up to itself.
        rotary: turns queries and keys; None leaves the order to the rest of the model.
        qkv_bias, out_bias: whether the projections have biases.
        dropout: of the attention weights.

    Raises:
        ValueError: the heads don't divide the width, or each other.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        n_kv_head: int | None = None,
        causal: bool = True,
        rotary: Rotary | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_heads(d_model, n_head, n_kv_head)
        groups = n_head if n_kv_head is None else n_kv_head
        self.n_head, self.n_kv_head, self.head_width = n_head, groups, d_model // n_head
        self.causal, self.rotary, self.dropout = causal, rotary, dropout
        self.in_proj = nn.Linear(d_model, (n_head + 2 * groups) * self.head_width, bias=qkv_bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=out_bias)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Mix along time; `mask_BL` marks real positions and is needed only where padding could be seen: both ways."""
        q_BLHP, k_BLGP, v_BLGP = self._project(x_BLD)
        dropout = self.dropout if self.training else 0.0
        return linear(self.out_proj, attend(q_BLHP, k_BLGP, v_BLGP, mask_BL, self.causal, dropout).flatten(2))

    def init_state(self, batch_size: int) -> dict[str, Any]:
        """Return the empty cache of keys and values."""
        empty = self.in_proj.weight.new_zeros(batch_size, 0, self.n_kv_head, self.head_width)
        return {"k_BSGP": empty, "v_BSGP": empty}

    def extend(self, x_BLD: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Mix positions that follow those in the cache; returns their values and the longer cache.

        The given cache stays as it was, so that several continuations may start from it.
        """
        q_BLHP, k_BLGP, v_BLGP = self._project(x_BLD, start=state["k_BSGP"].shape[1])
        k_BSGP = torch.cat([state["k_BSGP"].to(k_BLGP.dtype), k_BLGP], dim=1)
        v_BSGP = torch.cat([state["v_BSGP"].to(v_BLGP.dtype), v_BLGP], dim=1)
        y_BLHP = attend(q_BLHP, k_BSGP, v_BSGP, causal=True)
        return self.out_proj(y_BLHP.flatten(2)), {"k_BSGP": k_BSGP, "v_BSGP": v_BSGP}

    def _project(self, x_BLD: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        heads = (self.n_head, self.n_kv_head, self.n_kv_head)
        q_BLHP, k_BLGP, v_BLGP = linear(self.in_proj, x_BLD).unflatten(-1, (-1, self.head_width)).split(heads, dim=2)
        if self.rotary is not None:
            q_BLHP, k_BLGP = self.rotary(q_BLHP, k_BLGP, start)
        return q_BLHP, k_BLGP, v_BLGP


def check_heads(d_model: int, n_head: int, n_kv_head: int | None = None) -> None:
    """Refuse heads that don't divide the width, or each other; None key-value heads are as many as `n_head`.

    Raises:
        ValueError: they don't.
    """
    if n_head < 1 or d_model % n_head:
        raise ValueError(f"d_model must be a multiple of n_head; got d_model={d_model}, n_head={n_head}.")
    if n_kv_head is not None and (n_kv_head < 1 or n_head % n_kv_head):
        raise ValueError(f"n_head must be a multiple of n_kv_head; got n_head={n_head}, n_kv_head={n_kv_head}.")
