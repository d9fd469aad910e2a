"""Optimizers, parameter groups and learning-rate schedules."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

SCHEDULES = ("cosine", "constant", "linear")
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """An optimizer and its schedule, computed from the number of steps of the run.

    Raises:
        ValueError: a value is impossible.
    """

    optimizer: str = "adamw"
    """"adamw", or "muon": the blocks' matrices by `Muon`, the rest by AdamW."""
    lr: float = 6e-4
    """Peak learning rate."""
    matrix_lr: float = 0.01
    """Peak learning rate of the matrices that "muon" takes."""
    weight_decay: float = 0.1
    """Decay of matrices; norms, biases, embeddings and what a layer lists in `NO_WEIGHT_DECAY` have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    schedule: str = "cosine"
    """After the warm-up: "cosine" or "linear" down to `min_lr_ratio`, or "constant"."""
    warmup: float = 0.01
    """Share of the steps (below 1) or number of steps over which the rate rises linearly."""
    min_lr_ratio: float = 0.1
    """Last rate over the peak."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optim.schedule must be one of {', '.join(SCHEDULES)}; got {self.schedule!r}.")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optim.optimizer must be one of {', '.join(OPTIMIZERS)}; got {self.optimizer!r}.")
        if self.matrix_lr <= 0:
            raise ValueError(f"optim.matrix_lr must be above 0; got {self.matrix_lr}.")
        if self.lr <= 0 or self.weight_decay < 0 or self.warmup < 0 or not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(
                "optim needs lr > 0, weight_decay >= 0, warmup >= 0 and min_lr_ratio in [0, 1]; got"
                f" {self.lr}, {self.weight_decay}, {self.warmup} and {self.min_lr_ratio}."
            )

    def factor(self, step: int, steps: int) -> float:
        """Return the rate of a step over the peak, for a run of `steps` steps."""
        warmup = round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        falling = 0.5 * (1 + math.cos(math.pi * progress)) if self.schedule == "cosine" else 1 - progress
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * falling

    def build(self, module: nn.Module) -> torch.optim.AdamW:
        """Return the optimizer over the trained parameters of a module, in groups: decayed and not."""
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for parameter, decays in decayed_parameters(module):
            (decayed if decays else plain).append(parameter)
        groups: list[dict[str, Any]] = [{"params": plain, "weight_decay": 0.0}]
        if self.optimizer == "adamw":
            groups.insert(0, {"params": decayed, "weight_decay": self.weight_decay})
            return AdamW([g for g in groups if g["params"]], lr=self.lr, betas=self.betas, eps=self.eps)
        heads = {id(p) for name, p in module.named_parameters() if "lm_head" in name}
        matrices = [p for p in decayed if p.ndim == 2 and id(p) not in heads]
        others = [p for p in decayed if p.ndim != 2 or id(p) in heads]
        groups += [
            {"params": others, "weight_decay": self.weight_decay},
            {"params": matrices, "weight_decay": self.weight_decay, "lr": self.matrix_lr, "orthogonal": True},
        ]
        return Muon([g for g in groups if g["params"]], lr=self.lr, betas=self.betas, eps=self.eps)


class AdamW(torch.optim.AdamW):
    """AdamW that steps on what this process holds of each weight, where they are shared out among several.

    Its arithmetic is elementwise, so that the numbers are the same; but all pieces go through one loop of the device,
    where shared weights would go through a distributed operation each, which costs more time than the step itself.
    Where all weights are on a GPU, that loop is one kernel.

    Args:
        groups: parameters with their options.
        options: of torch's AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any):
        on_gpu = all(weight.is_cuda for group in groups for weight in group["params"])
        super().__init__(groups, fused=on_gpu or None, **options)
        # Gradients are clipped before the step, so that a scaler of float16 must have taken its scale off by then.
        self._step_supports_amp_scaling = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, of a run on whatever device: how this one steps stays."""
        fused = self.defaults["fused"]
        groups = [{**group, "fused": fused} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        found = super()._init_group(group, *lists)
        for tensors in lists:
            if isinstance(tensors, list):  # Older versions of torch hand over a flag as well.
                tensors[:] = held(tensors)
        return found


class Muon(AdamW):
    """AdamW whose groups marked `orthogonal` step along the nearest orthogonal matrix of their momentum instead.

    Every singular value of such a matrix's step has about the same size, so that rare directions are learned as fast
    as common ones (Jordan et al. 2024, Muon: momentum, orthogonalised by Newton and Schulz). Steps are scaled by
    sqrt(max(1, rows / columns)), which makes them as large for each output.
    """

    MOMENTUM = 0.95

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step in every group."""
        # Lightning runs the backward pass inside the closure.
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        groups = self.param_groups
        for group in groups:
            if group.get("orthogonal"):
                self._step_matrices(group)
        try:
            self.param_groups = [group for group in groups if not group.get("orthogonal")]
            super().step()
        finally:
            self.param_groups = groups
        return result

    def _step_matrices(self, group: dict[str, Any]) -> None:
        matrices: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        if not matrices:
            return
        for parameter in matrices:
            if not self.state[parameter]:
                # AdamW looks for a count of steps in every state that it restores.
                self.state[parameter] |= {"step": torch.tensor(0.0), "momentum": torch.zeros_like(parameter)}
            self.state[parameter]["step"] += 1
        grads = held(cast(Tensor, matrix.grad) for matrix in matrices)
        momenta = held(self.state[matrix]["momentum"] for matrix in matrices)
        torch._foreach_lerp_(momenta, grads, 1 - self.MOMENTUM)
        ahead = torch._foreach_lerp(grads, momenta, self.MOMENTUM)
        torch._foreach_mul_(held(matrices), 1 - group["lr"] * group["weight_decay"])
        for same in _by_shape(matrices):
            alike = [matrices[index] for index in same]
            rows, columns = alike[0].shape
            steps_MRC = _joined(torch.stack([ahead[index] for index in same]), alike[0])
            wide_MRC = steps_MRC.mT.contiguous() if rows > columns else steps_MRC
            steps_MRC = orthogonalised(wide_MRC).mT if rows > columns else orthogonalised(wide_MRC)
            scale = -group["lr"] * max(1.0, rows / columns) ** 0.5
            torch._foreach_add_(held(alike), list(_divided(steps_MRC, alike[0])), alpha=scale)


def _by_shape(matrices: list[Tensor]) -> list[list[int]]:
    found: dict[tuple[int, ...], list[int]] = {}
    for index, matrix in enumerate(matrices):
        found.setdefault(tuple(matrix.shape), []).append(index)
    return list(found.values())


def _joined(pieces_MRC: Tensor, like: Any) -> Tensor:
    """Return whole matrices of the pieces that the processes hold, divided as one of them is; in one message."""
    if not hasattr(like, "to_local"):
        return pieces_MRC
    from torch.distributed.tensor import DTensor

    shape = torch.Size((len(pieces_MRC), *like.shape))
    stride = (like.shape.numel(), like.shape[1], 1)
    return DTensor.from_local(
        pieces_MRC, like.device_mesh, _stacked(like), run_check=False, shape=shape, stride=stride
    ).full_tensor()


def _divided(whole_MRC: Tensor, like: Any) -> Tensor:
    """Return what this process holds of whole matrices, divided as one of them is."""
    if not hasattr(like, "to_local"):
        return whole_MRC
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = DTensor.from_local(
        whole_MRC, like.device_mesh, [Replicate() for _ in like.placements], run_check=False
    )
    return everywhere.redistribute(placements=_stacked(like)).to_local()


def _stacked(like: Any) -> list[Any]:
    """Return how a stack of matrices is divided that are divided as one is."""
    from torch.distributed.tensor import Shard

    return [Shard(kind.dim + 1) if kind.is_shard() else kind for kind in like.placements]


def held(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return what this process holds of each tensor: a piece of one that is shared out, else all of it."""
    return [cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


@torch.no_grad()
def clip_norm(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients so that the norm of all of them together is at most `limit`.

    Of weights that are shared out each process adds up the squares of what it holds, and all add up those sums at once.

    Args:
        parameters: whose gradients are meant; those without one are left out.
        limit: the largest norm.

    Returns:
        The norm before, a scalar.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shared = [grad for grad in grads if hasattr(grad, "to_local")]
    whole = [grad for grad in grads if not hasattr(grad, "to_local")]
    squares = [_added_up(nn.utils.get_total_norm(held(shared)).square(), shared[0])] if shared else []
    # Nothing here may wait for the device: the step's host work hides behind the backward pass.
    squares += [nn.utils.get_total_norm(whole).square()] if whole else []
    norm = torch.stack(squares).sum().sqrt()
    torch._foreach_mul_(held(grads), (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _added_up(part: Tensor, shared: Any) -> Tensor:
    """Return the sum of a number over the processes that hold the pieces of a tensor."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    kinds = [Partial() if placement.is_shard() else Replicate() for placement in shared.placements]
    return DTensor.from_local(part, shared.device_mesh, kinds, run_check=False).full_tensor()


def orthogonalised(matrices_MRC: Tensor, rounds: int = 5) -> Tensor:
    """Return matrices with the singular vectors of the given ones and singular values near 1 (in about 0.7 to 1.2).

    Newton and Schulz's iteration with the odd quintic of Jordan et al. 2024, whose slope at zero is steep: small
    singular values grow at 3.4 a round. It is cheapest where R is the shorter side.
    """
    x_MRC = matrices_MRC / (matrices_MRC.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram_MRR = torch.bmm(x_MRC, x_MRC.mT)
        factor_MRR = torch.baddbmm(gram_MRR, gram_MRR, gram_MRR, beta=-4.7750, alpha=2.0315)
        x_MRC = torch.baddbmm(x_MRC, factor_MRR, x_MRC, beta=3.4445)
    return x_MRC


def decayed_parameters(module: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """Yield each trained parameter once and whether it is decayed: matrices are, outside embeddings and lists."""
    exempt: set[nn.Parameter] = set()
    for child in module.modules():
        listed = getattr(child, "NO_WEIGHT_DECAY", ())
        if isinstance(child, nn.Embedding) or listed == "all":
            exempt.update(child.parameters())
        elif listed:
            exempt.update(parameter for name, parameter in child.named_parameters() if name in listed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            yield parameter, parameter.ndim >= 2 and parameter not in exempt
