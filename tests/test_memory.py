"""Memory stays level while weights change, and forked children never wait for threads that they do not have."""

from __future__ import annotations

import subprocess
import sys

import pytest

from parnet_kernels import _native

pytestmark = pytest.mark.skipif(_native.cpu_error is not None, reason=str(_native.cpu_error))

PREPARE = """
import gc, os, torch
from parnet_kernels import ParNet, ParNetConfig, ops
from parnet_kernels.cpu import pack as backend
torch.set_num_threads(1)

def megabytes():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

def layer(c):
    return [torch.randn(c, c, 3, 3), *(torch.randn(c) for _ in range(3)), torch.randn(c, c)]

def growth(step, calls):
    for i in range(calls // 2):
        step(i)
    before = megabytes()
    for i in range(calls):
        step(i)
    return megabytes() - before
"""

STEPS = {
    "in place": (
        400,
        "x, p = torch.randn(1, 64, 6, 6), layer(64)\ndef step(i): ops.repvgg_sse(x, *p); p[0].mul_(0.9999)",
    ),
    "made anew": (4000, "x = torch.randn(1, 8, 6, 6)\ndef step(i): ops.repvgg_sse(x, *layer(8))"),
    "optimizer": (
        300,
        "x, p = torch.randn(1, 64, 6, 6), [t.requires_grad_() for t in layer(64)]\n"
        "optimizer = torch.optim.SGD(p, lr=1e-6)\n"
        "def step(i): optimizer.zero_grad(); ops.repvgg_sse(x, *p).sum().backward(); optimizer.step()",
    ),
    "network": (
        300,
        "net = ParNet(ParNetConfig((32, 64, 64, 64), (2, 2, 2), num_classes=10)).eval().deploy()\n"
        "x, b = torch.randn(1, 3, 32, 32), next(net.parameters())\n"
        "def step(i): net(x); b.mul_(0.9999)",
    ),
    "new sizes": (
        400,
        "net = ParNet(ParNetConfig((8, 8, 8, 8), (2, 2, 2), num_classes=10)).eval().deploy()\n"
        "def step(i): net(torch.randn(1, 3, 16 + i % 100, 17))",
    ),
    "training": (
        60,
        "net = ParNet(ParNetConfig((16, 32, 48, 64), (2, 2, 2), num_classes=10)).train()\n"
        "def step(i): net(torch.randn(2, 3, 32 + i % 40, 34)).sum().backward(); net.zero_grad()",
    ),
    "int8": (
        200,
        "net = ParNet(ParNetConfig((8, 8, 8, 8), (2, 2, 2), num_classes=10)).eval().deploy()\n"
        "net = net.quantize(torch.randn(2, 3, 32, 32))\n"
        "def step(i): net.layers['combine_3'].bias.mul_(0.9999); net(torch.randn(1, 3, 16 + i % 100, 17))",
    ),
    "telling": (20000, "def step(i): torch.ops.parnet._cpu_info(), torch.ops.parnet._cpu_direct_info()"),
    "packing": (
        20000,
        "names = ('weight', 'bias', 'skip_scale', 'skip_shift', 'gate_weight')\n"
        "given = backend.coded(backend.OPTIONAL | dict(zip(names, layer(8)))\n"
        "    | {'kind': 'repvgg_sse', 'stride': 1, 'activation': 'silu', 'storage': 'transformed'})\n"
        "empty = torch.empty(0, dtype=torch.uint8)\n"
        "def step(i): torch.ops.parnet._cpu_pack(empty, 0, **given)",
    ),
}


def run(code: str) -> str:
    found = subprocess.run([sys.executable, "-c", PREPARE + code], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", STEPS)
def test_memory_stays_level(how: str) -> None:
    calls, code = STEPS[how]
    assert float(run(f"{code}\nprint(growth(step, {calls}))")) < (1.2 if how in ("packing", "telling") else 24)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_children_forked_during_calls_answer() -> None:
    code = """
import signal, sys, threading, time
net = ParNet(ParNetConfig((8, 8, 8, 8), (2, 2, 2), num_classes=10)).eval().deploy()
x, p = torch.randn(1, 3, 20, 20), layer(8)
m = torch.randn(1, 8, 6, 6)
right, right_layer = net(x), ops.repvgg_sse(m, *p)
packed = net._native.prepare(net.whole())
going = True

def exported(x, seed):  # another hash is another program, whose constants are copied
    arguments = packed.weights, packed.steps, packed.classifier, True, 10, 32
    return torch.ops.parnet._cpu_exported(x, *arguments, seed)

def train(rows, cols):
    maps = torch.ones(1, 8, rows, cols).to(memory_format=torch.channels_last)
    out = torch.empty_like(maps)
    torch.ops.parnet._cpu_train_convolve(maps, p[0], 1, False, False, True, out)
    return out

def call(seed):
    i = seed
    while going:  # new sizes, new weights: plans and packed weights are made all the time
        i += 1
        net(torch.ones(1, 3, 8 + i % 97, 16 + i % 89))  # not randn: torch's generator does not survive a fork
        ops.repvgg_sse(m, *[t.clone() for t in p])
        exported(x, i)
        train(8 + i % 97, 16 + i % 89)

threads = [threading.Thread(target=call, args=(1000 * t,), daemon=True) for t in range(3)]
for t in threads:
    t.start()
failed = 0
for _ in range(60):
    child = os.fork()
    if child == 0:
        ok = torch.equal(net(x), right) and torch.equal(ops.repvgg_sse(m, *p), right_layer)
        ok = ok and torch.equal(exported(x, -1), right) and bool(train(21, 23).isfinite().all())
        os._exit(0 if ok and net(torch.ones(1, 3, 31, 33)).isfinite().all() else 1)
    end, status = time.monotonic() + 20, None
    while status is None and time.monotonic() < end:
        found, code = os.waitpid(child, os.WNOHANG)
        status = code if found else time.sleep(0.002)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    failed += status != 0
    if failed > 2:
        break
going = False
for t in threads:
    t.join()
print(failed)
"""
    assert run(code).strip() == "0"
