import importlib
import logging
import sys
from types import ModuleType

import pytest
import torch

from genossm import doctor
from genossm.ops import backend
from genossm.ops.kernels import scans_mamba_ssm
from genossm.ops.selective_scan import selective_scan, selective_scan_ref
from genossm.ops.ssd import ssd, ssd_ref

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def draw_scan(length=9):
    shapes = [(1, length, 3), (1, length, 3), (3, 2), (1, length, 2), (1, length, 2), (3,), (1, length, 3), (3,)]
    drawn = [torch.randn(*shape) for shape in shapes]
    drawn[2] = -drawn[2].exp()
    return drawn


def test_a_slower_path_is_logged_once_with_the_reason(monkeypatch, caplog):
    monkeypatch.setattr(backend, "installed", lambda package: package != "numba")
    backend.log_slower.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            selective_scan(*draw_scan())
    assert [record.getMessage() for record in caplog.records] == [
        "selective_scan runs on the slower 'torch' backend: numba is not installed"
    ]
    backend.log_slower.cache_clear()


@pytest.mark.skipif(backend.installed("mamba_ssm"), reason="mamba_ssm is installed")
@pytest.mark.parametrize("op", ["selective_scan", "ssd"])
def test_mamba_ssm_is_refused_where_it_is_missing(op):
    message = f"'mamba_ssm' can't run {op} here: mamba_ssm is not installed"
    with pytest.raises(ValueError, match=message), backend.use_backend("mamba_ssm"):
        backend.choose(op, CPU, ["torch", "mamba_ssm"])


def test_mamba_ssm_is_chosen_for_scans_alone_and_only_if_asked_for(monkeypatch):
    monkeypatch.setattr(backend, "installed", lambda package: True)
    monkeypatch.setattr(backend, "triton_version", lambda: "3.6.0")
    offered = ["triton", "torch", "mamba_ssm", "reference"]
    assert backend.choose("ssd", CUDA, offered).name == "triton"
    with backend.use_backend("mamba_ssm"):
        assert backend.choose("ssd", CUDA, offered) == backend.Choice("mamba_ssm", "asked for by use_backend")
        assert backend.choose("causal_conv1d", CUDA, ["triton", "torch"]).name == "triton"
        with pytest.raises(ValueError, match="mamba_ssm runs on CUDA; the tensors are on cpu"):
            backend.choose("ssd", CPU, offered)


def test_a_triton_that_cannot_compile_the_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(backend, "installed", lambda package: True)
    for version, refused in {"3.2.0": True, "3.3.1": False, "3.10.0+git1": False}.items():
        monkeypatch.setattr(backend, "triton_version", lambda version=version: version)
        reason = backend.runs("triton", CUDA)
        assert (reason is not None and version in reason) if refused else reason is None


def test_an_unknown_backend_is_refused():
    message = "No backend is named 'cuda'; there are: reference, torch, numba"
    with pytest.raises(ValueError, match=message), backend.use_backend("cuda"):
        pass


def test_doctor_lists_the_backends_that_ops_have():
    for op in ("causal_conv1d", "selective_scan", "ssd"):
        kernels = importlib.import_module(f"genossm.ops.{op}")._KERNELS
        assert doctor._OPS[op] == tuple(name for name in kernels if name != "mamba_ssm")
    summary = doctor.doctor().summary()
    assert summary["ssd on cpu"].endswith("numba: the fastest for cpu")
    assert "torch" in summary["ssd on mps"]


@pytest.fixture
def layouts(monkeypatch):
    """The package's two functions in its own layouts, computed by our references: it runs on CUDA alone."""

    def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
        assert return_last_state
        rows = (None if x is None else x.transpose(1, 2) for x in (u, delta, B, C, z))
        u, delta, B, C, z = rows
        y, state = selective_scan_ref(
            u, delta, A, B, C, D, z, delta_bias, dt_softplus=delta_softplus, return_state=True
        )
        return y.transpose(1, 2), state

    def mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, dt_softplus, return_final_states
    ):
        options = {"initial_state_BHPN": initial_states, "return_state": return_final_states}
        return ssd_ref(x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus, **options)

    for name, function in (
        ("mamba_ssm.ops.selective_scan_interface", selective_scan_fn),
        ("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined),
    ):
        module = ModuleType(name)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("reverse", [False, True])
def test_layouts_of_mamba_ssm(layouts, reverse):
    inputs = draw_scan()
    ours = scans_mamba_ssm.selective_scan(*inputs, reverse=reverse, return_state=True)
    truth = selective_scan_ref(*inputs, reverse=reverse, return_state=True)
    heads = [torch.randn(*s) for s in ((1, 9, 4, 3), (1, 9, 4), (4,), (1, 9, 2, 5), (1, 9, 2, 5), (4,), (1, 9, 4, 3))]
    ours += scans_mamba_ssm.ssd(*heads, reverse=reverse, return_state=True)
    truth += ssd_ref(*heads, reverse=reverse, return_state=True)
    for got, wanted in zip(ours, truth, strict=True):
        torch.testing.assert_close(got, wanted)


def test_what_mamba_ssm_has_not_is_refused():
    resets = torch.zeros(1, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mamba_ssm's selective_scan takes no lengths and no resets; leave"):
        scans_mamba_ssm.selective_scan(*draw_scan(), lengths_B=torch.tensor([9]), resets_BL=resets)


@pytest.mark.gpu
@pytest.mark.skipif(not backend.installed("mamba_ssm"), reason="mamba_ssm is not installed")
@pytest.mark.parametrize("reverse", [False, True])
def test_mamba_ssm_agrees_with_triton(reverse):
    inputs = [x.cuda() for x in draw_scan(500)]
    heads = [torch.randn(*s).cuda() for s in ((1, 500, 2, 64), (1, 500, 2), (2,), (1, 500, 1, 64), (1, 500, 1, 64))]
    heads[2] = -heads[2].exp()
    ours = selective_scan(*inputs, reverse=reverse), ssd(*heads, reverse=reverse)
    with backend.use_backend("mamba_ssm"):
        theirs = selective_scan(*inputs, reverse=reverse), ssd(*heads, reverse=reverse)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-2, rtol=1e-2)
