"""Which code the kernels of whole models need: the same for every length, and foreseen at an op's first call.

No GPU is asked: models run on tensors without data, launches are noted, and Triton tells what it would compile.
"""

import contextlib
import importlib
import pkgutil
import time
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import cross_entropy

import genossm.models.mamba
import genossm.nn.hyena
from genossm.models.base import Backbone, config_from_dict
from genossm.ops import backend, kept
from genossm.ops import kernels as of_ops

pytestmark = pytest.mark.skipif(
    not backend.installed("triton") or backend.triton_interpreted(), reason="asks Triton's compiler"
)

MODELS = {
    "hyenadna": {"d_model": 256, "n_layer": 1, "max_length": 1 << 20},
    "caduceus": {"d_model": 256, "n_layer": 1},
    "caduceus_ps": {"d_model": 118, "n_layer": 1, "rcps": True},
    "mamba": {"d_model": 256, "n_layer": 1},
    "mamba2": {"d_model": 256, "n_layer": 1},
    "striped_hyena": {"d_model": 256, "n_layer": 2},
    "transformer": {"d_model": 256, "n_layer": 1},
}
SHAPES = [(1, 33_333), (3, 777), (16, 1000), (1, 1)]
FEW = {
    # One row needs no sum over rows; it compiles in about a second at most.
    "_correlate",
    # A gradient of one row or of several may come laid out in another way.
    "_finish_backward",
}


@pytest.fixture
def launches(monkeypatch):
    """What the kernels' launches need, and how to note them instead."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    compiler, binders, found = make_backend(GPUTarget("cuda", 90, 32)), {}, set()
    ahead = importlib.import_module("genossm.ops.kernels.ahead")

    def note(kernel, grid, tensors, numbers, **flags):
        if kernel not in binders:
            binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, compiler)
        likes = [
            t if t is None else ahead._Like(t.dtype.to_real(), t.storage_offset() * t.itemsize % 16) for t in tensors
        ]
        _, needs, _ = binders[kernel](*likes, *numbers, **flags)
        found.add((kernel.fn.__module__.rsplit(".")[-1], kernel.fn.__name__, str(needs), str(flags)))

    for module in pkgutil.iter_modules(of_ops.__path__):
        if "triton" in module.name or module.name == "selective_scan_parts":
            loaded = importlib.import_module(f"{of_ops.__name__}.{module.name}")
            if hasattr(loaded, "launch"):
                monkeypatch.setattr(loaded, "launch", note)
    # Tensors without data lie on the CPU; models are to take them for a GPU's.
    monkeypatch.setattr(backend, "triton_interpreted", lambda: True)
    monkeypatch.setattr(torch, "autocast", lambda device, enabled=True, **options: autocast(enabled))
    monkeypatch.setattr(ahead, "_autocast", autocast)
    monkeypatch.setattr(FakeTensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(Backbone, "check", lambda *given: None)
    monkeypatch.setattr(genossm.models.mamba, "_PIECE", 1 << 60)
    monkeypatch.setattr(genossm.nn.hyena, "_LONG", {"cpu": genossm.nn.hyena._LONG["cuda"]})
    monkeypatch.setattr(genossm.nn.hyena, "_CHANNELS", {"cpu": genossm.nn.hyena._CHANNELS["cuda"]})
    monkeypatch.setattr(genossm.nn.hyena, "_ELEMENTS", 1 << 60)
    return found


@contextlib.contextmanager
def autocast(enabled=True):
    """Turn a GPU's autocast on or off, and the CPU's, where the tensors lie, with it."""
    devices = ("cpu", "cuda")
    before = [torch.is_autocast_enabled(device) for device in devices]
    for device in devices:
        torch.set_autocast_dtype(device, torch.bfloat16)
        torch.set_autocast_enabled(device, enabled)
    try:
        yield
    finally:
        for device, was in zip(devices, before, strict=True):
            torch.set_autocast_enabled(device, was)


def run(model, batch, length, train=True):
    ids_BL = torch.zeros(batch, length, dtype=torch.long)
    with backend.use_backend("triton"), torch.set_grad_enabled(train):
        with autocast():
            logits = model.logits(model(ids_BL))
        if train:
            cross_entropy(logits.float().flatten(0, 1), ids_BL.flatten()).backward()


def build(name):
    return config_from_dict({"model_type": name.removesuffix("_ps"), **MODELS[name]}).build().train()


@pytest.mark.parametrize("name", MODELS)
def test_a_new_length_compiles_next_to_nothing(name, launches):
    with FakeTensorMode():
        model = build(name)
        run(model, 1, 4096)
        run(model, 1, 4096, train=False)
        before = set(launches)
        assert before
        for shape in SHAPES:
            run(model, *shape)
            run(model, *shape, train=False)
    new = {kernel for kernel in launches - before if kernel[1] not in FEW}
    assert not new
    assert len(launches - before) <= 2


def test_long_sequences_share_their_kernels(launches):
    with FakeTensorMode():
        model = build("hyenadna")
        run(model, 1, 131_072)
        before = set(launches)
        run(model, 1, 99_999)
        run(model, 1, 65_537)
        run(model, 1, 200_000)
        run(model, 1, 1_000_001)
    assert launches == before


@pytest.mark.parametrize("name", MODELS)
def test_the_first_call_of_an_op_foresees_its_kernels(name, launches, monkeypatch):
    ahead = importlib.import_module("genossm.ops.kernels.ahead")
    asked, seen = set(), set()
    note = importlib.import_module("genossm.ops.kernels.add_norm_triton").launch

    def note_and_rehearse(kernel, grid, tensors, numbers, **flags):
        op = ahead.here.running
        if op is not None and ahead.kind(op) not in seen:
            seen.add(ahead.kind(op))
            ahead.here.running = None
            before = set(launches)
            launches.clear()
            ahead.rehearse(op)
            asked.update(launches)
            launches.clear()
            launches.update(before)
        note(kernel, grid, tensors, numbers, **flags)

    for module in pkgutil.iter_modules(of_ops.__path__):
        loaded = importlib.import_module(f"{of_ops.__name__}.{module.name}") if "_triton" in module.name else None
        if getattr(loaded, "launch", None) is note:
            monkeypatch.setattr(loaded, "launch", note_and_rehearse)
    with FakeTensorMode():
        run(build(name), 1, 33_333)
    # What stands alone has nothing to wait for.
    alone = {"gelu_triton", "column_sum_triton", "selective_scan_parts"}
    assert not {kernel for kernel in launches - asked if kernel[0] not in alone}
    assert len(asked - launches) <= 1


def test_a_first_call_has_all_kernels_compiled_once_and_waits_for_its_own(monkeypatch):
    ahead = importlib.import_module("genossm.ops.kernels.ahead")
    launch = importlib.import_module("genossm.ops.kernels.triton_launch").launch
    asked = []

    class Kernel:
        cache_key = "the sources"
        params = (SimpleNamespace(do_not_specialize=False), SimpleNamespace(do_not_specialize=True))

        def __getitem__(self, grid):
            return lambda *given, **flags: None

        def warmup(self, like, number, grid, **flags):
            time.sleep(0.05)
            asked.append((self, like.dtype, number, flags))

    forth, back = Kernel(), Kernel()

    @ahead.together
    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            # A launch on a GPU prepares; the CPU's does not.
            if ahead.here.put_off is None:
                ahead.prepare(forth, 0)
                assert (forth, torch.float32, 3, {"T": 4}) in asked
            launch(forth, (1,), (x,), (3,), T=4)
            # A number that code does not depend on asks for none.
            launch(forth, (1,), (x,), (1,), T=4)
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            if ahead.here.put_off is None:
                ahead.prepare(back, 0)
            launch(back, (1,), (grad,), (3,), T=4)
            return grad * 2

    monkeypatch.setattr(ahead, "_threads", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", lambda number: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    ahead._pool.cache_clear()
    for _ in range(2):
        Op.apply(torch.zeros(5, requires_grad=True)).sum().backward()
    ahead._pool().shutdown()
    ahead._pool.cache_clear()
    assert {kernel for kernel, *_ in asked} == {forth, back}
    assert len(asked) == 2


def test_a_rehearsal_that_fails_says_so_and_changes_nothing(caplog):
    ahead = importlib.import_module("genossm.ops.kernels.ahead")

    @ahead.together
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            assert not kept.inside()
            raise ValueError("no such kernel")

    first, _ = kept.region()
    with first:
        assert ahead._rehearsed(ahead.Op(Failing, True, False, (torch.zeros(3),))) == []
        assert kept.inside()
    assert "Failing are compiled one after the other: no such kernel" in caplog.text
    assert ahead.here.put_off is None


def test_a_rehearsal_cuts_long_arguments_and_keeps_how_they_lie():
    ahead = importlib.import_module("genossm.ops.kernels.ahead")
    wide, long = torch.zeros(2, 20_000, 7)[..., :5], torch.zeros(2, 5, 20_000).transpose(1, 2)
    assert ahead._short(wide).stride() == wide.stride()
    assert ahead._short(long).stride() == (5 << 14, 1, 1 << 14)
    assert {ahead._short(x).shape for x in (wide, long)} == {(2, 1 << 14, 5)}
    assert ahead._short(torch.zeros(4, 3).T).stride() == (1, 3)
