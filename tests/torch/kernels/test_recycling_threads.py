"""Recycled outputs that other threads free, and processes that fork meanwhile."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading

import pytest
import torch

import batchnorm
from batchnorm.torch import BatchNorm
from batchnorm.torch.kernels import recycling
from batchnorm.torch.kernels.recycling import RECYCLER

pytestmark = pytest.mark.skipif(not recycling._SERVED, reason="not recycled on this system")
SHAPE = (1 << 15, 16)  # 2 MiB
BYTES = 2 << 20
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")


@pytest.fixture(autouse=True)
def fresh():
    batchnorm.release_memory()
    yield
    batchnorm.release_memory()


def in_threads(*works):
    """Run functions at the same time; an exception of one is the test's."""
    failures = []

    def run(work):
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_threads_free_what_others_have_allocated():
    outputs: queue.Queue = queue.Queue(maxsize=4)
    shapes = [SHAPE, (1 << 14, 48), (1 << 13, 40)]

    def produce(seed):
        layer = BatchNorm(1, affine=False, momentum=0.0).eval()
        layer.running_var.fill_(1.0 - layer.eps)
        for i in range(120):
            value = float(1000 * seed + i)
            x = torch.full(shapes[i % len(shapes)], value).reshape(-1, 1)
            outputs.put((layer(x), value))
            del x
        outputs.put(None)

    def consume():
        while (found := outputs.get()) is not None:
            y, value = found
            assert (y == value).all()
            del y, found  # the last reference: this thread frees it

    in_threads(*(lambda s=s: produce(s) for s in range(2)), consume, consume)
    held, busy = RECYCLER.held
    assert busy == 0
    # Each thread has two outputs at the most, and the queue four.
    assert held <= (2 * 4 + 4) * 3 * BYTES


def test_backward_passes_at_the_same_time_find_their_own_gradients():
    torch.manual_seed(0)
    inputs = [torch.randn(SHAPE, requires_grad=True) for _ in range(3)]
    layers = [BatchNorm(16) for _ in inputs]
    cotangent = torch.randn(SHAPE)
    expected = []
    for x, layer in zip(inputs, layers, strict=True):
        layer(x).backward(cotangent)
        expected.append(x.grad.clone())

    def step(x, layer, right):
        for _ in range(25):
            x.grad = None
            layer(x).backward(cotangent)
            assert torch.equal(x.grad, right)

    triples = zip(inputs, layers, expected, strict=True)
    in_threads(*(lambda t=t: step(*t) for t in triples))


BEGIN = """
import os, signal, sys, threading, torch
from batchnorm.torch import BatchNorm
from batchnorm.torch.kernels.recycling import RECYCLER
torch.set_num_threads(1)
layer, x = BatchNorm(16), torch.randn(1 << 15, 16)

def in_child(work):
    # Exit status 0 if the child's work is right; a child that waits for a lock is ended.
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            right = work()
        except BaseException:
            right = False
        os._exit(0 if right else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""
FREES = """
y = layer(x)
before = y.clone()

def free_and_allocate():
    global y
    del y  # the parent's output
    others = [layer(2 * x) for _ in range(4)]
    return RECYCLER.held == (4 * x.nbytes, 4 * x.nbytes)

assert in_child(free_and_allocate) == 0
assert torch.equal(y, before)
assert RECYCLER.held == (x.nbytes, x.nbytes)
del y
assert RECYCLER.held == (x.nbytes, 0)
assert layer(x).shape == x.shape
assert RECYCLER.held == (x.nbytes, 0)
"""
BUSY = """
stop = threading.Event()

def allocate():
    while not stop.is_set():
        kept = [RECYCLER.empty((n, 16), (16, 1), torch.float32) for n in (1 << 15, 1 << 14)]
        RECYCLER.rest()
        RECYCLER.held

threads = [threading.Thread(target=allocate) for _ in range(3)]
for thread in threads:
    thread.start()

def step():
    z = x.clone().requires_grad_()
    for _ in range(3):
        z.grad = None
        layer(z).sum().backward()
    return RECYCLER.held[1] == x.nbytes

found = [in_child(step) for _ in range(20)]
stop.set()
for thread in threads:
    thread.join()
assert found == [0] * 20, found
"""


@FORKS
@pytest.mark.parametrize("code", [FREES, BUSY], ids=["child frees", "threads allocate meanwhile"])
def test_forks(code):
    command = [sys.executable, "-W", "ignore", "-c", BEGIN + code]
    done = subprocess.run(command, timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
