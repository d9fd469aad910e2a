"""CPU passes of `ops.hyena_conv` around its transforms: the short convolution of width 3, gates, skip, and backward.

Rows (one channel of one sequence) are independent, and time is contiguous. A call handles the channels of one group,
`start` to `start + count`; item r of it is sequence r // count, channel start + r % count, and every `jobs`-th item is
a job's. A pass reads each projection once and writes each result once. Arrays hold all channels (u_B3DL, w_3DW,
bias_3D, y_BDL, …) but for the group's own buffers (B, G, ≥ L): gated, dconv, and what transforms return.
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
    for row in range(job, u.shape[0] * count, jobs):
        b, g = row // count, row % count
        d = start + g
        u1, u2, w1, w2, out = u[b, 1, d], u[b, 2, d], w[1, d], w[2, d], gated[b, g]
        b1, b2 = bias[1, d], bias[2, d]
        for t in range(min(2, length)):
            out[t] = _short(u1, w1, b1, t) * _short(u2, w2, b2, t)
        p0, p1, p2 = w1[0], w1[1], w1[2]
        q0, q1, q2 = w2[0], w2[1], w2[2]
        for t in range(2, length):
            x1 = b1 + p2 * u1[t] + p1 * u1[t - 1] + p0 * u1[t - 2]
            v = b2 + q2 * u2[t] + q1 * u2[t - 1] + q0 * u2[t - 2]
            out[t] = x1 * v


@compiled
@no_type_check
def gate_out(u, w, bias, gated, conv, skip, kept, keeps, y, start, count, job, jobs):
    """Write y = x0 (conv + skip gated), and the factor of x0 to `kept` where `keeps`."""
    length = u.shape[3]
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
        for t in range(2, length):
            total = conv_row[t] + s * gated_row[t]
            y_row[t] = total * (b0 + p2 * u0[t] + p1 * u0[t - 1] + p0 * u0[t - 2])


@compiled
@no_type_check
def _short_backward(d, u, w, du, dw):
    """Write the gradient of the short convolution's input to `du`, of its taps and bias to dw[0..2] and dw[3]."""
    length = u.shape[0]
    p0, p1, p2 = w[0], w[1], w[2]
    s0, s1, s2, total = d[0] * 0, d[0] * 0, d[0] * 0, d[0] * 0
    for t in range(max(0, length - 2), length):
        value = p2 * d[t]
        if t + 1 < length:
            value += p1 * d[t + 1]
        du[t] = value
    for t in range(length - 2):
        du[t] = p2 * d[t] + p1 * d[t + 1] + p0 * d[t + 2]
    for t in range(min(2, length)):
        total += d[t]
        s2 += d[t] * u[t]
        if t > 0:
            s1 += d[t] * u[t - 1]
    for t in range(2, length):
        total += d[t]
        s2 += d[t] * u[t]
        s1 += d[t] * u[t - 1]
        s0 += d[t] * u[t - 2]
    dw[0], dw[1], dw[2], dw[3] = s0, s1, s2, total


@compiled
@no_type_check
def backward_in(u, w, bias, kept, dy, gated, dconv, du, dw, scratch, start, count, job, jobs):
    """Write the gated input and the gradient of the convolution's result; finish the gradients of x0's projection.

    dw_B3DX: three taps and the bias; scratch (B, 2, G, L).
    """
    length = u.shape[3]
    for row in range(job, u.shape[0] * count, jobs):
        b, g = row // count, row % count
        c = start + g
        u0, w0, b0 = u[b, 0, c], w[0, c], bias[0, c]
        dy_row, kept_row, dconv_row, d = dy[b, c], kept[b, c], dconv[b, g], scratch[b, 0, g]
        for t in range(min(2, length)):
            dconv_row[t] = dy_row[t] * _short(u0, w0, b0, t)
            d[t] = dy_row[t] * kept_row[t]
        p0, p1, p2 = w0[0], w0[1], w0[2]
        for t in range(2, length):
            dconv_row[t] = dy_row[t] * (b0 + p2 * u0[t] + p1 * u0[t - 1] + p0 * u0[t - 2])
            d[t] = dy_row[t] * kept_row[t]
        _short_backward(d, u0, w0, du[b, 0, c], dw[b, 0, c])
    gate_in(u, w, bias, gated, start, count, job, jobs)


@compiled
@no_type_check
def backward_out(u, w, bias, gated, dconv, dgated, skip, du, dw, dskip, scratch, start, count, job, jobs):
    """Finish the gradients of the projections of x1 and v, and of the skip: dskip_BD."""
    length = u.shape[3]
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
        for t in range(2, length):
            value = dgated_row[t] + s * dconv_row[t]
            d1[t] = value * (b2 + q2 * u2[t] + q1 * u2[t - 1] + q0 * u2[t - 2])
            d2[t] = value * (b1 + p2 * u1[t] + p1 * u1[t - 1] + p0 * u1[t - 2])
        _short_backward(d1, u1, w1, du[b, 1, c], dw[b, 1, c])
        _short_backward(d2, u2, w2, du[b, 2, c], dw[b, 2, c])
