"""
The Hopper tier of flashsigmoid.py: faster kernels for 16-bit heads of 65 to 128 channels, in Gluon, Triton's lower level.
"""
import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashsigmoid import entry, key_range, launch, narrow, place, tiled, tl, weights

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name before Triton 3.7
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


# -------- Hopper: the forward pass for D = 128 in Gluon, Triton's lower level. One warp loads the tiles of k and v into
# a ring of four; two groups of four warps own 64 queries each. While the tensor cores multiply the weights of a tile by
# its values, a group turns the scores of the next into weights.

@gluon.jit
def tile(ring, u):
    """What lies in the place of tile u; tiles are k, v, k, v, ..."""
    x = ring.index(u % ring.shape[0])
    return x.reshape([x.shape[2], x.shape[3]])


@gluon.jit
def wait(bars, u):
    """Until tile u has been loaded (full) or its place left by the tile before (free)."""
    mbarrier.wait(bars.index(u % bars.shape[0]), u // bars.shape[0] % 2)


@gluon.jit
def load_tiles(Q, K, V, b, h, hk, m, tiles, q_tiles, ring, q_full, full, free):
    R: gl.constexpr = ring.shape[0]
    mbarrier.expect(q_full, 2 * Q.block_type.nbytes)
    for group in gl.static_range(2):
        tma_load(Q, [b, h, m + group * Q.block_shape[2], 0], q_full, q_tiles.index(group))
    for t in range(tiles):
        for is_v in gl.static_range(2):
            u = 2 * t + is_v
            wait(free, u + R)
            mbarrier.expect(full.index(u % R), K.block_type.nbytes)
            tma_load(V if is_v else K, [b, hk, t * K.block_shape[2], 0], full.index(u % R), ring.index(u % R))


@gluon.jit
def attend(group: gl.constexpr, ALIBI: gl.constexpr, CAUSAL: gl.constexpr, HIDE: gl.constexpr, rest):
    O, b, h, m, offset, tiles, whole, k_len, scale, bias, slope, q_tiles, ring, q_full, full, free = rest
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
    o, zeros = gl.zeros([BM, D], gl.float32, OUT), gl.zeros([BM, BN], gl.float32, SCORES)
    mbarrier.wait(q_full, 0)
    q = tile(q_tiles, group)
    wait(full, 0)
    s = warpgroup_mma(q, tile(ring, 0).permute([1, 0]), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(free.index(0))
    p, z = weights(s, i, j, k_len, scale, bias, slope, CAUSAL, whole < BN if HIDE else False, False, False)
    p = gl.convert_layout(narrow(p, O.dtype), LEFT)
    wait(full, 1)
    for t in range(1, tiles):
        wait(full, 2 * t)
        s = warpgroup_mma(q, tile(ring, 2 * t).permute([1, 0]), zeros, use_acc=False, is_async=True)
        o = warpgroup_mma(p, tile(ring, 2 * t - 1), o, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(free.index(2 * t % ring.shape[0]))
        masked = (t + 1) * BN > whole if HIDE else False
        p_next, z = weights(s, i, t * BN + j, k_len, scale, bias, slope, CAUSAL, masked, False, False)
        p_next = gl.convert_layout(narrow(p_next, O.dtype), LEFT)
        wait(full, 2 * t + 1)  # before the next wait, so that the compiler keeps the weights before it, too
        o = warpgroup_mma_wait(0, deps=[o])
        mbarrier.arrive(free.index((2 * t - 1) % ring.shape[0]))
        p = p_next
    o = warpgroup_mma(p, tile(ring, 2 * tiles - 1), o, is_async=True)
    o = warpgroup_mma_wait(0, deps=[o])
    q.store(o.to(O.dtype))
    fence_async_shared()
    tma_store(O, [b, h, row, 0], q_tiles.index(group))
    tma.store_wait(0)


@gluon.jit
def hopper_kernel(Q, K, V, O, Bias, Slopes, Lens, bias, scale, H, Tq, Tk, G: gl.constexpr, CAUSAL: gl.constexpr):
    """O = P V for 128 queries."""
    BM: gl.constexpr = Q.block_shape[2]
    BN: gl.constexpr = K.block_shape[2]
    D: gl.constexpr = Q.block_shape[3]
    R: gl.constexpr = 4
    ALIBI: gl.constexpr = Slopes is not None
    HIDE: gl.constexpr = CAUSAL or Lens is not None
    m, h, b = place(2 * BM, Tq, H, True)
    bias, slope = entry(Bias, h, bias), entry(Slopes, h, 0.0)
    k_len = tl.minimum(entry(Lens, b, Tk), Tk)
    whole, end = key_range(m + Tk - Tq, k_len, 2 * BM, BN, CAUSAL, HIDE)
    tiles = tl.maximum(tl.cdiv(end, BN), 1)
    q_tiles = gl.allocate_shared_memory(Q.dtype, [2, 1, 1, BM, D], Q.layout)
    ring = gl.allocate_shared_memory(K.dtype, [R, 1, 1, BN, D], K.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [R, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [R, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for u in gl.static_range(R):
        mbarrier.init(full.index(u), count=1)
        mbarrier.init(free.index(u), count=2)
    fence_async_shared()
    rest = (O, b, h, m, Tk - Tq, tiles, whole, k_len, scale, bias, slope, q_tiles, ring, q_full, full, free)
    gl.warp_specialize([(attend, (0, ALIBI, CAUSAL, HIDE, rest)), (attend, (1, ALIBI, CAUSAL, HIDE, rest)),
                        (load_tiles, (Q, K, V, b, h, h // G, m, tiles, q_tiles, ring, q_full, full, free))],
                       [4, 1], [240, 24])


def descriptor(base, **fields):
    return TensorDescriptor(base, layout=gl.NVMMASharedLayout(128, 8 * base.element_size(), rank=4), **fields)


def forward(q, k, v, o, rest):
    B, H, Tq, D = q.shape
    tensors = [tiled(x, rows) for x, rows in ((q, 64), (k, 128), (v, 128), (o, 64))]
    launch(hopper_kernel, B * H * math.ceil(Tq / 128), tensors, rest, descriptor, num_warps=4)
