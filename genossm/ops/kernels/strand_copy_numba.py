"""The CPU pass of `ops.strand_copy`: one read and one write a base on either strand, at nearly the speed of a copy."""

from typing import no_type_check

import numpy as np

from genossm.ops.kernels.bodies_numba import compiled

_LOW, _N, _SUM, _NONE = np.uint8(0x7F), np.uint8(11), np.uint8(17), np.uint8(0)


# Every value is cast back to a byte, else the loops run on 64-bit lanes; a window is cut out first and the index of
# the reversed read is unsigned, since an index that might be below 0 keeps a loop from vectors.


@compiled
@no_type_check
def copy(store, starts, turned, kept, out, rows, found):
    """Write the windows of `rows` with the bits `kept`, complemented and from its end where turned; note any N."""
    length = out.shape[1]
    last = np.uint64(length - 1)
    for row in rows:
        source, target = store[starts[row] : starts[row] + length], out[row]
        seen = _NONE
        if turned[row]:
            for k in range(length):
                i = np.uint64(k)
                code = np.uint8(source[last - i] & kept)
                is_n = np.uint8((code & _LOW) == _N)
                seen = np.uint8(seen | is_n)
                target[i] = code if is_n else np.uint8(_SUM - code)
        else:
            for i in range(length):
                code = np.uint8(source[i] & kept)
                seen = np.uint8(seen | np.uint8((code & _LOW) == _N))
                target[i] = code
        found[0] |= seen
