"""How blocks normalise: a residual addition and the norm of its sum in one step where the norm is a plain one."""

from torch import Tensor, nn

from genossm.ops.add_norm import add_norm


def added(norm: nn.Module, x: Tensor, y: Tensor | None, turned: bool = False) -> tuple[Tensor, Tensor]:
    """Return x + y (x itself without y) and its norm.

    Args:
        norm: a LayerNorm, an RMS norm, or any module.
        x: the residual stream.
        y: what is added to it.
        turned: apply the norm's weights in reverse order; for a LayerNorm or an RMS norm.
    """
    if not isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) or norm.weight is None or norm.eps is None:
        total = x if y is None else x + y
        return total, norm(total)
    weight, bias = norm.weight, getattr(norm, "bias", None)
    if turned:
        weight, bias = weight.flip(0), None if bias is None else bias.flip(0)
    return add_norm(x, y, weight, bias, norm.eps, isinstance(norm, nn.RMSNorm))
