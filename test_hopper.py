"""
The kernels of flashsigmoid_hopper.py without a GPU: a group of warps is a thread, a barrier a condition, a tile a
tensor. Copies, products and stores happen as late as a wait allows, or at once. So a missing wait makes a result wrong,
and one that nobody ends raises TimeoutError. `python test_all.py` runs this, too.
"""
import importlib.util
import math
import random
import threading
import time
import types
import unittest
from pathlib import Path
from types import SimpleNamespace as Stub
from unittest import mock

import torch

import flashsigmoid

here = threading.local()  # of each thread: the products and stores that it has begun and not waited for
adding = threading.Lock()


# -------- What Gluon offers

class Barrier(threading.Condition):
    def init(self, count):
        self.phase, self.count, self.missing = 0, count, count  # missing: arrivals, and bytes on their way

    def arrive(self, arrivals=1):
        with self:
            self.missing -= arrivals
            if self.missing == 0:
                self.phase, self.missing = self.phase + 1, self.count
                self.notify_all()

    def wait_for_parity(self, parity):
        with self:
            if not self.wait_for(lambda: self.phase % 2 != parity, timeout=10):
                raise TimeoutError("a barrier of flashsigmoid_hopper.py")


class Barriers(list):
    index = list.__getitem__
    shape = property(lambda self: [len(self)])


class Tile(torch.Tensor):
    index = torch.Tensor.__getitem__
    store = torch.Tensor.copy_

    def slice(self, start, length, dim):
        return self.narrow(dim, start, length)


class Descriptor:
    def __init__(self, tensor, rows, columns=None):
        self.tensor, self.dtype, self.layout = tensor, tensor.dtype, None
        self.block_shape = [1, 1, rows, columns or tensor.shape[3]]
        self.block_type = Stub(nbytes=rows)

    def parts(self, coord, tile):
        """Of the block at coord: what lies in the tensor, and the same rows of the tile."""
        b, h, row, column = coord
        rows, columns = self.block_shape[2:]
        part = self.tensor[b, h, max(row, 0):max(row + rows, 0), column:column + columns]
        return part, tile.view(rows, columns)[max(-row, 0):][:len(part)]


def load(X, coord, barrier, tile):
    def copy():
        time.sleep(random.choice((0, 0.001, 0.01)))
        tile.zero_()
        part, rows = X.parts(coord, tile)
        rows.copy_(part)
        barrier.arrive(X.block_type.nbytes)
    threading.Thread(target=copy).start()


def store(X, coord, tile, add=False):
    def copy():
        part, rows = X.parts(coord, tile)
        with adding:
            part.copy_(part + rows if add else rows)
    here.stores.append(copy)


def store_wait(pending):
    while len(here.stores) > pending:
        here.stores.pop(0)()


def mma(a, b, acc, use_acc=True, is_async=True):
    """A product to come: a list that holds nothing yet."""
    result = []
    here.products.append(lambda: result.append(a @ b + (acc[0] if isinstance(acc, list) else acc) * use_acc))
    mma_wait(random.choice((0, math.inf)), [])  # at once, or not yet
    return result


def mma_wait(pending, deps):
    while len(here.products) > pending:
        here.products.pop(0)()
    values = [x[0] if isinstance(x, list) and x else x for x in deps]
    return values[0] if len(values) == 1 else values


def specialize(partitions, warps, registers):
    failures = []

    def run(partition, arguments):
        here.products, here.stores = [], []
        try:
            partition(*arguments)
        except Exception as error:
            failures.append(error)
    threads = [threading.Thread(target=run, args=partition) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def allocate(dtype, shape, layout):
    if dtype is None:
        return Barriers(Barrier() for _ in range(shape[0]))
    return torch.full(shape, math.nan).as_subclass(Tile)


def hopper_module():
    """flashsigmoid_hopper.py on top of all this, and launch(), which runs one program after the other."""
    tl = Stub(cdiv=lambda x, y: -(-x // y), minimum=min, maximum=max, load=lambda value: value,
              where=lambda condition, x, y: x if condition else y)

    def launch(kernel, programs, tensors, rest, descriptor, num_warps):
        tl.num_programs = lambda axis: programs
        for program in range(programs):
            tl.program_id = lambda axis: program
            kernel(*(Descriptor(*x) for x in tensors), *rest)

    def weights(s, i, j, k_len, scale, bias, slope, CAUSAL, MASK, GRAD, EXACT):
        x = scale * s + bias - (0 if slope is None else slope * (i - j).abs())
        if MASK:
            x = x.masked_fill((j >= k_len) | (j > i) if CAUSAL else j >= k_len, -80)
        x = x.clamp(min=-80)
        return torch.sigmoid(x), torch.exp(-x)

    plain = {name: types.FunctionType(getattr(flashsigmoid, name).fn.__code__, dict(tl=tl))
             for name in ("entry", "key_range", "place")}
    gl = Stub(constexpr=int, static_range=range, int64=None, float32=torch.float32, allocate_shared_memory=allocate,
              zeros=lambda shape, *_: torch.zeros(shape), arange=lambda first, end, layout: torch.arange(end),
              convert_layout=lambda x, layout: x, warp_specialize=specialize,
              **dict.fromkeys(("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout"), lambda *_: None))
    mbarrier = Stub(MBarrierLayout=lambda: None, init=Barrier.init, wait=Barrier.wait_for_parity, arrive=Barrier.arrive,
                    expect=lambda barrier, nbytes: barrier.arrive(1 - nbytes))
    tma = Stub(async_load=load, async_store=store, store_wait=store_wait,
               async_atomic_add=lambda *x: store(*x, add=True))
    name = "triton.experimental"
    stubs = {name: Stub(gluon=Stub(jit=lambda kernel: kernel)), f"{name}.gluon": Stub(language=gl),
             f"{name}.gluon.language.nvidia.hopper": Stub(mbarrier=mbarrier, tma=tma, fence_async_shared=lambda: None,
                                                          warpgroup_mma=mma, warpgroup_mma_wait=mma_wait),
             f"{name}.gluon.nvidia.hopper": Stub(TensorDescriptor=None),
             "flashsigmoid": Stub(**plain, launch=launch, narrow=lambda p, dtype: p, tl=tl, weights=weights)}
    spec = importlib.util.spec_from_file_location("hopper", Path(__file__).with_name("flashsigmoid_hopper.py"))
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict("sys.modules", stubs):
        spec.loader.exec_module(module)
    return module


class Pointer(list):
    __add__ = list.__getitem__


@unittest.skipUnless(hasattr(flashsigmoid.place, "fn"), "Triton is not there")
class Hopper(unittest.TestCase):
    def test_kernels_against_float64(self):
        random.seed(0)
        torch.manual_seed(0)
        hopper = hopper_module()
        for H, Hk, Tq, Tk, D, causal, slopes, lens in (
                (2, 2, 70, 330, 64, False, None, None), (2, 1, 200, 200, 128, True, None, None),
                (1, 1, 330, 90, 64, True, None, None), (2, 1, 130, 300, 64, True, [0.5, 0.1], [300, 70]),
                (2, 2, 100, 300, 128, False, None, [0, 130])):
            with self.subTest(H=H, Hk=Hk, Tq=Tq, Tk=Tk, D=D, causal=causal, slopes=slopes, lens=lens):
                q, do, k, v = (torch.randn(2, heads, T, D) for heads, T in ((H, Tq), (H, Tq), (Hk, Tk), (Hk, Tk)))
                leaves = [x.double().requires_grad_() for x in (q, k, v)]
                options = dict(alibi_slopes=slopes and torch.tensor(slopes), k_lens=lens and torch.tensor(lens))
                out = flashsigmoid.sigmoid_attention_reference(*leaves, -2.0, causal, None, **options)
                expected = out, *torch.autograd.grad(out, leaves, do.double())
                found = [torch.full_like(x, math.nan) for x in (q, q, k, v)]
                rest = (None, slopes and Pointer(slopes), lens and Pointer(lens), -2.0, D ** -0.5, H, Tq, Tk, H // Hk,
                        causal)
                hopper.forward(q, k, v, found[0], rest)
                hopper.backward(do, q, k, v, *found[1:], rest)
                for x, exact in zip(found, expected):
                    self.assertLess(((x - exact).norm() / exact.norm()).item(), 1e-5)


if __name__ == "__main__":
    unittest.main()
