"""The first of a long Fourier transform's two passes over memory, in Triton, and the last of its inverse's.

Position n = N2 n1 + n2 and frequency k = k1 + N1 k2 of N = N1 N2 points. Columns: over n1, times
exp(-2 pi i n2 k1 / N); then rows, of N2 contiguous numbers, are anybody's transforms. A program holds its columns in
registers as tuples of tensors: a butterfly over a tuple's entries is arithmetic alone, and one exchange through shared
memory makes an index of the tensors that of the tuple. No frequencies are sorted, for spectra are multiplied where they
are.

The transform is taken at the N roots not of 1 but of i: at exp(2 pi i (1/4 - k) / N). Products of polynomials are then
known modulo t^N - i, of which the real part is the first N coefficients and the imaginary part those after them: real
sequences are convolved without padding, as long as no coefficient lies beyond -N and 2 N.
"""

import math

import triton
import triton.language as tl

_ROOTS = 128
_COS = tl.constexpr(tuple(math.cos(2 * math.pi * j / _ROOTS) for j in range(_ROOTS)))
_SIN = tl.constexpr(tuple(math.sin(2 * math.pi * j / _ROOTS) for j in range(_ROOTS)))
_TABLE = tl.constexpr(_ROOTS)
_CIRCLE = tl.constexpr(2 * math.pi)


@triton.jit
def unit(turn):
    """Return cosine and sine of 2 pi turn, exact to float32 where `turn` is."""
    quarter = tl.floor(turn * 4.0 + 0.5)
    r = (turn - quarter * 0.25) * _CIRCLE
    s = r * r
    sine = r * (1.0 + s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s * (1 / 362880)))))
    cosine = 1.0 + s * (-1 / 2 + s * (1 / 24 + s * (-1 / 720 + s * (1 / 40320 - s * (1 / 3628800)))))
    at = quarter.to(tl.int32) & 3
    odd = (at & 1) == 1
    c = tl.where(odd, sine, cosine)
    d = tl.where(odd, cosine, sine)
    return tl.where((at == 1) | (at == 2), -c, c), tl.where(at >= 2, -d, d)


@triton.jit
def _times(a_re, a_im, b_re, b_im):
    return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re


@triton.jit
def butterfly(re, im, R: tl.constexpr, SIGN: tl.constexpr):
    """Transform tuples of R entries: y[k] = sum_j x[j] exp(SIGN 2 pi i j k / R)."""
    for level in tl.static_range(5):
        if 2**level < R:
            new_re = ()
            new_im = ()
            for p in tl.static_range(R // 2 ** (level + 1)):
                differ_re = ()
                differ_im = ()
                for q in tl.static_range(2**level):
                    a_re, a_im = re[q + 2**level * p], im[q + 2**level * p]
                    b_re, b_im = re[q + 2**level * p + R // 2], im[q + 2**level * p + R // 2]
                    new_re = new_re + (a_re + b_re,)
                    new_im = new_im + (a_im + b_im,)
                    y_re, y_im = a_re - b_re, a_im - b_im
                    if p * 2 ** (level + 2) == R:
                        y_re, y_im = -SIGN * y_im, SIGN * y_re
                    elif p > 0:
                        y_re, y_im = _times(
                            y_re, y_im, _COS[p * 2**level * _TABLE // R], SIGN * _SIN[p * 2**level * _TABLE // R]
                        )
                    differ_re = differ_re + (y_re,)
                    differ_im = differ_im + (y_im,)
                new_re = new_re + differ_re
                new_im = new_im + differ_im
            re = new_re
            im = new_im
    return re, im


@triton.jit
def turned(re, im, first, step, R: tl.constexpr, HAS_FIRST: tl.constexpr):
    """Multiply entry k of tuples by exp(2 pi i (first + k step)); turns are tensors that float32 holds exactly."""
    c, s = unit(first)
    p_re = (c,)
    p_im = (s,)
    for level in tl.static_range(5):
        if 2**level < R:
            # A power of the step's root would have that root's error as many times, so each has its own.
            c, s = unit(step * 2**level)
            for k in tl.static_range(2**level):
                if k > 0 or HAS_FIRST:
                    q_re, q_im = _times(p_re[k], p_im[k], c, s)
                else:
                    q_re, q_im = c, s
                p_re = p_re + (q_re,)
                p_im = p_im + (q_im,)
    new_re = ()
    new_im = ()
    for k in tl.static_range(R):
        y_re, y_im = re[k], im[k]
        if k > 0 or HAS_FIRST:
            y_re, y_im = _times(y_re, y_im, p_re[k], p_im[k])
        new_re = new_re + (y_re,)
        new_im = new_im + (y_im,)
    return new_re, new_im


@triton.jit
def joined(x, R: tl.constexpr, M: tl.constexpr):
    """Return a tuple of R tensors (M) as one, (M, R)."""
    for level in tl.static_range(5):
        if 2**level < R:
            y = ()
            for i in tl.static_range(R // 2 ** (level + 1)):
                y = y + (tl.join(x[i], x[i + R // 2 ** (level + 1)]),)
            x = y
    return tl.reshape(x[0], [M, R])


@triton.jit
def _bits(x, R: tl.constexpr, M: tl.constexpr):
    """Return a tensor (M, R) with an axis for each bit of R; in one step, for each step might cost an exchange."""
    if R == 1:
        return tl.reshape(x, [M])
    elif R == 2:
        return x
    elif R == 4:
        return tl.reshape(x, [M, 2, 2])
    elif R == 8:
        return tl.reshape(x, [M, 2, 2, 2])
    elif R == 16:
        return tl.reshape(x, [M, 2, 2, 2, 2])
    else:
        return tl.reshape(x, [M, 2, 2, 2, 2, 2])


@triton.jit
def parted(x, R: tl.constexpr, M: tl.constexpr):
    """Return a tensor (M, R) as a tuple of R tensors (M)."""
    found = (_bits(x, R, M),)
    for level in tl.static_range(5):
        if 2**level < R:
            even = ()
            odd = ()
            for i in tl.static_range(2**level):
                a, b = tl.split(found[i])
                even = even + (a,)
                odd = odd + (b,)
            # The bit of the entry that is split off is higher than those before it.
            found = even + odd
    return found


@triton.jit
def _exchanged(x, R: tl.constexpr, S: tl.constexpr, BEFORE: tl.constexpr, BEHIND: tl.constexpr):
    """Turn a tuple of R tensors over (BEFORE, S, BEHIND) into one of S tensors over (BEFORE, R, BEHIND)."""
    whole = tl.reshape(joined(x, R, BEFORE * S * BEHIND), [BEFORE, S, BEHIND, R])
    return parted(tl.reshape(tl.permute(whole, [0, 3, 2, 1]), [BEFORE * R * BEHIND, S]), S, BEFORE * R * BEHIND)


@triton.jit
def _shifted(re, im, A: tl.constexpr, SIGN: tl.constexpr):
    """Multiply entry a by exp(SIGN 2 pi i a / 4 A), its share of a position's factor at the roots of i."""
    new_re = ()
    new_im = ()
    for a in tl.static_range(A):
        y_re, y_im = _times(re[a], im[a], _COS[a * (_TABLE // (4 * A))], SIGN * _SIN[a * (_TABLE // (4 * A))])
        new_re = new_re + (y_re,)
        new_im = new_im + (y_im,)
    return new_re, new_im


@triton.jit
def columns(re, im, first, size, A: tl.constexpr, B: tl.constexpr, T: tl.constexpr):
    """Transform T columns from n2 = `first`: A tensors over (B, T), n1 = B a + b, to B over (A, T), k1 = ka + A kb."""
    re, im = _shifted(re, im, A, 1)
    re, im = butterfly(re, im, A, -1)
    if B > 1:
        b = (tl.arange(0, B * T) // T).to(tl.float32)
        re, im = turned(re, im, b / (4 * A * B), -b / (A * B), A, True)
        re, im = _exchanged(re, A, B, 1, T), _exchanged(im, A, B, 1, T)
        re, im = butterfly(re, im, B, -1)
        at = tl.arange(0, A * T)
        n2 = first + at % T
        # Turns modulo 1 by whole numbers, which float32 holds up to 2^24.
        base = ((n2 * (4 * (at // T) - 1)) & (4 * size - 1)).to(tl.float32) / (-4.0 * size)
        re, im = turned(re, im, base, n2.to(tl.float32) / (-(size // A)), B, True)
    else:
        n2 = (first + tl.arange(0, T)).to(tl.float32)
        re, im = turned(re, im, n2 / (4.0 * size), -n2 / size, A, True)
    return re, im


@triton.jit
def columns_back(re, im, first, size, A: tl.constexpr, B: tl.constexpr, T: tl.constexpr):
    """Undo `columns`, but for the factor N."""
    if B > 1:
        at = tl.arange(0, A * T)
        n2 = first + at % T
        base = ((n2 * (4 * (at // T) - 1)) & (4 * size - 1)).to(tl.float32) / (4.0 * size)
        re, im = turned(re, im, base, n2.to(tl.float32) / (size // A), B, True)
        re, im = butterfly(re, im, B, 1)
        turn = ((at // T).to(tl.float32) - 0.25) / (A * B)
        re, im = turned(re, im, turn, turn, B, False)
        re, im = _exchanged(re, B, A, 1, T), _exchanged(im, B, A, 1, T)
    else:
        n2 = (first + tl.arange(0, T)).to(tl.float32)
        re, im = turned(re, im, n2 / (-4.0 * size), n2 / size, A, True)
    re, im = butterfly(re, im, A, 1)
    return _shifted(re, im, A, -1)


@triton.jit
def positions(first, rows, A: tl.constexpr, B: tl.constexpr, T: tl.constexpr):
    """Return the positions (A, B T) that `columns` takes, of rows of so many."""
    at = tl.arange(0, B * T)[None, :]
    return (tl.arange(0, A)[:, None] * B + at // T) * rows + first + at % T


@triton.jit
def _spots(first, rows, A: tl.constexpr, B: tl.constexpr, T: tl.constexpr):
    """Return where what `columns` makes is in memory, a row for each frequency, real and imaginary side by side."""
    if B > 1:
        at = tl.arange(0, 2 * A * T)[None, :]
        row = at // (2 * T) + A * tl.arange(0, B)[:, None]
    else:
        at = tl.arange(0, 2 * T)[None, :]
        row = tl.arange(0, A)[:, None]
    return (row * rows + first) * 2 + at % (2 * T)


@triton.jit
def load_columns(x, first, rows, A: tl.constexpr, B: tl.constexpr, T: tl.constexpr):
    """Load what `columns_back` takes, of complex numbers as pairs."""
    S: tl.constexpr = B if B > 1 else A
    M: tl.constexpr = A * T if B > 1 else T
    a, b = tl.split(tl.reshape(tl.load(x + _spots(first, rows, A, B, T)), [S, M, 2]))
    return parted(tl.trans(a), S, M), parted(tl.trans(b), S, M)


@triton.jit
def store_columns(x, re, im, first, rows, A: tl.constexpr, B: tl.constexpr, T: tl.constexpr):
    """Store what `columns` made."""
    S: tl.constexpr = B if B > 1 else A
    M: tl.constexpr = A * T if B > 1 else T
    both = tl.join(tl.trans(joined(re, S, M)), tl.trans(joined(im, S, M)))
    tl.store(x + _spots(first, rows, A, B, T), tl.reshape(both, [S, 2 * M]))
