"""
FlashSigmoid on Hopper: the forward and the backward pass of flashsigmoid.py for 16-bit heads of 33 to 128 channels,
faster, in Gluon, Triton's lower level.

In both, one warp loads tiles into a ring while groups of four warps multiply. Forward, each of three groups (four for
up to 64 channels) owns 64 queries, and while the tensor cores multiply the weights of a tile by its values, it turns
the scores of the next into weights. Backward, each of two groups owns 64 keys, and one kernel makes all gradients: 5
products a tile where two kernels make 7. dQ is a sum over programs, which the copy engine adds in fp32, in any order:
the last bits may differ between equal calls. torch.use_deterministic_algorithms(True) selects the portable backward
pass, as does a bias that is a tensor.
"""
import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashsigmoid import entry, key_range, launch, narrow, place, tl, weights

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name before Triton 3.7
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
tma_add = getattr(tma, "async_atomic_add", None)
if tma_add is None:
    from triton._C.libtriton import ir

    @gl._core.builtin
    def tma_add(X, coord, x, _semantic=None):
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, X.handle, coord, x.handle)


# -------- Tiles lie in shared memory as (places, 1, 1, rows, D). The barrier full says that a tile has been loaded,
# free that its place has been left. u counts the tiles of a ring, u // places the phases of a barrier.

@gluon.jit
def barriers(places: gl.constexpr, arrivals: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [places, 1], mbarrier.MBarrierLayout())
    for u in gl.static_range(places):
        mbarrier.init(bars.index(u), count=arrivals)
    return bars


@gluon.jit
def wait(bars, u):
    """Until tile u has been loaded (full) or its place left by the tile before (free)."""
    mbarrier.wait(bars.index(u % bars.shape[0]), u // bars.shape[0] % 2)


@gluon.jit
def tile(tiles, u):
    """What lies in the place of tile u."""
    x = tiles.index(u % tiles.shape[0])
    return x.reshape([x.shape[2], x.shape[3]])


@gluon.jit
def stream(X, Y, b, h, heads: gl.constexpr, first, end, ring, full, free):
    """Loads the tiles X, Y, X, Y, ... of the rows from first to end, for some heads from h on."""
    R: gl.constexpr = ring.shape[0]
    u = 0
    for head in range(heads):
        for row in range(first, end, X.block_shape[2]):
            for is_y in gl.static_range(2):
                wait(free, u + R)
                mbarrier.expect(full.index(u % R), X.block_type.nbytes)
                tma_load(Y if is_y else X, [b, h + head, row, 0], full.index(u % R), ring.index(u % R))
                u += 1


# -------- Forward

@gluon.jit
def load_forward(Q, K, V, b, h, hk, m, end, q_tiles, ring, q_full, full, free):
    GROUPS: gl.constexpr = q_tiles.shape[0]
    mbarrier.expect(q_full.index(0), GROUPS * Q.block_type.nbytes)
    for group in gl.static_range(GROUPS):
        tma_load(Q, [b, h, m + group * Q.block_shape[2], 0], q_full.index(0), q_tiles.index(group))
    stream(K, V, b, hk, 1, 0, end, ring, full, free)


@gluon.jit
def attend(group: gl.constexpr, ALIBI: gl.constexpr, CAUSAL: gl.constexpr, HIDE: gl.constexpr, rest):
    O, b, h, m, Tq, offset, end, whole, k_len, scale, bias, slope, q_tiles, ring, q_full, full, free = rest
    BM: gl.constexpr = q_tiles.shape[3]
    BN: gl.constexpr = ring.shape[3]
    D: gl.constexpr = ring.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    row = m + group * BM
    slope = slope if ALIBI else None
    i = (row + offset + gl.arange(0, BM, gl.SliceLayout(1, SCORES)))[:, None]
    j = gl.arange(0, BN, gl.SliceLayout(0, SCORES))[None, :]
    tiles = tl.cdiv(end, BN)
    if CAUSAL:  # the keys that this group sees
        whole, end = key_range(row + offset, k_len, BM, BN, CAUSAL, HIDE)
        end = tl.maximum(end, 1)
    seen = tl.where(row < Tq, tl.cdiv(end, BN), 1)  # a group beyond the last query has nothing to do
    o, zeros = gl.zeros([BM, D], gl.float32, OUT), gl.zeros([BM, BN], gl.float32, SCORES)
    wait(q_full, 0)
    q = tile(q_tiles, group)
    wait(full, 0)
    s = warpgroup_mma(q, tile(ring, 0).permute([1, 0]), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(free.index(0))
    p, z = weights(s, i, j, k_len, scale, bias, slope, CAUSAL, whole < BN if HIDE else False, False, False)
    p = gl.convert_layout(narrow(p, O.dtype), LEFT)
    wait(full, 1)
    for t in range(1, seen):
        wait(full, 2 * t)
        s = warpgroup_mma(q, tile(ring, 2 * t).permute([1, 0]), zeros, use_acc=False, is_async=True)
        o = warpgroup_mma(p, tile(ring, 2 * t - 1), o, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(free.index(2 * t % ring.shape[0]))
        masked = (t + 1) * BN > whole if HIDE else False
        w, z = weights(s, i, t * BN + j, k_len, scale, bias, slope, CAUSAL, masked, False, False)
        wait(full, 2 * t + 1)  # before the next wait, so that the compiler keeps the weights before it, too
        o = warpgroup_mma_wait(0, deps=[o])
        mbarrier.arrive(free.index((2 * t - 1) % ring.shape[0]))
        p = gl.convert_layout(narrow(w, O.dtype), LEFT)  # only now, into the registers that the last p has left
    o = warpgroup_mma(p, tile(ring, 2 * seen - 1), o, is_async=True)
    o = warpgroup_mma_wait(0, deps=[o])
    for u in range(2 * seen - 1, 2 * tiles):  # the others are for other groups
        wait(full, u)
        mbarrier.arrive(free.index(u % ring.shape[0]))
    q.store(o.to(O.dtype))
    fence_async_shared()
    tma_store(O, [b, h, row, 0], q_tiles.index(group))
    tma.store_wait(0)


@gluon.jit
def forward_kernel(Q, K, V, O, Bias, Slopes, Lens, bias, scale, H, Tq, Tk, G: gl.constexpr, CAUSAL: gl.constexpr):
    """O = P V for 192 queries, or 256 where D <= 64: as many groups as there are registers for."""
    BM: gl.constexpr = Q.block_shape[2]
    BN: gl.constexpr = K.block_shape[2]
    D: gl.constexpr = Q.block_shape[3]
    ALIBI: gl.constexpr = Slopes is not None
    HIDE: gl.constexpr = CAUSAL or Lens is not None
    GROUPS: gl.constexpr = 3 if D > 64 else 4
    m, h, b = place(GROUPS * BM, Tq, H, True)
    bias, slope = entry(Bias, h, bias), entry(Slopes, h, 0.0)
    k_len = tl.minimum(entry(Lens, b, Tk), Tk)
    whole, end = key_range(m + Tk - Tq, k_len, GROUPS * BM, BN, CAUSAL, HIDE)
    end = tl.maximum(end, 1)  # one tile, for rows that see no key
    q_tiles = gl.allocate_shared_memory(Q.dtype, [GROUPS, 1, 1, BM, D], Q.layout)
    ring = gl.allocate_shared_memory(K.dtype, [2 * GROUPS, 1, 1, BN, D], K.layout)
    q_full, full, free = barriers(1, 1), barriers(2 * GROUPS, 1), barriers(2 * GROUPS, GROUPS)
    fence_async_shared()
    rest = (O, b, h, m, Tq, Tk - Tq, end, whole, k_len, scale, bias, slope, q_tiles, ring, q_full, full, free)
    loads = Q, K, V, b, h, h // G, m, end, q_tiles, ring, q_full, full, free
    if GROUPS == 3:
        gl.warp_specialize([(attend, (0, ALIBI, CAUSAL, HIDE, rest)), (attend, (1, ALIBI, CAUSAL, HIDE, rest)),
                            (attend, (2, ALIBI, CAUSAL, HIDE, rest)), (load_forward, loads)], [4, 4, 1], [160, 160, 24])
    else:
        gl.warp_specialize([(attend, (0, ALIBI, CAUSAL, HIDE, rest)), (attend, (1, ALIBI, CAUSAL, HIDE, rest)),
                            (attend, (2, ALIBI, CAUSAL, HIDE, rest)), (attend, (3, ALIBI, CAUSAL, HIDE, rest)),
                            (load_forward, loads)], [4, 4, 4, 1], [112, 112, 112, 24])


# -------- Backward. Scores stand as (keys, queries). Each group stores its part of dS, in one of two places in turn,
# and from both parts forms half of dQ's columns: ready says that both are stored, spent that both halves are formed.

@gluon.jit
def load_backward(Q, K, V, DO, b, hk, n, first, end, G: gl.constexpr, kv, ring, kv_full, full, free):
    BN: gl.constexpr = K.block_shape[2]
    mbarrier.expect(kv_full.index(0), 4 * K.block_type.nbytes)
    for group in gl.static_range(2):
        tma_load(K, [b, hk, n + group * BN, 0], kv_full.index(0), kv.index(group))
        tma_load(V, [b, hk, n + group * BN, 0], kv_full.index(0), kv.index(2 + group))
    stream(Q, DO, b, hk * G, G, first, end, ring, full, free)


@gluon.jit
def differentiate(group: gl.constexpr, ALIBI: gl.constexpr, CAUSAL: gl.constexpr, HIDE: gl.constexpr,
                  G: gl.constexpr, rest):
    (DQ, DK, DV, Slopes, b, hk, n, first, whole, end, offset, k_len, scale, bias, kv, ring, ds_tiles, dq_tiles,
     kv_full, full, free, ready, spent) = rest
    BN: gl.constexpr = kv.shape[3]
    BM: gl.constexpr = ring.shape[3]
    D: gl.constexpr = ring.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    row = n + group * BN
    column: gl.constexpr = group * (D // 2)
    j = (row + gl.arange(0, BN, gl.SliceLayout(1, SCORES)))[:, None]
    i = offset + gl.arange(0, BM, gl.SliceLayout(0, SCORES))[None, :]
    zeros, half_zeros = gl.zeros([BN, BM], gl.float32, SCORES), gl.zeros([BM, D // 2], gl.float32, HALF)
    dk, dv = gl.zeros([BN, D], gl.float32, OUT), gl.zeros([BN, D], gl.float32, OUT)
    wait(kv_full, 0)
    k, v = tile(kv, group), tile(kv, 2 + group)
    t = 0
    for head in range(G):
        h = hk * G + head
        slope = entry(Slopes, h, 0.0) if ALIBI else None
        for m in range(first, end, BM):
            q, do = tile(ring, 2 * t), tile(ring, 2 * t + 1)
            wait(full, 2 * t)
            s = warpgroup_mma(k, q.permute([1, 0]), zeros, use_acc=False, is_async=True)
            wait(full, 2 * t + 1)
            dp = warpgroup_mma(v, do.permute([1, 0]), zeros, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            masked = m < whole if HIDE else False
            p, z = weights(s, m + i, j, k_len, scale, bias, slope, CAUSAL, masked, True, False)
            slope_of_p = p * (p * z)
            p = gl.convert_layout(p.to(DV.dtype), LEFT)
            wait(spent, t + 2)  # until the place of dS is free
            dp = warpgroup_mma_wait(0, deps=[dp])
            ds = (slope_of_p * dp).to(DK.dtype)
            tile(ds_tiles, 2 * t + group).store(ds)
            fence_async_shared()
            mbarrier.arrive(ready.index(t % 2))
            dv = warpgroup_mma(p, do, dv, is_async=True)
            wait(ready, t)
            dq = half_zeros
            for part in gl.static_range(2):
                dq = warpgroup_mma(tile(ds_tiles, 2 * t + part).permute([1, 0]),
                                   tile(kv, part).slice(column, D // 2, 1), dq, use_acc=part == 1, is_async=True)
            dk = warpgroup_mma(gl.convert_layout(ds, LEFT), q, dk, is_async=True)
            dq = warpgroup_mma_wait(1, deps=[dq])
            mbarrier.arrive(spent.index(t % 2))
            tma.store_wait(0)  # dQ leaves while the tensor cores form dK
            tile(dq_tiles, group).store(dq * scale)
            fence_async_shared()
            tma_add(DQ, [b, h, m, column], dq_tiles.index(group))
            dk = warpgroup_mma_wait(0, deps=[dk])
            dv = warpgroup_mma_wait(0, deps=[dv])
            for part in gl.static_range(2):
                mbarrier.arrive(free.index((2 * t + part) % ring.shape[0]))
            t += 1
    wait(spent, t + 3)  # of the last tile: neither group needs k any more
    k.store((dk * scale).to(DK.dtype))
    v.store(dv.to(DV.dtype))
    fence_async_shared()
    tma_store(DK, [b, hk, row, 0], kv.index(group))
    tma_store(DV, [b, hk, row, 0], kv.index(2 + group))
    tma.store_wait(0)


@gluon.jit
def backward_kernel(Q, K, V, DO, DQ, DK, DV, Bias, Slopes, Lens, bias, scale, H, Tq, Tk,
                    G: gl.constexpr, CAUSAL: gl.constexpr):
    """dK and dV of 128 keys, and what these add to dQ."""
    BM: gl.constexpr = Q.block_shape[2]
    BN: gl.constexpr = K.block_shape[2]
    D: gl.constexpr = Q.block_shape[3]
    ALIBI: gl.constexpr = Slopes is not None
    HIDE: gl.constexpr = CAUSAL or Lens is not None
    n, hk, b = place(2 * BN, Tk, H // G, False)
    k_len = tl.minimum(entry(Lens, b, Tk), Tk)
    first, end = 0, tl.where(n < k_len, Tq, 0)
    whole = tl.where(n + 2 * BN > k_len, end, 0)  # rows [first, whole) need a mask, the rest does not
    if CAUSAL:
        first = tl.minimum(tl.maximum(n + Tq - Tk, 0) // BM * BM, end)
        whole = tl.maximum(tl.minimum(n + Tq - Tk + 2 * BN - 1, end), whole)
    kv = gl.allocate_shared_memory(K.dtype, [4, 1, 1, BN, D], K.layout)  # k, k, v, v
    ring = gl.allocate_shared_memory(Q.dtype, [4, 1, 1, BM, D], Q.layout)
    ds_tiles = gl.allocate_shared_memory(Q.dtype, [4, 1, 1, BN, BM], Q.layout)
    dq_tiles = gl.allocate_shared_memory(gl.float32, [2, 1, 1, BM, D // 2], DQ.layout)
    kv_full, full, free, ready, spent = barriers(1, 1), barriers(4, 1), barriers(4, 2), barriers(2, 2), barriers(2, 2)
    fence_async_shared()
    rest = (DQ, DK, DV, Slopes, b, hk, n, first, whole, end, Tk - Tq, k_len, scale, bias, kv, ring, ds_tiles, dq_tiles,
            kv_full, full, free, ready, spent)
    loads = Q, K, V, DO, b, hk, n, first, end, G, kv, ring, kv_full, full, free
    gl.warp_specialize([(differentiate, (0, ALIBI, CAUSAL, HIDE, G, rest)),
                        (differentiate, (1, ALIBI, CAUSAL, HIDE, G, rest)), (load_backward, loads)], [4, 1], [240, 24])


# -------- Launches

def descriptor(base, **fields):
    return TensorDescriptor(base, layout=gl.NVMMASharedLayout(128, 8 * base.element_size(), rank=4), **fields)


def forward(q, k, v, o, rest):
    B, H, Tq, D = q.shape
    programs = B * H * math.ceil(Tq / (192 if D > 64 else 256))
    launch(forward_kernel, programs, ((q, 64), (k, 64), (v, 64), (o, 64)), rest, descriptor, num_warps=4)


def backward(do, q, k, v, dq, dk, dv, rest):
    B, Hk, Tk, D = k.shape
    sums = torch.zeros_like(q, dtype=torch.float32)
    BM, half = (64, 64) if D > 64 else (128, 32)
    tensors = (q, BM), (k, 64), (v, 64), (do, BM), (sums, BM, half), (dk, 64), (dv, 64)
    launch(backward_kernel, B * Hk * math.ceil(Tk / 128), tensors, rest, descriptor, num_warps=4)
    dq.copy_(sums)
