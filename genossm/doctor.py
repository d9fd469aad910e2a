"""`genossm doctor`: whether a checkpoint keeps its promises, or what an install has."""

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated, Any

import typer

BAD_VERSIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "lightning": (("2.6.2", "2.6.3"), "the wheels were malicious (GHSA-w37p-236h-pfx3): remove it, change your keys"),
    "hydra-optuna-sweeper": (("1.3.0",), "its resumable storage fails with SQLAlchemy 2.1"),
    "pyranges1": (("0.1.1",), "it installs over pyranges and breaks it"),
}
"""Versions known to be bad, and why."""
OLDEST = {
    "torch": ((2, 6), "weights_only could be got round"),
    "lightning": ((2, 6, 6), "checkpoints could run code (CVE-2026-58659)"),
    "transformers": ((5, 5), "configs could run code (CVE-2026-4372, CVE-2026-5241)"),
    "hydra-core": ((1, 3, 8), "the block list of targets could be got round"),
}
"""The oldest version of a package that is safe, and what was wrong before."""
_OPS = {
    "fftconv": ("triton", "torch"),
    "hyena_conv": ("numba", "torch"),
    "causal_conv1d": ("triton", "numba", "torch"),
    "selective_scan": ("triton", "numba", "torch"),
    "ssd": ("triton", "numba", "torch"),
}
"""Ops and the backends that they have."""
_PACKAGES = ("torch", "numpy", "numba", "triton", "lightning", "hydra-core", "transformers", "safetensors", "mamba-ssm")


_VERDICTS = {True: "pass", False: "FAIL", None: "-"}


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    check: str
    passed: bool | None
    """None where there is nothing to pass: the line is for your information."""
    value: str
    allowed: str = ""


@dataclass(frozen=True)
class Report:
    """What the doctor found."""

    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing failed."""
        return all(finding.passed is not False for finding in self.findings)

    def summary(self) -> dict[str, Any]:
        """Return plain values by check, for `--json`."""
        return {f.check: " ".join(filter(None, (_VERDICTS[f.passed], f.value, f.allowed))) for f in self.findings}

    def text(self) -> str:
        """Return the table for the eyes."""
        width = max(len(finding.check) for finding in self.findings)
        lines = ((f.check.ljust(width), _VERDICTS[f.passed].ljust(4), f.value, f.allowed) for f in self.findings)
        return "".join("  ".join(filter(None, line)) + "\n" for line in lines)


def doctor(
    model: Annotated[str, typer.Argument(help="a folder, a file or a hub id; none describes the install")] = "",
    *,
    length: int = 128,
    device: str = "cpu",
) -> Report:
    """Check a checkpoint of any family and print a table of passes and failures; without one, describe the install.

    For example `genossm doctor my-model`, `genossm doctor state-spaces/mamba-130m --length 512`, or `genossm doctor`.

    Ends with exit code 1 where a check failed, 2 where there was no model to check, else 0.

    Args:
        model: a folder, a file or a hub id; nothing describes the install.
        length: tokens of the random sequences that the checks run on, cut to the model's context.
        device: where the checks run.

    Returns:
        The findings.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: the model can't be opened, or `length` is below 8.
    """
    if not model:
        return Report(tuple(install()))
    if length < 8:
        raise ValueError(f"length must be at least 8; got {length}.")
    return Report(tuple(examine(model, length, device)))


def install() -> Iterator[Finding]:
    """Yield what this install has: versions, devices, backends with their reasons, caches."""
    import torch

    from genossm.files import cache_folder
    from genossm.ops import backend

    yield Finding("python", None, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in _PACKAGES:
        yield _version(package)
    for package in sorted(set(BAD_VERSIONS) - set(_PACKAGES)):
        finding = _version(package)
        if finding.passed is False:
            yield finding
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            shown = f"{torch.cuda.get_device_name(index)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            yield Finding(f"gpu {index}", None, shown)
    else:
        yield Finding("gpu", None, f"none; CPU with {torch.get_num_threads()} threads")
    for kind in ("cpu", "cuda"):
        for name in backend.NAMES:
            refusal = backend.runs(name, torch.device(kind))
            yield Finding(f"backend {name} on {kind}", None, "runs" if refusal is None else f"no: {refusal}")
    for kind in ("cpu", "cuda", "mps"):
        for op, offered in _OPS.items():
            choice = backend.explain(op, torch.device(kind), offered)
            yield Finding(f"{op} on {kind}", None, f"{choice.name}: {choice.reason}")
    yield Finding("cache", None, str(cache_folder()))
    hub = os.environ.get("HF_HOME", "~/.cache/huggingface")
    yield Finding("hub cache", None, f"{hub}{', offline' if os.environ.get('HF_HUB_OFFLINE') == '1' else ''}")


def _version(package: str) -> Finding:
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return Finding(package, None, "not installed")
    bad, reason = BAD_VERSIONS.get(package, ((), ""))
    if version in bad:
        return Finding(package, False, version, reason)
    oldest, reason = OLDEST.get(package, ((), ""))
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if oldest and numbers < oldest:
        return Finding(package, False, version, f"at least {'.'.join(map(str, oldest))}: before, {reason}")
    return Finding(package, True if oldest or bad else None, version)


def examine(source: str, length: int, device: str) -> Iterator[Finding]:
    """Yield what a checkpoint is and whether it keeps what its kind promises."""
    import torch

    from genossm import checkpoint
    from genossm.inference import tokenizer_of
    from genossm.ops import backend

    model = checkpoint.load(source, device)
    config = model.config
    longest = length if model.max_length is None else min(length, model.max_length)
    yield Finding("family", None, f"{config.model_type}, {config.n_layer} layers, width {config.d_model}")
    yield Finding("parameters", None, f"{model.num_parameters():,}")
    yield Finding("context", None, "any length" if model.max_length is None else f"{model.max_length:,} tokens")
    tokenizer = tokenizer_of(model)
    yield _round_trip(tokenizer)
    ids, rows = tokenizer.vocab_size, config.padded_vocab_size
    # A published file doesn't name its tokenizer, so that one that is too large is no fault of the model.
    fits = f"{ids} ids, {rows} rows" if ids <= rows else f"no: {ids} ids, {rows} rows; the model takes ids but no text"
    yield Finding("tokenizer fits", True if ids <= rows else None, fits)
    ids = _draw(tokenizer, config.padded_vocab_size, longest).to(device)
    with torch.no_grad(), backend.watch() as used:
        healthy = finite(model, ids)
    used = used or {"every op": backend.Choice("torch", "no op of this model has a kernel")}
    for op, choice in used.items():
        yield Finding(f"backend of {op}", None, f"{choice.name}: {choice.reason}")
    yield healthy
    checks: tuple[Callable[[Any, Any], Finding], ...] = (causality, padding, chunks, steps, dtype_drift)
    with torch.no_grad():
        for check in checks:
            yield check(model, ids)
        yield symmetry(model, ids, tokenizer)


def _draw(tokenizer: Any, rows: int, length: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    letters = "".join(
        "ACGT"[i] for i in torch.randint(4, (2 * length * tokenizer.bases_per_token,), generator=generator)
    )
    ids = torch.from_numpy(tokenizer.encode(letters).astype("int64"))[: 2 * length].reshape(2, -1)
    return ids.clamp(max=rows - 1)


def _round_trip(tokenizer: Any) -> Finding:
    text = "ACGTACGTTTGCACGATCGA"
    back = tokenizer.decode(tokenizer.encode(text).tolist()).replace(" ", "").upper()
    return Finding("tokenizer round trip", back == text, f"{tokenizer.name}: {text} -> {back}")


def _limit(got: Any, truth: Any, name: str, scale: float = 1e-4) -> Finding:
    difference = float((got.float() - truth.float()).abs().max())
    allowed = scale * max(1.0, float(truth.float().abs().max()))
    return Finding(name, difference <= allowed, f"{difference:.2g}", f"at most {allowed:.2g}")


def finite(model: Any, ids: Any) -> Finding:
    """Check that hidden states are numbers."""
    x = model(ids)
    return Finding("finite", bool(x.isfinite().all()), f"largest {float(x.abs().max()):.3g}")


def causality(model: Any, ids: Any) -> Finding:
    """Check that a causal model never looks ahead, and that one that reads both ways does."""
    half = ids.shape[1] // 2
    changed = ids.clone()
    changed[:, half:] = ids.flip(0)[:, half:]
    before, after = model(ids)[:, :half], model(changed)[:, :half]
    if model.causal:
        return _limit(after, before, "causality")
    difference = float((before - after).abs().max())
    return Finding("reads both ways", difference > 1e-7, f"{difference:.2g}", "more than 0")


def padding(model: Any, ids: Any) -> Finding:
    """Check that padding on the right changes no real position."""
    import torch

    real = max(1, ids.shape[1] // 3)
    lengths = torch.tensor([ids.shape[1], real], device=ids.device)
    return _limit(model(ids, lengths)[1, :real], model(ids[1:, :real])[0], "padding changes nothing")


def chunks(model: Any, ids: Any) -> Finding:
    """Check that a sequence run in pieces equals the whole."""
    import torch

    if not model.streams:
        return Finding("pieces = whole", None, "this model takes whole sequences")
    state = model.init_state(ids.shape[0])
    pieces: list[Any] = []
    for piece in ids.split(max(1, ids.shape[1] // 3), dim=1):
        x, state = model.extend(piece, state)
        pieces.append(x)
    return _limit(torch.cat(pieces, 1), model(ids), "pieces = whole")


def steps(model: Any, ids: Any) -> Finding:
    """Check that token by token equals all at once."""
    import torch

    if not model.streams:
        return Finding("step = parallel", None, "this model takes whole sequences")
    state = model.init_state(ids.shape[0])
    rows: list[Any] = []
    for column in ids[:, :64].unbind(1):
        x, state = model.step(column, state)
        rows.append(x)
    return _limit(torch.stack(rows, 1), model(ids[:, :64]), "step = parallel")


def dtype_drift(model: Any, ids: Any) -> Finding:
    """Check how far bfloat16 is from float32, as a share of the spread of the hidden states."""
    import torch

    truth = model(ids)
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        got = model(ids)
    drift = float((got.float() - truth).square().mean().sqrt() / truth.std().clamp(min=1e-12))
    return Finding("bfloat16 drift", drift < 0.1, f"{drift:.2g} of the spread", "less than 0.1")


def symmetry(model: Any, ids: Any, tokenizer: Any) -> Finding:
    """Check that an equivariant model gives the reverse complement the same vectors, turned."""
    import torch

    complement = getattr(model.config, "complement_map", None) or getattr(tokenizer, "complement_map", None)
    if complement is None:
        return Finding("reverse complement", None, "tokens of this tokenizer have no complement")
    table = torch.tensor([*complement, *range(len(complement), model.config.padded_vocab_size)], device=ids.device)
    turned = model(table[ids.flip(1)])
    difference = float((turned.flip(1, 2) - model(ids)).abs().max())
    if not model.equivariant:
        return Finding("reverse complement", None, f"not equivariant, nor promised: {difference:.2g}")
    return Finding("reverse complement", difference <= 1e-4, f"{difference:.2g}", "at most 0.0001")
