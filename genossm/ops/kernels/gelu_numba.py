"""CPU passes of `ops.gelu`: one read and one write an element, with a polynomial exp that vectorises."""

from typing import no_type_check

import numpy as np

from genossm.ops.kernels.bodies_numba import _sigmoid, compiled

_ONE = np.float32(1)
_A, _AB, _AB3 = np.float32(1.5957691216057308), np.float32(0.07135481627), np.float32(0.21406444881)
"""2 sqrt(2 / pi), that times 0.044715, and thrice this: gelu(x) = x sigmoid(A x + AB x^3)."""


# A job's part is cut out first, so that indices count from 0: one that might be below 0 keeps a loop from vectors.


@compiled
@no_type_check
def forward(x, y, job, jobs):
    """Write y = gelu(x)."""
    first, last = job * len(x) // jobs, (job + 1) * len(x) // jobs
    x, y = x[first:last], y[first:last]
    for i in range(len(x)):
        v = x[i]
        y[i] = v * _sigmoid(v * (_A + _AB * v * v))


@compiled
@no_type_check
def backward(x, dy, dx, job, jobs):
    """Write dx = dy gelu'(x)."""
    first, last = job * len(x) // jobs, (job + 1) * len(x) // jobs
    x, dy, dx = x[first:last], dy[first:last], dx[first:last]
    for i in range(len(x)):
        v = x[i]
        s = _sigmoid(v * (_A + _AB * v * v))
        dx[i] = dy[i] * s * (_ONE + v * (_ONE - s) * (_A + _AB3 * v * v))
