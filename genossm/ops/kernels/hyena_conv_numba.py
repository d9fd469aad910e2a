"""CPU passes of `ops.hyena_conv` around its transforms: the short convolution of width 3, gates, skip, and backward.

Rows (one channel of one sequence) are independent, and time is contiguous. A call handles the channels of one group,
`start` to `start + count`; item r of it is sequence r // count, channel start + r % count, and every `jobs`-th item is
a job's. A pass reads each projection once and writes each result once. Arrays hold all channels (u_B3DL, w_3DW,
bias_3D, y_BDL, …) but for the group's own buffers (B, G, ≥ L): gated, dconv, and what transforms return.

Positions from the third on go through slices that begin at 0: an index like t - 2 might be below 0 for all that the
compiler knows, and then it does not use vectors.
"""

from typing import Any, no_type_check

from numba import njit

from genossm.ops.kernels.bodies_numba import compiled

_inlined: Any = njit(inline="always", error_model="numpy")


@_inlined
@no_type_check
def _short(u, w, bias, t):
    y = bias + w[2] * u[t]
    if t > 0:
        y += w[1] * u[t - 1]
    if t > 1:
        y += w[0] * u[t - 2]
    return y


@compiled
@no_type_check
def gate_in(u, w, bias, gated, start, count, job, jobs):
    """Write gated = x1 v."""
    length = u.shape[3]
    later = max(0, length - 2)
    for row in range(job, u.shape[0] * count, jobs):
        b, g = row // count, row % count
        d = start + g
        u1, u2, w1, w2, out = u[b, 1, d], u[b, 2, d], w[1, d], w[2, d], gated[b, g]
        b1, b2 = bias[1, d], bias[2, d]
        for t in range(min(2, length)):
            out[t] = _short(u1, w1, b1, t) * _short(u2, w2, b2, t)
        p0, p1, p2 = w1[0], w1[1], w1[2]
        q0, q1, q2 = w2[0], w2[1], w2[2]
        x0, x1, x2, v0, v1, v2, out2 = u1[:later], u1[1:], u1[2:], u2[:later], u2[1:], u2[2:], out[2:length]
        for t in range(later):
            out2[t] = (b1 + p2 * x2[t] + p1 * x1[t] + p0 * x0[t]) * (b2 + q2 * v2[t] + q1 * v1[t] + q0 * v0[t])


@compiled
@no_type_check
def gate_out(u, w, bias, gated, conv, skip, kept, keeps, y, start, count, job, jobs):
    """Write y = x0 (conv + skip gated), and the factor of x0 to `kept` where `keeps`."""
    length = u.shape[3]
    later = max(0, length - 2)
    for row in range(job, u.shape[0] * count, jobs):
        b, g = row // count, row % count
        d = start + g
        u0, w0, b0, s = u[b, 0, d], w[0, d], bias[0, d], skip[d]
        gated_row, conv_row, y_row, kept_row = gated[b, g], conv[b, g], y[b, d], kept[b, d]
        p0, p1, p2 = w0[0], w0[1], w0[2]
        if keeps:
            for t in range(length):
                kept_row[t] = conv_row[t] + s * gated_row[t]
        for t in range(min(2, length)):
            y_row[t] = (conv_row[t] + s * gated_row[t]) * _short(u0, w0, b0, t)
        x0, x1, x2, out2, conv2, gated2 = u0[:later], u0[1:], u0[2:], y_row[2:], conv_row[2:], gated_row[2:]
        for t in range(later):
            out2[t] = (conv2[t] + s * gated2[t]) * (b0 + p2 * x2[t] + p1 * x1[t] + p0 * x0[t])


@compiled
@no_type_check
def _short_backward(d, u, w, du, dw):
    """Write the gradient of the short convolution's input to `du`, of its taps and bias to dw[0..2] and dw[3]."""
    length = u.shape[0]
    later = max(0, length - 2)
    p0, p1, p2 = w[0], w[1], w[2]
    s0, s1, s2, total = d[0] * 0, d[0] * 0, d[0] * 0, d[0] * 0
    d0, d1, d2, u0, du0 = d[:later], d[1:], d[2:], u[:later], du[:later]
    for t in range(later):
        du0[t] = p2 * d0[t] + p1 * d1[t] + p0 * d2[t]
    for t in range(later):
        total += d0[t]
        s2 += d0[t] * u0[t]
        s1 += d1[t] * u0[t]
        s0 += d2[t] * u0[t]
    # The last two inputs reach fewer positions after them.
    for t in range(later, length):
        value = p2 * d[t]
        total += d[t]
        s2 += d[t] * u[t]
        if t + 1 < length:
            value += p1 * d[t + 1]
            s1 += d[t + 1] * u[t]
        du[t] = value
    dw[0], dw[1], dw[2], dw[3] = s0, s1, s2, total


@compiled
@no_type_check
def backward_in(u, w, bias, kept, dy, gated, dconv, du, dw, scratch, start, count, job, jobs):
    """Write the gated input and the gradient of the convolution's result; finish the gradients of x0's projection.

    dw_B3DX: three taps and the bias; scratch (B, 2, G, L).
    """
    length = u.shape[3]
    later = max(0, length - 2)
    for row in range(job, u.shape[0] * count, jobs):
        b, g = row // count, row % count
        c = start + g
        u0, w0, b0 = u[b, 0, c], w[0, c], bias[0, c]
        dy_row, kept_row, dconv_row, d = dy[b, c], kept[b, c], dconv[b, g], scratch[b, 0, g]
        for t in range(min(2, length)):
            dconv_row[t] = dy_row[t] * _short(u0, w0, b0, t)
        p0, p1, p2 = w0[0], w0[1], w0[2]
        x0, x1, x2, dy2, dconv2 = u0[:later], u0[1:], u0[2:], dy_row[2:], dconv_row[2:]
        for t in range(later):
            dconv2[t] = dy2[t] * (b0 + p2 * x2[t] + p1 * x1[t] + p0 * x0[t])
        for t in range(length):
            d[t] = dy_row[t] * kept_row[t]
        _short_backward(d, u0, w0, du[b, 0, c], dw[b, 0, c])
    gate_in(u, w, bias, gated, start, count, job, jobs)


@compiled
@no_type_check
def backward_out(u, w, bias, gated, dconv, dgated, skip, du, dw, dskip, scratch, start, count, job, jobs):
    """Finish the gradients of the projections of x1 and v, and of the skip: dskip_BD."""
    length = u.shape[3]
    later = max(0, length - 2)
    for row in range(job, u.shape[0] * count, jobs):
        b, g = row // count, row % count
        c = start + g
        u1, u2, w1, w2, s = u[b, 1, c], u[b, 2, c], w[1, c], w[2, c], skip[c]
        b1, b2 = bias[1, c], bias[2, c]
        gated_row, dconv_row, dgated_row = gated[b, g], dconv[b, g], dgated[b, g]
        d1, d2 = scratch[b, 0, g], scratch[b, 1, g]
        total = s * 0
        for t in range(length):
            total += dconv_row[t] * gated_row[t]
        dskip[b, c] = total
        for t in range(min(2, length)):
            value = dgated_row[t] + s * dconv_row[t]
            d1[t] = value * _short(u2, w2, b2, t)
            d2[t] = value * _short(u1, w1, b1, t)
        p0, p1, p2 = w1[0], w1[1], w1[2]
        q0, q1, q2 = w2[0], w2[1], w2[2]
        x0, x1, x2, v0, v1, v2 = u1[:later], u1[1:], u1[2:], u2[:later], u2[1:], u2[2:]
        dgated2, dconv2, dx2, dv2 = dgated_row[2:], dconv_row[2:], d1[2:], d2[2:]
        for t in range(later):
            value = dgated2[t] + s * dconv2[t]
            dx2[t] = value * (b2 + q2 * v2[t] + q1 * v1[t] + q0 * v0[t])
            dv2[t] = value * (b1 + p2 * x2[t] + p1 * x1[t] + p0 * x0[t])
        _short_backward(d1, u1, w1, du[b, 1, c], dw[b, 1, c])
        _short_backward(d2, u2, w2, du[b, 2, c], dw[b, 2, c])
