"""The published architectures once more, as plain as they can be written, on tensors by their published names.

Written from descriptions of the published code (names, orders, places of epsilons), a row at a time and in float64, so
that they share nothing with the package. `W` is a mapping from published names without their prefix to tensors.
"""

import math

import torch
from torch.nn import functional as F


def below(tensors, prefix):
    """Return the tensors whose names start with a prefix, without it, in float64."""
    inside = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    return {name: t.double() if t.is_floating_point() else t for name, t in inside.items()}


def linear(W, name, x):
    """x W^T + b, where there is a bias."""
    return F.linear(x, W[f"{name}.weight"], W.get(f"{name}.bias"))


def rms(x, weight, eps):
    """Normalise by the root of the mean square; eps stands inside the root."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def norm(W, name, x, eps):
    """RMS norm where there is no bias, else LayerNorm."""
    if f"{name}.bias" not in W:
        return rms(x, W[f"{name}.weight"], eps)
    centred = x - x.mean(-1, keepdim=True)
    var = centred.square().mean(-1, keepdim=True)
    return centred / (var + eps).sqrt() * W[f"{name}.weight"] + W[f"{name}.bias"]


def short_conv(x_LE, w_E1W, b_E):
    """Convolve each channel with its own taps, the last of which meets the present."""
    taps = w_E1W.shape[-1]
    padded = torch.cat([x_LE.new_zeros(taps - 1, x_LE.shape[1]), x_LE])
    y = sum(padded[k : k + x_LE.shape[0]] * w_E1W[:, 0, k] for k in range(taps))
    return y if b_E is None else y + b_E


def long_conv(u_LD, k_LD):
    """Convolve causally, by the definition."""
    return torch.stack([(u_LD[: t + 1].flip(0) * k_LD[: t + 1]).sum(0) for t in range(u_LD.shape[0])])


def mamba(W, x_LD, projections=None):
    """One direction of a first-generation mixer."""
    P = projections or W
    x, z = linear(P, "in_proj", x_LD).chunk(2, -1)
    x = F.silu(short_conv(x, W["conv1d.weight"], W.get("conv1d.bias")))
    rank, states = W["dt_proj.weight"].shape[1], W["A_log"].shape[1]
    dt, B, C = linear(W, "x_proj", x).split([rank, states, states], -1)
    dt = F.softplus(linear(W, "dt_proj", dt))
    A = -torch.exp(W["A_log"])
    h, rows = torch.zeros_like(A), []
    for t in range(x.shape[0]):
        h = torch.exp(dt[t][:, None] * A) * h + dt[t][:, None] * B[t] * x[t][:, None]
        rows.append((h * C[t]).sum(-1))
    y = torch.stack(rows) + W["D"] * x
    return linear(P, "out_proj", y * F.silu(z))


def both_ways(W, x_LD, strategy, tied):
    """A mixer over each direction of a row."""
    forward = below(W, "mamba_fwd.")
    if "mamba_rev.A_log" not in W:
        return mamba(forward, x_LD)
    reverse = mamba(below(W, "mamba_rev."), x_LD.flip(0), forward if tied else None).flip(0)
    return mamba(forward, x_LD) * reverse if strategy == "ew_multiply" else mamba(forward, x_LD) + reverse


def caduceus(W, config, ids_L):
    """Return the normed states of a Caduceus on one strand, or side by side on both."""
    eps, strands = config["norm_epsilon"], config["rcps"]
    table = "embeddings.word_embeddings." + ("embedding.weight" if strands else "weight")
    leaf = ".submodule" if strands and not config["fused_add_norm"] else ""
    E = W[table]
    if strands:
        complement = W["embeddings.word_embeddings.complement_map"]
        h = torch.cat([E[ids_L], E[complement[ids_L.flip(0)]].flip(0, 1)], -1)
    else:
        h = E[ids_L]
    residual = torch.zeros_like(h)
    strategy, tied = config["bidirectional_strategy"], config["bidirectional_weight_tie"]

    def halves(f, x):
        if not strands:
            return f(x)
        a, b = x.chunk(2, -1)
        return torch.cat([f(a), f(b.flip(0, 1)).flip(0, 1)], -1)

    for i in range(config["n_layer"]):
        M = below(W, f"layers.{i}.mixer." + ("submodule." if strands else ""))
        if strands and config["fused_add_norm"]:
            h, residual = (torch.cat(x.chunk(2, -1)[::-1], -1) for x in (h, residual))
        residual = residual + h
        normed = halves(lambda x, i=i: norm(W, f"layers.{i}.norm{leaf}", x, eps), residual)
        h = halves(lambda x, M=M: both_ways(M, x, strategy, tied), normed)
    return halves(lambda x: norm(W, f"norm_f{leaf}", x, eps), h + residual)


def strand_logits(x_L2D, weight, complement):
    """Return what the language-model head of a Caduceus on both strands gives."""
    a, b = x_L2D.chunk(2, -1)
    return a @ weight.T + b.flip(-1) @ weight[complement].T


def mamba2(W, x_LD, ssm, eps=1e-5):
    """A second-generation mixer."""
    heads, groups, states = W["dt_bias"].shape[0], ssm.get("ngroups", 1), ssm["d_state"]
    scanned = heads * ssm["headdim"]
    wide = W["in_proj.weight"].shape[0] - 2 * scanned - 2 * groups * states - heads
    sizes = [wide // 2, wide // 2, scanned, scanned + 2 * groups * states, heads]
    z0, x0, z, xbc, dt = linear(W, "in_proj", x_LD).split(sizes, -1)
    xbc = F.silu(short_conv(xbc, W["conv1d.weight"], W.get("conv1d.bias")))
    x, B, C = xbc.split([scanned, groups * states, groups * states], -1)
    low, high = ssm.get("dt_limit") or (0.0, math.inf)
    dt = F.softplus(dt + W["dt_bias"]).clamp(low, math.inf if high is None else high)
    A = -torch.exp(W["A_log"])
    x, B, C = (v.unflatten(-1, (n, -1)) for v, n in ((x, heads), (B, groups), (C, groups)))
    B, C = (v.repeat_interleave(heads // groups, 1) for v in (B, C))
    h, rows = x.new_zeros(heads, ssm["headdim"], states), []
    for t in range(x.shape[0]):
        h = torch.exp(dt[t] * A)[:, None, None] * h + (dt[t][:, None] * x[t])[..., None] * B[t][:, None]
        rows.append((h * C[t][:, None]).sum(-1))
    skip = W["D"].unflatten(0, (heads, -1)) if W["D"].numel() == scanned else W["D"][:, None]
    y = (torch.stack(rows) + skip * x).flatten(1)

    def per_group(v):
        parts = v.unflatten(-1, (groups, -1))
        return (parts / (parts.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * W["norm.weight"]

    if "norm.weight" not in W:
        y = y * F.silu(z)
    elif ssm.get("norm_before_gate"):
        y = per_group(y) * F.silu(z)
    else:
        y = per_group(y * F.silu(z))
    return linear(W, "out_proj", torch.cat([F.silu(z0) * x0, y], -1))


def attention(q_LHP, k_LGP, v_LGP, causal, scale=None):
    """Softmax attention; groups of heads share keys and values."""
    heads, length = q_LHP.shape[1], q_LHP.shape[0]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k_LGP, v_LGP))
    score = torch.einsum("lhp,shp->hls", q_LHP, k) * (q_LHP.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        score = score.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
    return torch.einsum("hls,shp->lhp", score.softmax(-1), v).flatten(1)


def turned(x_LHP, base=10_000.0, scaling=1.0):
    """Rotary positions, the two halves of a head against each other."""
    half = x_LHP.shape[-1] // 2
    angle = torch.arange(x_LHP.shape[0]).double()[:, None] / scaling * base ** (-torch.arange(half).double() / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x_LHP[..., :half], x_LHP[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def mamba_lm(W, config, ids_L):
    """Return the normed states of a Mamba language model of either generation, or a hybrid."""
    ssm = config["ssm_cfg"]
    x = W["embedding.weight"][ids_L]
    for i in range(config["n_layer"]):
        L = below(W, f"layers.{i}.")
        M, u = below(L, "mixer."), norm(L, "norm", x, 1e-5)
        if i in config["attn_layer_idx"]:
            cfg = config["attn_cfg"]
            heads, groups = cfg["num_heads"], cfg.get("num_heads_kv") or cfg["num_heads"]
            q, k, v = linear(M, "in_proj", u).unflatten(-1, (heads + 2 * groups, -1)).split([heads, groups, groups], 1)
            base = cfg.get("rotary_emb_base", 10_000.0)
            x = x + linear(M, "out_proj", attention(turned(q, base), turned(k, base), v, causal=True))
        else:
            x = x + (mamba2(M, u, ssm) if "dt_bias" in M else mamba(M, u))
        if config["d_intermediate"]:
            y, gate = linear(L, "mlp.fc1", norm(L, "norm2", x, 1e-5)).chunk(2, -1)
            x = x + linear(L, "mlp.fc2", y * F.silu(gate))
    return norm(W, "norm_f", x, 1e-5)


def striped_hyena(W, config, ids_L):
    """Return the logits of a StripedHyena."""
    eps, width, heads = config["eps"], config["hidden_size"], config["num_attention_heads"]

    def root(x, scale):
        return x / (x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + eps) * scale

    x = W["embedding_layer.weight"][ids_L]
    for i in range(config["num_layers"]):
        L = below(W, f"blocks.{i}.")
        u = root(x, L["pre_norm.scale"])
        if i in config["attn_layer_idxs"]:
            groups = heads // config["proj_groups"]
            qkv = linear(L, "inner_mha_cls.Wqkv", u).unflatten(-1, (heads + 2 * groups, -1))
            q, k, v = qkv.split([heads, groups, groups], 1)
            scaled = config.get("use_interpolated_rotary_pos_emb", False)
            scaling = config.get("rotary_emb_scaling_factor", 1.0) if scaled else 1.0
            q, k = (turned(y, config["rotary_emb_base"], scaling) for y in (q, k))
            x = x + linear(L, "inner_mha_cls.out_proj", attention(q, k, v, causal=True))
        else:
            z = short_conv(
                linear(L, "projections", u), L["filter.short_filter_weight"], L.get("filter.short_filter_bias")
            )
            if config["column_split_hyena"]:
                x2, x1, v = (part.flatten(1) for part in z.unflatten(-1, (heads, 3, -1)).unbind(2))
            else:
                x2, x1, v = z.split(width, -1)
            p, r = (torch.view_as_complex(L[f"filter.{name}"][:, :, 0].contiguous()) for name in ("poles", "residues"))
            t = torch.arange(len(ids_L)).double()
            k = (r[None] * p[None] ** t[:, None, None]).sum(-1).real
            u = x1 * v
            x = x + linear(L, "out_filter_dense", (long_conv(u, k) + L["filter.D"] * u) * x2)
        u = root(x, L["post_norm.scale"])
        act = {"gelu": F.gelu, "silu": F.silu, "identity": lambda y: y}[config["mlp_activation"]]
        x = x + linear(L, "mlp.l3", act(linear(L, "mlp.l1", u)) * linear(L, "mlp.l2", u))
    if config["final_norm"]:
        x = root(x, W["norm.scale"])
    return x @ W.get("unembed.weight", W["embedding_layer.weight"]).T


def hyenadna(W, config, ids_L):
    """Return the normed states of a HyenaDNA of the original code, `config["layer"]` and all."""
    layer, width = config["layer"], config["d_model"]
    order, length = layer.get("order", 2), len(ids_L)
    x = W["embeddings.word_embeddings.weight"][ids_L]
    for i in range(config["n_layer"]):
        L = below(W, f"layers.{i}.")
        K = below(L, "mixer.filter_fn.")
        h = linear(K, "implicit_filter.0", K["pos_emb.z"][0, :length])
        freq = K.get("implicit_filter.1.freq", torch.tensor(float(layer.get("w", 1))).double())
        for j in range(layer.get("num_inner_mlps", 2)):
            h = linear(K, f"implicit_filter.{2 * j + 2}", torch.sin(freq * h))
        k = linear(K, f"implicit_filter.{2 * layer.get('num_inner_mlps', 2) + 2}", torch.sin(freq * h))
        if layer.get("modulate", True):
            window = torch.exp(-K["pos_emb.t"][0, :length] * K["modulation.deltas"][0].abs())
            k = k * (window + layer.get("shift", 0.05))
        u = linear(L, "mixer.in_proj", norm(L, "norm1", x, config.get("layer_norm_epsilon", 1e-5)))
        u = short_conv(u, L["mixer.short_filter.weight"], L["mixer.short_filter.bias"])
        *gates, v = u.split(width, -1)
        for o, gate in enumerate(reversed(gates[1:])):
            v = v * gate
            part = slice(o * width, (o + 1) * width)
            v = long_conv(v, k[:, part]) + v * K["bias"][part]
        assert len(gates) == order
        x = x + linear(L, "mixer.out_proj", v * gates[0])
        u = norm(L, "norm2", x, config.get("layer_norm_epsilon", 1e-5))
        x = x + linear(L, "mlp.fc2", F.gelu(linear(L, "mlp.fc1", u), approximate="tanh"))
    return norm(W, "ln_f", x, config.get("layer_norm_epsilon", 1e-5))


def esm_v2(W, config, ids_L):
    """Return the states of a Nucleotide Transformer of the second generation: rotary, gated, nothing masked."""
    eps, heads = config["layer_norm_eps"], config["num_attention_heads"]
    x = W["embeddings.word_embeddings.weight"][ids_L]
    for i in range(config["num_hidden_layers"]):
        L = below(W, f"encoder.layer.{i}.")
        u = norm(L, "attention.LayerNorm", x, eps)
        q, k, v = (
            linear(L, f"attention.self.{name}", u).unflatten(-1, (heads, -1)) for name in ("query", "key", "value")
        )
        q = turned(q * q.shape[-1] ** -0.5)
        x = x + linear(L, "attention.output.dense", attention(q, turned(k), v, causal=False, scale=1.0))
        gate, h = linear(L, "intermediate.dense", norm(L, "LayerNorm", x, eps)).chunk(2, -1)
        x = x + linear(L, "output.dense", F.silu(gate) * h)
    return norm(W, "encoder.emb_layer_norm_after", x, eps)
