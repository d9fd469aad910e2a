"""The selective scan on a GPU: the launches of `selective_scan_walks`, where its way is told, and its gradient."""

from functools import cache, lru_cache
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from genossm.ops.backend import triton_interpreted
from genossm.ops.kernels import selective_scan_parts, selective_scan_torch, selective_scan_walks
from genossm.ops.kernels.ahead import together
from genossm.ops.kernels.triton_launch import launch
from genossm.ops.rows import dropped_states

_PIECE_BYTES = 1 << 29
"""Memory of what the last kernel writes for the next: longer sequences go through it in pieces."""


class _Plan(NamedTuple):
    """How a kernel is run on 16 bit inputs with 16 states."""

    channels: int
    """Of a program."""
    at_once: int
    """Positions that are loaded together."""
    registers: int
    takes: float
    """Microseconds that a position takes an H100 full of its programs (in both passes where there are two)."""

    def took(self, tiles: int, width: int, length: int, processors: int) -> float:
        """Return the microseconds that so many tiles of a length take."""
        # A processor has four parts, each with 16,384 registers for its warps of 32 threads.
        rounds = tiles * -(-width // self.channels) / (processors * 4 * (512 // self.registers))
        # The last round takes between its share of a full one and all of it: fewer programs run a little faster.
        return self.takes * length * (rounds + ceil(rounds)) / 2


_PLANS = {
    "edges": _Plan(32, 8, 96, 0.88),
    "forward": _Plan(32, 4, 80, 0.84),
    "backward_adjoint": _Plan(64, 2, 255, 0.94),
    "backward_state": _Plan(32, 2, 168, 0.80),
}
_TILE_TAKES = 0.3
"""Microseconds that a tile takes beside: the scans over tiles, and the sums over tiles of parts."""


def selective_scan(
    u_BLE: Tensor,
    dt_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_E: Tensor | None = None,
    z_BLE: Tensor | None = None,
    dt_bias_E: Tensor | None = None,
    *,
    dt_softplus: bool = True,
    initial_state_BEN: Tensor | None = None,
    return_state: bool = False,
    reverse: bool = False,
    lengths_B: Tensor | None = None,
    resets_BL: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan as `genossm.ops.selective_scan` describes; width contiguous in memory is the fast case."""
    given = (u_BLE, dt_BLE, A_EN, B_BLN, C_BLN, D_E, z_BLE, dt_bias_E, initial_state_BEN)
    if u_BLE.dtype == torch.float64:
        # Double precision is for checking the others; these kernels accumulate in float32.
        return selective_scan_torch.selective_scan(
            *given[:8],
            dt_softplus=dt_softplus,
            initial_state_BEN=initial_state_BEN,
            return_state=return_state,
            reverse=reverse,
            lengths_B=lengths_B,
            resets_BL=resets_BL,
        )
    drop_BL = dropped_states(resets_BL, lengths_B, reverse)
    rows = (None if drop_BL is None else drop_BL.to(torch.int8).contiguous(), lengths_B)
    y_BLE, state_BEN = _SelectiveScan.apply(*given, *rows, dt_softplus, reverse)
    return (y_BLE, state_BEN) if return_state else y_BLE


@lru_cache(1024)
def tile_length(batch: int, length: int, width: int, halves: bool, processors: int) -> int:
    """Return a program's positions. Short sequences need short tiles, else too few of them fill a GPU.

    Where rows alone fill it, short ones are whole. The rounding of the gradients of A and dt grows with tiles, which
    only 16 bit inputs (`halves`) hide. Of these the length is best of which the programs of every kernel fill the
    GPU's `processors` in whole rounds.
    """
    if triton_interpreted():
        return 8
    if halves and length <= 1024 and batch * -(-width // 64) >= 1024:
        return -(-length // 8) * 8
    size = batch * width * length
    usual = 128 if size >= 1 << 25 else 64 if size >= 1 << 23 else 32 if size >= 1 << 20 else 16
    if not halves:
        return usual
    if size >= 1 << 26:
        usual = 256

    def took(T: int) -> float:
        tiles = batch * -(-length // T)
        return tiles * _TILE_TAKES + sum(plan.took(tiles, width, T, processors) for plan in _PLANS.values())

    return min(range(usual * 2, usual // 2 + 7 & -8, -8), key=took)


class Scan:
    """One call of the kernels: inputs in the form that they read, tiles and grids.

    Args:
        u, dt, z: (B, L, E), with any strides.
        A, B, C, D, bias: of any dtype; made float32.
        drop, lengths: marks of dropped states and real positions of each row.
        softplus_on, reverse: see `genossm.ops.selective_scan`.
        gradients: whether these are wanted of this call, rather than the result.
    """

    def __init__(
        self,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        bias: Tensor | None,
        drop: Tensor | None,
        lengths: Tensor | None,
        softplus_on: bool,
        reverse: bool,
        gradients: bool = False,
    ):
        self.u, self.dt, self.z, self.states = u, dt, z, A.shape[1]
        self.batch, self.length, self.width = u.shape
        # Sums take states by 8, matrix units rows by 16; states that are not there have neither input nor reader.
        self.N = max(8 if triton_interpreted() else 16, 1 << (self.states - 1).bit_length())
        self.D, self.bias = (None if x is None else x.float().contiguous() for x in (D, bias))
        self.rest = (self.bias, drop, lengths)
        self.T = tile_length(self.batch, self.length, self.width, u.element_size() == 2, _processors(u.device))
        self.tiles = -(-self.length // self.T)
        # Every thread loads all of B and C. In 16 bits that takes half as long; the gradients' walks would lose more by
        # unpacking them.
        dtype = torch.bfloat16 if {B.dtype, C.dtype} == {torch.bfloat16} and not gradients else torch.float32
        self.A, B, C = selective_scan_parts.prepare(A, B, C, self.N, self.tiles * self.T, dtype)
        self.B, self.C = (x.view(torch.int32) if dtype == torch.bfloat16 else x for x in (B, C))
        self.reverse = int(reverse)
        self.flags = {
            "SOFTPLUS": softplus_on, "HAS_BIAS": bias is not None, "HAS_Z": z is not None, "HAS_DROP": drop is not None,
            "HAS_LENGTHS": lengths is not None, "N": self.N, "num_warps": 1, "num_stages": 1,
        }  # fmt: skip

    def plan(self, kernel: str) -> tuple[int, dict[str, Any]]:
        """Return the groups of channels that a kernel takes, and its flags."""
        plan = _PLANS[kernel] if self.u.element_size() == 2 and self.N == 16 else _Plan(32, 2, 255, 0)
        BD = 32 if triton_interpreted() or self.width <= 32 else plan.channels
        flags = {**self.flags, "BD": BD, "U": plan.at_once}
        if plan.registers < 255:
            flags["maxnreg"] = plan.registers
        return -(-self.width // BD), flags

    def sizes(self, groups: int) -> tuple[int, ...]:
        """Return what every walk is told of the problem, the first number being one that compilers don't know."""
        return 1, self.width, self.length, self.T, self.tiles, groups

    def to_states(self, x_BEN: Tensor) -> Tensor:
        """Return a state of the caller as the kernels hold it, (B, N, E)."""
        return pad(x_BEN.float(), (0, self.N - self.states)).transpose(1, 2).contiguous()

    def from_states(self, x_BNE: Tensor) -> Tensor:
        """Return a state that the kernels made as callers know it, (B, E, N)."""
        return x_BNE[:, : self.states].transpose(1, 2)

    def enter(self, x: Tensor, first_BNE: Tensor | None, adjoint: bool) -> tuple[Tensor, Tensor]:
        """Return what enters each tile and what leaves the last one, for the state or its adjoint.

        What leaves an only tile is written by the walk that follows, which ends there.
        """
        if self.tiles == 1:
            self.last = torch.empty(self.batch, self.N, self.width, device=x.device)
            first = torch.zeros_like(self.last) if first_BNE is None else first_BNE
            return first[:, None], self.last
        edge = torch.empty(self.batch, self.tiles, self.N, self.width, device=x.device)
        decay = torch.empty(self.batch, self.tiles, self.width, device=x.device)
        groups, flags = self.plan("edges")
        launch(
            selective_scan_walks.edges, (self.tiles * groups, self.batch),
            (x, self.dt, self.z, self.C if adjoint else self.B, self.A, *self.rest, edge, decay),
            (self.reverse ^ adjoint, *self.sizes(groups), *x.stride(), *self.dt.stride(), *_strides(self.z)),
            ADJOINT=adjoint, **flags,
        )  # fmt: skip
        entering, self.last = torch.empty_like(edge), torch.empty_like(edge[:, 0])
        # 128 tiles at once hide the latency of a long chain.
        launch(
            selective_scan_walks.chain, (-(-self.width * self.N // 32), self.batch),
            (edge, decay, self.A, first_BNE, entering, self.last), (self.reverse ^ adjoint, self.width, self.tiles),
            N=self.N, HAS_FIRST=first_BNE is not None, WIDTH=32, U=128, num_warps=4,
        )  # fmt: skip
        return entering, self.last

    def forward(self, entering: Tensor, y: Tensor, add: bool = False) -> None:
        """Write the result, or add it to what is there."""
        groups, flags = self.plan("forward")
        launch(
            selective_scan_walks.forward, (self.tiles * groups, self.batch),
            (self.u, self.dt, self.z, self.B, self.C, self.A, self.D, *self.rest, entering, self.last, y),
            (int(add), self.reverse, *self.sizes(groups), *self.u.stride(), *self.dt.stride(), *_strides(self.z),
             *y.stride()),
            HAS_D=self.D is not None, **flags,
        )  # fmt: skip

    def backward(
        self,
        dy: Tensor,
        entering: Tensor,
        adjoint: Tensor,
        du: Tensor,
        ddt: Tensor,
        dz: Tensor | None,
        d_BC: Tensor,
        add: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Write the gradients of u, dt, z (added to what is there where `add`), B and C; return those of A, D, bias.

        Those of B and C are `d_BC`, (2, B, L, N) with any strides; `ddt` may be the memory of dt.
        """
        batch, length, width, N = self.batch, self.length, self.width, self.N
        from_end, end_flags = self.plan("backward_adjoint")
        from_start, start_flags = self.plan("backward_state")
        device = dy.device
        dA_parts = torch.empty_like(entering)
        dD_parts, dbias_parts = of_channels = torch.empty(2, batch, self.tiles, width, device=device)
        # 16 bit inputs don't deserve 32 bit parts.
        dtype = torch.bfloat16 if dy.dtype == torch.bfloat16 else torch.float32
        a_tile = self.T * batch * (4 * width + (from_end + from_start) * N * dtype.itemsize)
        # Pieces of one size: the GPU runs out of work at the end of each.
        pieces = -(-self.tiles * a_tile // _PIECE_BYTES)
        tiles = -(-self.tiles // pieces)
        piece = tiles * self.T
        partial = torch.empty(batch, piece, width, device=device)
        parts = [torch.empty(batch, n, piece, N, dtype=dtype, device=device) for n in (from_end, from_start)]
        # What the walk from the end leaves for the other, beside `partial` and its share of dA_parts.
        handed = torch.empty(batch, self.tiles, 2, width, device=device)
        given = (self.u, self.dt, self.z, self.B, self.C, self.A, self.D, *self.rest, entering)
        read = [s for x in (self.u, self.dt, self.z, dy) for s in _strides(x)]
        written = [s for x in (ddt, dz) for s in _strides(x)]
        precision = "bf16" if dtype == torch.bfloat16 and not triton_interpreted() else "tf32x3"
        more = {"HAS_D": self.D is not None, "PRECISION": precision}
        for first in range(0, self.tiles, tiles):
            count = min(tiles, self.tiles - first)
            launch(
                selective_scan_walks.backward_adjoint, (count * from_end, batch),
                (*given, adjoint, self.last, dy, du, partial, dA_parts, parts[0], dD_parts, handed),
                (first, piece, 1 - self.reverse, *self.sizes(from_end), *read, *du.stride()), **end_flags, **more,
            )  # fmt: skip
            launch(
                selective_scan_walks.backward_state, (count * from_start, batch),
                (*given, dy, ddt, dz, partial, dA_parts, parts[1], dbias_parts, handed),
                (int(add), first, piece, self.reverse, *self.sizes(from_start), *read, *written), **start_flags, **more,
            )  # fmt: skip
            here = slice(first * self.T, min(length, (first + count) * self.T))
            for of_groups, total in zip(parts, d_BC[:, :, here], strict=True):
                selective_scan_parts.add_groups(of_groups[:, :, : here.stop - here.start], total)
        dD, dbias = of_channels.sum((1, 2))
        dA_EN = dA_parts.flatten(0, 1).sum(0)[: self.states].T
        return dA_EN, None if self.D is None else dD, None if self.bias is None else dbias


@together
class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        u, dt, A, B, C, D, z, bias, first, *rest = given
        scan = Scan(u, dt, A, B, C, D, z, bias, *rest)
        entering, last = scan.enter(u, None if first is None else scan.to_states(first), adjoint=False)
        y = torch.empty_like(u)
        scan.forward(entering, y)
        ctx.save_for_backward(*given[:8], *rest[:2], entering)
        ctx.options, ctx.dtypes = rest[2:], tuple(None if x is None else x.dtype for x in given[:9])
        ctx.set_materialize_grads(False)
        return y, scan.from_states(last)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, D, z, bias, drop, lengths, entering = ctx.saved_tensors
        scan = Scan(u, dt, A, B, C, D, z, bias, drop, lengths, *ctx.options, gradients=True)
        dy = torch.zeros_like(u) if grads[0] is None else grads[0]
        last = None if grads[1] is None else scan.to_states(grads[1])
        adjoint, d_first = scan.enter(dy, last, adjoint=True)
        du, ddt, dz = torch.empty_like(u), torch.empty_like(dt), None if z is None else torch.empty_like(z)
        d_BC = torch.empty(2, *B.shape, dtype=torch.promote_types(B.dtype, C.dtype), device=u.device)
        dA, dD, dbias = scan.backward(dy, entering, adjoint, du, ddt, dz, d_BC)
        found = (du, ddt, dA, *d_BC, dD, dz, dbias, scan.from_states(d_first))
        typed = (None if t is None or x is None else x.to(t) for x, t in zip(found, ctx.dtypes, strict=True))
        return (*typed, None, None, None, None)


@cache
def _processors(device: torch.device) -> int:
    cuda = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if cuda else 1


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()
