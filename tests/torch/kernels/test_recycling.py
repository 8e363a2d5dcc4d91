"""Outputs in memory that is used again."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.torch import BatchNorm
from batchnorm.torch.kernels import recycling
from batchnorm.torch.kernels.recycling import RECYCLER, Recycler

pytestmark = pytest.mark.skipif(not recycling._SERVED, reason="not recycled on this system")
SHAPE = (1 << 15, 16)  # 2 MiB
BYTES = 2 << 20


@pytest.fixture
def recycler():
    return Recycler()


@pytest.fixture(autouse=True)
def fresh():
    batchnorm.release_memory()
    yield
    batchnorm.limit_memory(None)
    batchnorm.release_memory()


def empty(recycler, shape=SHAPE):
    return recycler.empty(shape, torch.empty(shape, device="meta").stride(), torch.float32)


def test_memory_is_used_again_once_nobody_holds_it(recycler):
    first = empty(recycler)
    address = first.data_ptr()
    second = empty(recycler)
    assert second.data_ptr() != address
    del first
    assert empty(recycler).data_ptr() == address
    assert recycler.held == (2 * BYTES, BYTES)


HOLDERS = {
    "view": lambda y: y[3:],
    "detached": lambda y: y.detach(),
    "numpy": lambda y: y.numpy(),
    "storage": lambda y: y.untyped_storage(),
    "typed view": lambda y: y.view(torch.int32),
    "dlpack": torch.utils.dlpack.to_dlpack,
    "from dlpack": torch.from_dlpack,
    "parameter": nn.Parameter,
    "autograd": lambda y: (y.clone().requires_grad_() * y).sum(),
    "memoryview": lambda y: memoryview(y.numpy()),
    "from numpy": lambda y: torch.from_numpy(y.numpy()),
    "set_": lambda y: torch.empty(0).set_(y.untyped_storage(), 0, (4,), (1,)),
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_whoever_holds_it_keeps_it(recycler, hold):
    y = empty(recycler)
    address = y.data_ptr()
    held = hold(y)
    del y
    assert empty(recycler).data_ptr() != address
    del held
    assert recycler.held == (2 * BYTES, 0)


def test_a_resized_storage_is_not_used_again(recycler):
    y = empty(recycler)
    y.resize_(1 << 21)
    y.fill_(1.0)
    other = empty(recycler)
    other.fill_(2.0)
    assert (y == 1.0).all()
    z = empty(recycler)
    z.untyped_storage().resize_(0)  # as programs do that free activations early
    del y, z
    assert empty(recycler).untyped_storage().nbytes() == BYTES


def test_a_storage_whose_size_numpy_has_fixed_is_not_used_again(recycler):
    empty(recycler).numpy()
    y = empty(recycler)
    y.untyped_storage().resize_(0)
    assert y.untyped_storage().nbytes() == 0


def test_the_default_device_does_not_matter():
    layer, x = BatchNorm(16), torch.randn(SHAPE)
    with torch.device("meta"):
        assert layer(x).device.type == "cpu"


def test_shared_memory_is_not_used_again(recycler):
    y = empty(recycler).fill_(1.0)
    y.share_memory_()
    address = y.data_ptr()
    del y
    other = empty(recycler)
    assert not other.is_shared()
    assert other.data_ptr() != address


def test_it_is_saved_and_pickled_as_any_other(recycler):
    y = empty(recycler).fill_(1.0)
    file = io.BytesIO()
    torch.save(y, file)
    assert file.tell() < BYTES + 10_000
    file.seek(0)
    assert torch.equal(torch.load(file), y)
    assert torch.equal(pickle.loads(pickle.dumps(y)), y)


def test_autograd_sees_a_new_tensor(recycler):
    weight = torch.ones(SHAPE, requires_grad=True)
    y = empty(recycler).fill_(2.0)
    loss = (weight * y).sum()
    version = y._version
    del y
    other = empty(recycler)
    other.add_(1)
    assert (other.requires_grad, other._base) == (False, None)
    assert other._version <= version + 1
    loss.backward()  # y was saved, and is what it was
    assert (weight.grad == 2.0).all()


def test_it_holds_what_one_step_had_in_use_at_once(recycler):
    sizes = [BYTES // 4 + 1024 * i for i in range(40)]
    for _ in range(3):
        for size in sizes:
            kept = [empty(recycler, (size,)) for _ in range(3)]
            del kept
            held, busy = recycler.held
            assert busy == 0
            assert held <= 3 * 4 * max(sizes)
    assert recycler.release() > 0
    assert recycler.held == (0, 0)


def test_a_limit_is_kept():
    recycler = Recycler(3 * BYTES)
    kept = [empty(recycler) for _ in range(5)]
    assert recycler.held == (3 * BYTES, 3 * BYTES)
    del kept
    recycler.set_limit(BYTES)
    assert recycler.held == (BYTES, 0)


def test_never_above_a_quarter_of_the_memory_that_is_available(recycler, monkeypatch):
    monkeypatch.setattr(recycling, "_find_available", lambda: 8 * BYTES)
    kept = [empty(recycler) for _ in range(5)]
    assert recycler.held == (2 * BYTES, 2 * BYTES)
    del kept


def test_available_memory_is_found():
    found = recycling._find_available()
    assert 1 << 20 < found < 1 << 50


def test_idle_pages_are_offered_to_the_system_once(recycler, monkeypatch):
    offered = []
    offer = recycling._offer_pages
    monkeypatch.setattr(recycling, "_offer_pages", lambda a: (offered.append(a.nbytes()), offer(a)))
    monkeypatch.setattr(recycling, "_IDLE", 0.01)
    y, z = empty(recycler), empty(recycler)
    del y
    recycler.rest()
    time.sleep(0.02)
    recycler.rest()
    recycler.rest()
    assert offered == [BYTES]
    again = empty(recycler).fill_(3.0)
    assert (again == 3.0).all()
    del z


def test_a_failed_allocation_gives_back_what_is_idle_first(recycler, monkeypatch):
    empty(recycler)  # and freed
    made, original = [], torch.UntypedStorage

    def fail(size):
        made.append(recycler.held[0])
        if len(made) < fails:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return original(size)

    monkeypatch.setattr(recycling.torch, "UntypedStorage", fail)
    fails = 2
    assert empty(recycler, (1 << 20,)).shape == (1 << 20,)
    assert made[-1] == 0
    fails = 100
    with pytest.raises(MemoryError, match="no memory for an output of 8,388,608 bytes"):
        empty(recycler, (1 << 21,))


def test_no_memory_for_y_moves_nothing(monkeypatch):
    layer, x = BatchNorm(16), torch.randn(SHAPE)

    def fail(size):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(recycling.torch, "UntypedStorage", fail)
    with pytest.raises(MemoryError):
        layer(x)
    assert layer.num_batches_tracked == 0
    assert not layer.running_mean.any()


def test_threads_never_share_an_output(recycler):
    failures = []

    def work(seed):
        for i in range(200):
            kept = [empty(recycler).fill_(seed * 1000 + i + j) for j in range(2)]
            if any((y.view(-1)[::4096] != seed * 1000 + i + j).any() for j, y in enumerate(kept)):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert recycler.held[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_a_child_begins_anew_and_leaves_its_parents_memory_alone():
    code = """
import os, sys, torch
from batchnorm.torch import BatchNorm
from batchnorm.torch.kernels.recycling import RECYCLER
layer, x = BatchNorm(16), torch.randn(1 << 15, 16)
torch.set_num_threads(1)
y = layer(x)
other = layer(x); del other
before = y.clone()
child = os.fork()
if child == 0:
    held = RECYCLER.held
    for _ in range(5):
        z = layer(2 * x)
    os._exit(0 if held == (0, 0) and torch.equal(y, before) else 1)
_, status = os.waitpid(child, 0)
assert torch.equal(y, before)
layer(x)
sys.exit(os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=120)
    assert done.returncode == 0


def test_layers_use_it_forward_and_backward():
    layer, x = BatchNorm(16, activation="relu"), torch.randn(SHAPE, requires_grad=True)
    residual = torch.randn(SHAPE, requires_grad=True)
    for _ in range(3):
        x.grad = residual.grad = None
        layer(x, residual=residual).square().sum().backward()
    held, busy = RECYCLER.held
    assert held == 3 * BYTES  # y, dx and the residual's gradient
    assert busy == 2 * BYTES  # the leaves' gradients
    assert "recycled, 6 MiB held" in str(batchnorm.explain(layer, x))
    x.grad = residual.grad = None
    assert batchnorm.release_memory() == 3 * BYTES


def test_results_are_those_of_fresh_memory():
    torch.manual_seed(0)
    found = []
    for limit in (None, 0):
        batchnorm.limit_memory(limit)
        layer = BatchNorm(16)
        for step in range(3):
            x = torch.linspace(-1 - step, 1, SHAPE[0] * SHAPE[1]).reshape(SHAPE).requires_grad_()
            y = layer(x)
            (y * y.detach().roll(1, 0)).sum().backward()
        found.append((y, x.grad, layer.running_var))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert RECYCLER.held == (0, 0)


def test_gapped_and_permuted_inputs():
    x = torch.randn(1 << 15, 40)[:, :16]
    y = BatchNorm(16)(x)
    assert y.stride() == (16, 1)
    image = torch.randn(8, 64, 64, 16).permute(0, 3, 1, 2)
    assert BatchNorm(16)(image).stride() == image.stride()


def test_small_outputs_are_fresh():
    BatchNorm(16)(torch.randn(64, 16))
    assert RECYCLER.held == (0, 0)


def test_settings_are_checked_and_shown(capsys):
    with pytest.raises(TypeError, match="limit_memory: limit must be a number of bytes or None"):
        batchnorm.limit_memory("1 GB")
    with pytest.raises(ValueError, match="limit_memory: limit must be at least 0; got -1"):
        batchnorm.limit_memory(-1)
    batchnorm.limit_memory(0)
    batchnorm.show_config()
    assert "outputs     not recycled, as BATCHNORM_MEMORY or limit_memory say" in (
        capsys.readouterr().out
    )
    with pytest.raises(ValueError, match="BATCHNORM_MEMORY must be a number of bytes"):
        recycling._parse_limit("much")
    assert recycling._parse_limit("1024") == 1024
