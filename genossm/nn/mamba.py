"""Mamba and Mamba-2 as mixers, one way and both ways (Gu & Dao 2023; Dao & Gu 2024; Schiff et al. 2024, Caduceus)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genossm.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from genossm.ops.mamba_mix import Direction, mamba_mix, select
from genossm.ops.selective_scan import selective_scan, selective_scan_step
from genossm.ops.ssd import ssd, ssd_step

STRATEGIES = ("add", "ew_multiply")
"""How the two directions of a BiMamba are joined."""


@dataclass(frozen=True, kw_only=True)
class StepInit:
    """How step sizes are drawn: log-uniform, so that a fresh layer remembers over 1 / dt_max to 1 / dt_min positions.

    Raises:
        ValueError: the range is empty or not positive.
    """

    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    """Smallest step that is drawn."""

    def __post_init__(self) -> None:
        if not 0 < self.dt_min <= self.dt_max or self.dt_init_floor <= 0:
            raise ValueError(
                "Step sizes need 0 < dt_min <= dt_max and dt_init_floor > 0; got"
                f" {self.dt_min}, {self.dt_max} and {self.dt_init_floor}."
            )

    def bias(self, width: int) -> Tensor:
        """Return drawn biases whose softplus is the step size."""
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        dt = (torch.rand(width) * (high - low) + low).exp().clamp(min=self.dt_init_floor)
        return dt + torch.log(-torch.expm1(-dt))


@dataclass(frozen=True, kw_only=True)
class MambaShape:
    """The shape of a Mamba layer, in the words of the published configs.

    Raises:
        ValueError: a value is impossible.
    """

    d_model: int
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | str = "auto"
    """Width R of the step sizes' bottleneck; "auto" is d_model / 16, rounded up."""
    dt_init: str = "random"
    """How the step sizes' projection is drawn: "random" or "constant"."""
    dt_scale: float = 1.0
    bias: bool = False
    """Whether the projections in and out have biases."""
    conv_bias: bool = True
    steps: StepInit = StepInit()

    def __post_init__(self) -> None:
        for name in ("d_state", "d_conv", "expand"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.dt_rank != "auto" and (not isinstance(self.dt_rank, int) or self.dt_rank < 1):
            raise ValueError(f"dt_rank must be 'auto' or a positive whole number; got {self.dt_rank!r}.")
        if self.dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init must be 'random' or 'constant'; got {self.dt_init!r}.")

    @property
    def d_inner(self) -> int:
        """Inner width E."""
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        """Width R of the step sizes' bottleneck."""
        return math.ceil(self.d_model / 16) if isinstance(self.dt_rank, str) else self.dt_rank


class Mamba(nn.Module):
    """A Mamba layer: projection, short convolution, selective scan, gate, projection (Mamba, section 3.4).

    Args:
        shape: see `MambaShape`.
        projections: whether it has `in_proj` and `out_proj` of its own; a tied direction of a BiMamba has none.
    """

    NO_WEIGHT_DECAY = ("A_log", "D")

    def __init__(self, shape: MambaShape, projections: bool = True):
        super().__init__()
        width, states, rank = shape.d_inner, shape.d_state, shape.rank
        self.in_proj = nn.Linear(shape.d_model, 2 * width, bias=shape.bias) if projections else None
        self.conv1d = nn.Conv1d(width, width, shape.d_conv, groups=width, bias=shape.conv_bias)
        self.x_proj = nn.Linear(width, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, width)
        self.A_log = nn.Parameter(torch.arange(1, states + 1).float().log().repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))
        self.out_proj = nn.Linear(width, shape.d_model, bias=shape.bias) if projections else None
        spread = rank**-0.5 * shape.dt_scale
        with torch.no_grad():
            if shape.dt_init == "constant":
                self.dt_proj.weight.fill_(spread)
            else:
                self.dt_proj.weight.uniform_(-spread, spread)
            self.dt_proj.bias.copy_(shape.steps.bias(width))

    def forward(
        self,
        x_BLD: Tensor,
        lengths_B: Tensor | None = None,
        resets_BL: Tensor | None = None,
        mirrored: bool = False,
    ) -> Tensor:
        """Mix along time, from left to right; `mirrored` is that of `BiMamba.forward`."""
        in_proj = _weights(self.in_proj, 1 if mirrored else None)
        y_BLE = mamba_mix(x_BLD, [self.direction(mirrored)], lengths_B, resets_BL, in_proj)
        return _project(self.out_proj, y_BLE, 0 if mirrored else None)

    def direction(self, reverse: bool = False) -> Direction:
        """Return the weights of what stands between the projections."""
        return Direction(
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_proj.bias,
            self._rates(),
            self.D,
            reverse,
        )

    def _mix_after(self, xz_BLE2: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Run what stands between the projections after `state`; returns the state after it too."""
        x_BLE, z_BLE = xz_BLE2.chunk(2, dim=-1)
        d = self.direction()
        x_BLE, conv_BEW1 = causal_conv1d(
            x_BLE,
            d.conv_EW,
            d.conv_bias_E,
            activation="silu",
            initial_state_BEW1=state["conv_BEW1"],
            return_state=True,
        )
        dt_BLE, B_BLN, C_BLN = select(x_BLE, d)
        y_BLE, ssm_BEN = selective_scan(
            x_BLE,
            dt_BLE,
            d.A_EN,
            B_BLN,
            C_BLN,
            self.D.to(x_BLE.dtype),
            z_BLE,
            d.dt_bias_E,
            initial_state_BEN=state["ssm_BEN"],
            return_state=True,
        )
        return y_BLE, {"conv_BEW1": conv_BEW1, "ssm_BEN": ssm_BEN}

    def _rates(self) -> Tensor:
        # In float32 whatever the parameters are: a rate is an exponent of an exponent.
        return -torch.exp(self.A_log.float() if self.A_log.dtype != torch.float64 else self.A_log)

    def init_state(self, batch_size: int) -> dict[str, Any]:
        """Return the state before the first position: the last W - 1 inputs and the scan's state, both zeros."""
        width, taps = self.conv1d.out_channels, self.conv1d.kernel_size[0]
        rates_EN = self._rates()
        return {
            "conv_BEW1": self.conv1d.weight.new_zeros(batch_size, width, taps - 1),
            "ssm_BEN": rates_EN.new_zeros(batch_size, *rates_EN.shape),
        }

    def extend(self, x_BLD: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Mix positions that follow those that made `state`; returns them and the state after them."""
        assert self.in_proj is not None
        assert self.out_proj is not None
        xz_BLE2 = self.in_proj(x_BLD)
        if x_BLD.shape[1] > 1:
            y_BLE, state = self._mix_after(xz_BLE2, state)
            return self.out_proj(y_BLE), state
        x_BE, z_BE = xz_BLE2[:, 0].chunk(2, dim=-1)
        x_BE, conv_BEW1 = causal_conv1d_step(
            x_BE, self.conv1d.weight[:, 0], self.conv1d.bias, state_BEW1=state["conv_BEW1"], activation="silu"
        )
        dt_BE, B_BN, C_BN = select(x_BE, self.direction())
        y_BE, ssm_BEN = selective_scan_step(
            x_BE, dt_BE, self._rates(), B_BN, C_BN, self.D, z_BE, self.dt_proj.bias, state_BEN=state["ssm_BEN"]
        )
        return self.out_proj(y_BE)[:, None], {"conv_BEW1": conv_BEW1, "ssm_BEN": ssm_BEN}


class BiMamba(nn.Module):
    """A Mamba over each direction, joined (Caduceus, section 4.1).

    Tied directions share the projections, which run once for both; each has its own convolution and scan. The right
    to left direction reads the same memory from its end, and the real part of a padded row alone.

    Args:
        shape: of both directions.
        strategy: "add" or "ew_multiply", element by element.
        tied: whether the directions share `in_proj` and `out_proj`.

    Raises:
        ValueError: there is no such strategy.
    """

    def __init__(self, shape: MambaShape, strategy: str = "add", tied: bool = True):
        super().__init__()
        if strategy not in STRATEGIES:
            raise ValueError(f"bidirectional_strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}.")
        self.strategy, self.tied = strategy, tied
        self.mamba_fwd = Mamba(shape)
        self.mamba_rev = Mamba(shape, projections=not tied)

    def forward(
        self,
        x_BLD: Tensor,
        lengths_B: Tensor | None = None,
        resets_BL: Tensor | None = None,
        mirrored: bool = False,
    ) -> Tensor:
        """Mix along time.

        Args:
            x_BLD: input.
            lengths_B, resets_BL: see the ops.
            mirrored: give what the layer would give for the row read backwards with its channels in reverse order,
                in the order of the row: the directions change places and the projections' columns and rows turn round.
        """
        fwd, rev = self.mamba_fwd.direction(mirrored), self.mamba_rev.direction(not mirrored)
        turned_in, turned_out = (1, 0) if mirrored else (None, None)
        out_fwd = self.mamba_fwd.out_proj
        assert out_fwd is not None
        if self.tied and self.strategy == "add" and out_fwd.bias is None:
            in_proj = _weights(self.mamba_fwd.in_proj, turned_in)
            return _project(out_fwd, mamba_mix(x_BLD, [fwd, rev], lengths_B, resets_BL, in_proj), turned_out)
        xz_fwd = _project(self.mamba_fwd.in_proj, x_BLD, turned_in)
        xz_rev = xz_fwd if self.tied else _project(self.mamba_rev.in_proj, x_BLD, turned_in)
        out_rev = out_fwd if self.tied else self.mamba_rev.out_proj
        y_fwd = _project(out_fwd, mamba_mix(xz_fwd, [fwd], lengths_B, resets_BL), turned_out)
        y_rev = _project(out_rev, mamba_mix(xz_rev, [rev], lengths_B, resets_BL), turned_out)
        return y_fwd + y_rev if self.strategy == "add" else y_fwd * y_rev


def _project(linear: nn.Linear | None, x: Tensor, turned: int | None) -> Tensor:
    """Apply a linear layer whose inputs (`turned` = 1) or outputs (0) stand in reverse order."""
    return F.linear(x, *_weights(linear, turned))


def _weights(linear: nn.Linear | None, turned: int | None) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of such a layer."""
    assert linear is not None
    weight, bias = linear.weight, linear.bias
    if turned is not None:
        weight = weight.flip(turned)
        bias = bias.flip(0) if bias is not None and turned == 0 else bias
    return weight, bias


@dataclass(frozen=True, kw_only=True)
class Mamba2Shape:
    """The shape of a Mamba-2 layer, in the words of the published configs.

    Raises:
        ValueError: a value is impossible.
    """

    d_model: int
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    """Width P of a head."""
    ngroups: int = 1
    """Groups G of heads that share B and C."""
    d_ssm: int | None = None
    """Width that is scanned, a multiple of headdim; the rest of the inner width is a gated MLP. None is all of it."""
    A_init_range: Sequence[float] = (1.0, 16.0)
    """Range of the decay rates of a fresh layer."""
    D_has_hdim: bool = False
    """Whether the skip has a weight a channel instead of one a head."""
    rmsnorm: bool = True
    """Whether the gated result is normalised."""
    norm_before_gate: bool = False
    dt_limit: Sequence[float | None] = (0.0, None)
    """Smallest and largest step size; None is no limit."""
    bias: bool = False
    conv_bias: bool = True
    steps: StepInit = StepInit()

    def __post_init__(self) -> None:
        for name in ("d_state", "d_conv", "expand", "headdim", "ngroups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        low, high = self.A_init_range
        least, most = self.dt_limit
        if not 0 < low <= high or least is None or least < 0 or (most is not None and most < least):
            raise ValueError(
                "A_init_range must be a range above 0 and dt_limit one from 0 on (its end may be null); got"
                f" {tuple(self.A_init_range)} and {tuple(self.dt_limit)}."
            )
        if self.scanned % self.headdim or not 0 < self.scanned <= self.d_inner:
            raise ValueError(
                f"expand * d_model (or d_ssm) must be a multiple of headdim; got {self.scanned} and"
                f" headdim={self.headdim}."
            )
        if self.heads % self.ngroups:
            raise ValueError(f"The {self.heads} heads must be a multiple of ngroups; got {self.ngroups}.")

    @property
    def d_inner(self) -> int:
        """Inner width E."""
        return self.expand * self.d_model

    @property
    def scanned(self) -> int:
        """Width that is scanned."""
        return self.d_inner if self.d_ssm is None else self.d_ssm

    @property
    def heads(self) -> int:
        """Heads H."""
        return self.scanned // self.headdim


class RMSNormGated(nn.Module):
    """RMS norm over each group of channels of y silu(z), or of y alone before the gate (Mamba-2, section 7.1)."""

    def __init__(self, width: int, groups: int, eps: float, norm_before_gate: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.groups, self.eps, self.norm_before_gate = groups, eps, norm_before_gate

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        dtype = y.dtype
        y, gate = y.float() if dtype != torch.float64 else y, F.silu(z.to(torch.promote_types(dtype, torch.float32)))
        if not self.norm_before_gate:
            y = y * gate
        parts = y.unflatten(-1, (self.groups, -1))
        y = (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.eps)).flatten(-2) * self.weight
        return (y * gate if self.norm_before_gate else y).to(dtype)


class Mamba2(nn.Module):
    """A Mamba-2 layer: one projection, short convolution, state-space dual, gated norm, projection."""

    NO_WEIGHT_DECAY = ("A_log", "D", "dt_bias")

    def __init__(self, shape: Mamba2Shape, eps: float = 1e-5):
        super().__init__()
        self.shape = shape
        mixed = shape.scanned + 2 * shape.ngroups * shape.d_state
        self.parts = [shape.d_inner - shape.scanned] * 2 + [shape.scanned, mixed, shape.heads]
        self.in_proj = nn.Linear(shape.d_model, sum(self.parts), bias=shape.bias)
        self.conv1d = nn.Conv1d(mixed, mixed, shape.d_conv, groups=mixed, bias=shape.conv_bias)
        self.dt_bias = nn.Parameter(shape.steps.bias(shape.heads))
        self.A_log = nn.Parameter(torch.empty(shape.heads).uniform_(shape.A_init_range[0], shape.A_init_range[1]).log())
        self.D = nn.Parameter(torch.ones(shape.scanned if shape.D_has_hdim else shape.heads))
        self.norm = RMSNormGated(shape.scanned, shape.ngroups, eps, shape.norm_before_gate) if shape.rmsnorm else None
        self.out_proj = nn.Linear(shape.d_inner, shape.d_model, bias=shape.bias)

    def forward(self, x_BLD: Tensor, lengths_B: Tensor | None = None, resets_BL: Tensor | None = None) -> Tensor:
        """Mix along time, from left to right."""
        return self._run(x_BLD, None, lengths_B=lengths_B, resets_BL=resets_BL)[0]

    def _run(self, x_BLD: Tensor, state: dict[str, Any] | None, **rows: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        gate, aside, z, xBC, dt = self.in_proj(x_BLD).split(self.parts, dim=-1)
        keep = state is not None
        options: dict[str, Any] = {"return_state": keep, **rows}
        mixed = causal_conv1d(
            xBC,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            activation="silu",
            initial_state_BEW1=state["conv_BEW1"] if keep else None,
            **options,
        )
        xBC, conv_BEW1 = mixed if keep else (mixed, None)
        scanned = ssd(
            *self._inputs(xBC, dt),
            z_BLHP=self._gate(z),
            dt_softplus=False,
            initial_state_BHPN=state["ssm_BHPN"] if keep else None,
            **options,
        )
        y_BLHP, ssm_BHPN = scanned if keep else (scanned, None)
        after = {"conv_BEW1": conv_BEW1, "ssm_BHPN": ssm_BHPN} if keep else {}
        return self._finish(y_BLHP.flatten(-2), z, gate, aside), after

    def _inputs(self, xBC: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return x, dt, A, B, C and D of the scan from the convolved channels and the raw step sizes."""
        shape = self.shape
        grouped = shape.ngroups * shape.d_state
        x, B, C = xBC.split([shape.scanned, grouped, grouped], dim=-1)
        low, high = shape.dt_limit
        dt = F.softplus(dt.to(torch.promote_types(dt.dtype, torch.float32)) + self.dt_bias).clamp(low, high)
        rates_H = -torch.exp(self.A_log.to(dt.dtype))
        skip = self.D.unflatten(0, (-1, shape.headdim)) if shape.D_has_hdim else self.D
        heads, groups = (-1, shape.headdim), (shape.ngroups, -1)
        return x.unflatten(-1, heads), dt, rates_H, B.unflatten(-1, groups), C.unflatten(-1, groups), skip

    def _gate(self, z: Tensor) -> Tensor | None:
        # The gated norm, where there is one, applies the gate itself.
        return None if self.norm is not None else z.unflatten(-1, (-1, self.shape.headdim))

    def _finish(self, y: Tensor, z: Tensor, gate: Tensor, aside: Tensor) -> Tensor:
        if self.norm is not None:
            y = self.norm(y, z)
        if self.parts[0]:
            y = torch.cat([F.silu(gate) * aside, y], dim=-1)
        return self.out_proj(y)

    def init_state(self, batch_size: int) -> dict[str, Any]:
        """Return the state before the first position: the last W - 1 inputs and the scan's state, both zeros."""
        shape = self.shape
        new = self.conv1d.weight.new_zeros
        dtype = torch.promote_types(self.conv1d.weight.dtype, torch.float32)
        return {
            "conv_BEW1": new(batch_size, self.conv1d.out_channels, shape.d_conv - 1),
            "ssm_BHPN": new(batch_size, shape.heads, shape.headdim, shape.d_state, dtype=dtype),
        }

    def extend(self, x_BLD: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Mix positions that follow those that made `state`; returns them and the state after them."""
        if x_BLD.shape[1] > 1:
            return self._run(x_BLD, state)
        gate, aside, z, xBC, dt = self.in_proj(x_BLD[:, 0]).split(self.parts, dim=-1)
        xBC, conv_BEW1 = causal_conv1d_step(
            xBC, self.conv1d.weight[:, 0], self.conv1d.bias, state_BEW1=state["conv_BEW1"], activation="silu"
        )
        y_BHP, ssm_BHPN = ssd_step(
            *self._inputs(xBC, dt),
            z_BHP=self._gate(z),
            state_BHPN=state["ssm_BHPN"],
            dt_softplus=False,
        )
        out_BD = self._finish(y_BHP.flatten(-2), z, gate, aside)
        return out_BD[:, None], {"conv_BEW1": conv_BEW1, "ssm_BHPN": ssm_BHPN}


class GatedMLP(nn.Module):
    """Two linear layers around a gate, y silu(g): D -> F -> D, with F rounded up to a multiple of 128."""

    def __init__(self, d_model: int, d_intermediate: int):
        super().__init__()
        width = -(-d_intermediate // 128) * 128
        self.fc1 = nn.Linear(d_model, 2 * width, bias=False)
        self.fc2 = nn.Linear(width, d_model, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        y, gate = self.fc1(x_BLD).chunk(2, dim=-1)
        return self.fc2(y * F.silu(gate))


def init_mamba_(module: nn.Module, n_layer: int, residuals_per_layer: int = 1) -> None:
    """Draw embeddings from N(0, 0.02^2), zero the projections' biases and shrink what writes into the residual.

    Linear layers keep torch's own initialisation, as in the published code; `out_proj` and `fc2` are divided by the
    square root of the number of residual branches. What draws step sizes is left alone.
    """
    for name, child in module.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=0.02)
        elif isinstance(child, nn.Linear) and leaf != "dt_proj":
            if child.bias is not None:
                nn.init.zeros_(child.bias)
            if leaf in ("out_proj", "fc2"):
                with torch.no_grad():
                    child.weight /= math.sqrt(residuals_per_layer * n_layer)
