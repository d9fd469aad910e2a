"""The Hyena operator: gated long convolutions with implicit filters (Poli et al. 2023; Nguyen et al. 2023)."""

import math
import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn

from genossm.ops.causal_conv1d import causal_conv1d
from genossm.ops.fftconv import fftconv, good_size
from genossm.ops.hyena_conv import ImplicitFilter, Projection, hyena_conv
from genossm.ops.online_conv import Taps, online_conv, online_conv_state
from genossm.ops.precision import products
from genossm.ops.sine_network import sine_network
from genossm.ops.time_last import FromTime, ToTime, from_time

_LONG = {"cpu": 1 << 13, "cuda": 1 << 18}
"""Tokens from which inference goes through a few channels at a time, by kind of device."""
_CHANNELS = {"cpu": 16, "cuda": 64}
_LEAST_CHANNELS, _ELEMENTS = 4, 1 << 23
"""A CPU takes fewer channels where one of their projections would have more elements, but never less than so many."""
_POSITIONS = 1 << 12
"""Positions that the filters' network takes at once where no gradient is needed: its layers stay in cache."""
_KEPT_BYTES = 1 << 29
"""Bytes of transformed filters that a process keeps, of all models together."""
_HALF_LENGTH = 1 << 12
"""Tokens from which float16 holds the convolutions' results as fractions of them."""
_SHORT, _SHORT_LENGTHS = 1 << 14, 8
"""Positions whose features a filter keeps, and for how many lengths: a GPU launches a dozen kernels to make them."""
_keeping: "weakref.WeakSet[HyenaFilter]" = weakref.WeakSet()
_DECAY_TARGET = 1e-2
_FAST_DECAY, _SLOW_DECAY = 0.3, 1.5


class Sin(nn.Module):
    """sin(freq * x) with one frequency a feature; the published filters share one instance over all their layers."""

    def __init__(self, width: int, frequency: float, trainable: bool = True):
        super().__init__()
        freq_1F = torch.full((1, width), float(frequency))
        self.freq = nn.Parameter(freq_1F, requires_grad=trainable)

    def forward(self, h_FL: Tensor) -> Tensor:
        return torch.sin(self.freq[0, :, None] * h_FL)


def decays(channels: int) -> Tensor:
    """Return the exponents of the filters' windows, of which each falls to 1% between 30% and 150% of the context."""
    fastest, slowest = math.log(_DECAY_TARGET) / _FAST_DECAY, math.log(_DECAY_TARGET) / _SLOW_DECAY
    return torch.linspace(slowest, fastest, channels)


class HyenaFilter(nn.Module):
    """The implicit filter: a small sinusoidal network from position to tap, under an exponential window.

    h(t) = MLP(z(t)) * (exp(-t |delta|) + shift), with t = i / (l_max - 1) in [0, 1] and z(t) the first
    (emb_dim - 1) / 2 complex exponentials of position (Hyena Hierarchy, section 3.3; HyenaDNA, appendix A.1).
    Positions are normalised by `l_max`, never by the length of the input: the filter of a shorter input is a prefix.

    Args:
        channels: filters to make: D * (order - 1).
        l_max: longest input in tokens.
        emb_dim: width of z, odd and at least 3.
        filter_order: width of the network.
        num_inner_mlps: hidden layers after the first.
        frequency: initial frequency of the sines.
        train_freq: whether the frequencies are trained.
        shift: floor of the window: the published inference code has 0.05, the published training code 0.
        modulate: whether there is a window.
        skip: whether there is a weight of the input itself, `bias`.
        own_positions: hold z (a parameter) and t instead of computing them: some published models trained z.
        own_decay: hold the decays of the window instead of computing them.
    """

    NO_WEIGHT_DECAY = "all"

    def __init__(
        self,
        channels: int,
        l_max: int,
        emb_dim: int = 5,
        filter_order: int = 64,
        num_inner_mlps: int = 2,
        frequency: float = 10.0,
        train_freq: bool = True,
        shift: float = 0.05,
        modulate: bool = True,
        skip: bool = True,
        own_positions: bool = False,
        own_decay: bool = False,
    ):
        super().__init__()
        self.l_max = l_max
        self.emb_dim = emb_dim
        self.shift = shift
        self.modulate = modulate
        self.bias = nn.Parameter(torch.randn(channels)) if skip else None
        sine = Sin(filter_order, frequency, train_freq)
        layers: list[nn.Module] = [nn.Linear(emb_dim, filter_order), sine]
        for _ in range(num_inner_mlps):
            layers += [nn.Linear(filter_order, filter_order), sine]
        layers.append(nn.Linear(filter_order, channels, bias=False))
        self.implicit_filter = nn.ModuleList(layers)
        self.register_buffer("deltas_C", decays(channels), persistent=own_decay)
        self.deltas_C: Tensor
        self._kept: tuple[tuple[Any, ...], Taps] | None = None
        self._spectrum: tuple[tuple[Any, ...], Tensor | None] | None = None
        self._positions: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self.z_LE: nn.Parameter | None = None
        self.t_L: Tensor | None = None
        if own_positions:
            z_EL, t_L = self.positions(l_max)
            self.z_LE = nn.Parameter(z_EL.T.contiguous())
            del self.t_L
            self.register_buffer("t_L", t_L)

    @property
    def skip(self) -> Tensor:
        """The weight of the input itself.

        Raises:
            RuntimeError: this filter was built without one.
        """
        if self.bias is None:
            raise RuntimeError("This filter was built without a skip weight.")
        return self.bias

    def positions(self, length: int) -> tuple[Tensor, Tensor]:
        """Return the features z_EL and the times t_L of the first `length` positions."""
        if self.z_LE is not None and self.t_L is not None:
            return self.z_LE[:length].T, self.t_L[:length]
        key = (length, self.deltas_C.device, self.deltas_C.dtype)
        if key in self._positions:
            return self._positions[key]
        device, last = self.deltas_C.device, max(self.l_max - 1, 1)
        index_L = torch.arange(length, device=device, dtype=torch.float64)
        bands = (self.emb_dim - 1) // 2
        band_K = torch.linspace(1e-4, bands - 1, bands, device=device, dtype=torch.float64)
        angle_KL = band_K[:, None] * (2 * math.pi * index_L / self.l_max)
        t_L = index_L / last
        z_EL = torch.cat([t_L[None], torch.cos(angle_KL), -torch.sin(angle_KL)])
        dtype = self.deltas_C.dtype
        made = z_EL.to(dtype), t_L.to(dtype)
        if length <= _SHORT and len(self._positions) < _SHORT_LENGTHS and _lasts():
            self._positions[key] = made
        return made

    @torch.no_grad()
    def taps(self, length: int) -> Taps:
        """Return at least `length` taps, made again only when a parameter has changed; for inference alone."""
        version = self._weights_key()
        if self._kept is None or self._kept[0] != version or self._kept[1].k_DL.shape[1] < length:
            # Twice as many as needed, so that growing inputs do not ask again at every position.
            self._kept = (version, Taps(self(min(self.l_max, max(1024, 2 * length)))))
        return self._kept[1]

    @torch.no_grad()
    def spectrum(self, length: int) -> Tensor | None:
        """Return the filters' transform for inputs of `length`, k_CF, or None where it is not kept; for inference.

        It is made when asked for again with the same weights, so that a single input does not pay memory for it, and
        only where `_KEPT_BYTES` has room; gradients drop it.
        """
        key = (length, *self._weights_key())
        if self._spectrum is None or self._spectrum[0] != key:
            self._spectrum = key, None
            return None
        if self._spectrum[1] is None:
            channels, size = self.deltas_C.shape[0], good_size(2 * length - 1)
            others = sum(other.spectrum_bytes for other in _keeping if other is not self)
            if others + channels * (size // 2 + 1) * 8 > _KEPT_BYTES:
                return None
            implicit = self.implicit(length)
            k_CF = implicit.h_FL.new_empty(channels, size // 2 + 1, dtype=torch.complex64)
            for first in range(0, channels, several := _CHANNELS["cpu"]):
                rows = slice(first, first + several)
                k_CF[rows] = torch.fft.rfft(implicit.part(rows).taps(), n=size)
            self._spectrum = key, k_CF
            _keeping.add(self)
        return self._spectrum[1]

    def forget(self) -> None:
        """Give the memory of what is kept back."""
        self._kept = self._spectrum = None

    @property
    def spectrum_bytes(self) -> int:
        """What the kept transform takes."""
        return self._spectrum[1].nbytes if self._spectrum is not None and self._spectrum[1] is not None else 0

    def _weights_key(self) -> tuple[Any, ...]:
        """Return what is another wherever the weights are."""
        tensors = [*self.parameters(), *self.buffers()]
        return tuple((t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in tensors)

    def forward(self, length: int) -> Tensor:
        """Return the first `length` taps of every filter, k_CL, in the parameters' dtype."""
        return self.implicit(length).taps()

    def implicit(self, length: int) -> ImplicitFilter:
        """Return the first `length` taps of every filter as what makes them."""
        if torch.is_grad_enabled():
            self._spectrum = None
        h_FL, t_L = self.trunk(length)
        last = cast(nn.Linear, self.implicit_filter[-1])
        if not self.modulate:
            return ImplicitFilter(h_FL, last.weight, torch.zeros_like(self.deltas_C), t_L, 0.0)
        return ImplicitFilter(h_FL, last.weight, self.deltas_C, t_L, self.shift)

    def trunk(self, length: int) -> tuple[Tensor, Tensor]:
        """Return the network's last hidden layer, which all channels share, and the times t_L."""
        # Rounded, neighbouring positions of a long context would be one and the same.
        with torch.autocast(self.deltas_C.device.type, enabled=False), products("highest"):
            z_EL, t_L = self.positions(length)
            if torch.is_grad_enabled() or z_EL.device.type != "cpu":
                return self._layers(z_EL), t_L
            pieces = z_EL.split(_POSITIONS, dim=1)
            h_FL: Tensor | None = None
            for number, piece_EL in enumerate(pieces):
                piece_FL = self._layers(piece_EL)
                if h_FL is None:
                    h_FL = piece_FL.new_empty(piece_FL.shape[0], length)
                h_FL[:, number * _POSITIONS :][:, : piece_FL.shape[1]] = piece_FL
            assert h_FL is not None
            return h_FL, t_L

    def _layers(self, z_EL: Tensor) -> Tensor:
        """Apply the network up to its last hidden layer."""
        linears = [cast(nn.Linear, layer) for layer in list(self.implicit_filter)[:-1:2]]
        freq_F = cast(Sin, self.implicit_filter[1]).freq.squeeze(0)
        return sine_network(z_EL, freq_F, [layer.weight for layer in linears], [layer.bias for layer in linears])


def _lasts() -> bool:
    """Tell whether a tensor that is made now can be read at any later time."""
    # What is made while a graph is recorded is there when it is replayed, and not before.
    recording = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return not (recording or torch.is_inference_mode_enabled() or torch.compiler.is_compiling())


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale


class HyenaOperator(nn.Module):
    """Order-O Hyena: projections, a short convolution, then O - 1 gated long convolutions.

    Args:
        d_model: width D.
        l_max: longest input in tokens.
        order: number of gates, at least 2.
        short_filter_order: taps of the short convolution.
        bidirectional: give each filter a twin over what follows, and centre the short convolution.
        dropout: on the gated value before each long convolution.
        filter_options: passed to `HyenaFilter`.

    Raises:
        ValueError: an input is longer than `l_max`.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int,
        order: int = 2,
        short_filter_order: int = 3,
        bidirectional: bool = False,
        dropout: float = 0.0,
        **filter_options: float,
    ):
        super().__init__()
        self.d_model, self.l_max, self.order, self.bidirectional = d_model, l_max, order, bidirectional
        inner = d_model * (order + 1)
        self.in_proj = nn.Linear(d_model, inner)
        self.out_proj = nn.Linear(d_model, d_model)
        self.short_filter = nn.Conv1d(inner, inner, short_filter_order, groups=inner)
        channels = d_model * (order - 1)
        self.filter_fn = HyenaFilter(channels, l_max, **filter_options)  # type: ignore[arg-type]
        self.filter_reverse_fn = HyenaFilter(channels, l_max, skip=False, **filter_options) if bidirectional else None  # type: ignore[arg-type]
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Mix along time; `mask_BL` marks real positions and is needed only where padding could be seen: both ways."""
        length = x_BLD.shape[1]
        if length > self.l_max:
            raise ValueError(
                f"The input has {length} tokens, the Hyena filter l_max={self.l_max}; shorten the input or build the"
                " model with a larger max_length."
            )
        scale = self._scale(x_BLD, length)
        # What the filters take off the values, the last product gives back, in float32 and by powers of two: exactly.
        weight_DD = _scaled(self.out_proj.weight, scale ** (1 - self.order))
        plain = self.order == 2 and not self.bidirectional and not (self.dropout.p > 0 and self.training)
        if plain and length >= _LONG.get(x_BLD.device.type, length + 1) and not torch.is_grad_enabled():
            return from_time(self._mix_groups(x_BLD, scale), weight_DD, self.out_proj.bias)
        if plain:
            y_BLD = hyena_conv(
                Projection(x_BLD, self.in_proj.weight, self.in_proj.bias),
                self.short_filter.weight.squeeze(1),
                self.short_bias,
                self.filter_fn.implicit(length).scaled(scale),
                _scaled(self.filter_fn.skip, scale),
            )
        else:
            u_BCL = cast(Tensor, ToTime.apply(x_BLD, self.in_proj.weight, self.in_proj.bias))
            y_BLD = self._mix(u_BCL, mask_BL, scale)
        return cast(Tensor, FromTime.apply(y_BLD.transpose(1, 2), weight_DD, self.out_proj.bias))

    def _scale(self, x_BLD: Tensor, length: int) -> float:
        """Return what each long convolution is multiplied by where float16 holds its result; else 1.

        A sum over so many positions soon exceeds 65,504, the largest float16: at a million it has passed ten thousand
        before the first step, since the filters stretch with the context and do not become smaller.
        """
        device = x_BLD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_BLD.dtype
        if dtype != torch.float16 or length <= _HALF_LENGTH:
            return 1.0
        bits = ((length - 1) // _HALF_LENGTH).bit_length()
        # What is given back at once must leave the weights in that range, too.
        return 0.5 ** min(bits, 16 // (self.order - 1))

    def _mix_groups(self, x_BLD: Tensor, scale: float) -> Tensor:
        """Mix a long input with no gradient, up to the output projection, time contiguous.

        Projections and filters are made for a few channels at a time.
        """
        batch, length, width = x_BLD.shape
        w_3DD, bias_3D = self.in_proj.weight.unflatten(0, (3, width)), self.in_proj.bias.unflatten(0, (3, width))
        short_3DW = self.short_filter.weight.squeeze(1).unflatten(0, (3, width))
        short_bias_3D = self.short_bias.unflatten(0, (3, width))
        on_cpu = x_BLD.device.type == "cpu" and x_BLD.dtype == torch.float32 and not torch.compiler.is_compiling()
        k_DF = self.filter_fn.spectrum(length) if on_cpu and scale == 1 else None
        filters = self.filter_fn.implicit(length).scaled(scale) if k_DF is None else None
        skip_D = _scaled(self.filter_fn.skip, scale)
        y_BDL: Tensor | None = None
        several = _CHANNELS[x_BLD.device.type]
        if x_BLD.device.type == "cpu":
            several = max(_LEAST_CHANNELS, min(several, _ELEMENTS // (batch * length)))
        for first in range(0, width, several):
            rows = slice(first, first + several)
            given = Projection(x_BLD, w_3DD[:, rows].flatten(0, 1), bias_3D[:, rows].flatten())
            short = short_3DW[:, rows].flatten(0, 1), short_bias_3D[:, rows].flatten()
            k_G = filters.part(rows) if filters is not None else cast(Tensor, k_DF)[rows]
            y_BLG = hyena_conv(given, *short, k_G, skip_D[rows])
            if y_BDL is None:
                y_BDL = y_BLG.new_empty(batch, width, length)
            y_BDL[:, rows] = y_BLG.transpose(1, 2)
        assert y_BDL is not None
        return y_BDL

    def _mix(self, u_BCL: Tensor, mask_BL: Tensor | None, scale: float) -> Tensor:
        """Mix along time for any order and direction, gate by gate."""
        length = u_BCL.shape[-1]
        if mask_BL is not None:
            u_BCL = u_BCL * mask_BL[:, None]
        u_BCL = self._short(u_BCL, length)
        if mask_BL is not None:
            u_BCL = u_BCL * mask_BL[:, None]
        *gates, v_BLD = u_BCL.transpose(1, 2).split(self.d_model, dim=-1)
        shape = (self.order - 1, self.d_model)
        k_OCL = self.filter_fn.implicit(length).scaled(scale).taps().unflatten(0, shape)
        skip_OD = _scaled(self.filter_fn.skip, scale).unflatten(0, shape)
        reverse = self.filter_reverse_fn
        r_OCL = None if reverse is None else reverse.implicit(length).scaled(scale).taps().unflatten(0, shape)
        for o, gate_BLD in enumerate(reversed(gates[1:])):
            if self.dropout.p > 0 and self.training:
                gate_BLD = self.dropout(gate_BLD)
            v_BLD = fftconv(
                v_BLD,
                k_OCL[o],
                skip_OD[o],
                None if r_OCL is None else r_OCL[o],
                gate_in_BLD=gate_BLD,
                gate_out_BLD=gates[0] if o == self.order - 2 else None,
            )
        return v_BLD

    def init_state(self, batch_size: int) -> dict[str, Any]:
        """Return the state before the first position: the short convolution's inputs, each long one's history."""
        weight = self.in_proj.weight
        lag = self.short_filter.weight.shape[-1] - 1
        convs = [online_conv_state(batch_size, self.d_model, weight) for _ in range(self.order - 1)]
        return {"short_BCW": weight.new_zeros(batch_size, weight.shape[0], lag), "convs": convs}

    @torch.no_grad()
    def extend(self, x_BLD: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Mix more positions after those that made `state`: what `forward` gives there over all, for inference."""
        u_BLC, short_BCW = causal_conv1d(
            self.in_proj(x_BLD),
            self.short_filter.weight.squeeze(1),
            self.short_bias,
            initial_state_BEW1=state["short_BCW"],
            return_state=True,
        )
        *gates, v_BLD = u_BLC.split(self.d_model, dim=-1)
        skip_OD = self.filter_fn.skip.unflatten(0, (self.order - 1, self.d_model))
        needed = state["convs"][0]["length"] + x_BLD.shape[1]
        taps = self.filter_fn.taps(needed)
        # What was met counts as much as what is to come, so that the scale is that of the whole context.
        scale = self._scale(x_BLD, self.l_max)
        convs: list[dict[str, Any]] = []
        for o, gate_BLD in enumerate(reversed(gates[1:])):
            v_BLD = _scaled(v_BLD * gate_BLD, scale)
            y_BLD, conv = online_conv(v_BLD, taps.part(o, self.d_model), state["convs"][o])
            v_BLD = y_BLD + skip_OD[o] * v_BLD
            convs.append(conv)
        weight_DD = _scaled(self.out_proj.weight, scale ** (1 - self.order))
        y_BLD = nn.functional.linear(v_BLD * gates[0], weight_DD, self.out_proj.bias)
        return y_BLD, {"short_BCW": short_BCW, "convs": convs}

    @property
    def short_bias(self) -> Tensor:
        """The short convolution's bias, which it always has."""
        assert self.short_filter.bias is not None
        return self.short_filter.bias

    def _short(self, u_BCL: Tensor, length: int) -> Tensor:
        w_CW, bias_C = self.short_filter.weight.squeeze(1), self.short_bias
        if not self.bidirectional:
            return causal_conv1d(u_BCL.transpose(1, 2), w_CW, bias_C).transpose(1, 2)
        ahead = (w_CW.shape[1] - 1) // 2
        padded_BCL = nn.functional.pad(u_BCL, (0, ahead))
        return causal_conv1d(padded_BCL.transpose(1, 2), w_CW, bias_C).transpose(1, 2)[..., ahead:]
