"""
FlashSigmoid: fused sigmoid attention, forward and backward, in three Triton kernels (arXiv 2409.04431).

    S = scale * Q K^T + b - slope * |i - j|        P = sigmoid(S)  (0 where masked)        O = P V
    dV = P^T dO       dP = dO V^T       dS = P (1 - P) dP       dQ = scale * dS K       dK = scale * dS^T Q       db = sum dS

Softmax divides each row by a sum over all keys; the sigmoid does not. So there is no running maximum, no rescaling and no
log-sum-exp, nothing is saved for the backward pass but q, k and v, and the outputs of disjoint sets of keys just add up.
b = -log(n) keeps a row's mass near that of softmax: sigmoid(u - log n) = e^u / (e^u + n).

One property removes most masks: tiles that stick out of the tensors are filled with zeros, and a key of zeros has weight
sigmoid(b) on a value of zeros. It adds nothing to O, and nothing to any gradient. Only what the caller hides needs a mask.

`python flashsigmoid.py` checks the kernels against float64 and, on CUDA, times them against PyTorch's attention.
"""
import argparse
import json
import math
from contextlib import nullcontext
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
    KERNEL_DEVICES = ("cuda", "cpu") if triton.knobs.runtime.interpret else ("cuda",)  # TRITON_INTERPRET=1: CPU, too
except ImportError:  # no Triton on this platform (macOS): everything runs on the PyTorch reference
    class triton: jit = staticmethod(lambda f: f)
    class tl: constexpr = int
    KERNEL_DEVICES = ()


def sigmoid_attention_reference(q, k, v, bias=None, is_causal=False, scale=None, alibi_slopes=None, k_lens=None):
    """The same function as `sigmoid_attention` in plain PyTorch, O(Tq Tk) memory, on any device; differentiable twice.

    fp16 and bf16 inputs are computed in fp32. This is the oracle of the tests (in float64) and the path without a GPU.
    """
    (H, Tq, D), (Hk, Tk) = q.shape[1:], k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_, k_, v_ = q.to(dtype), k.to(dtype).repeat_interleave(H // Hk, 1), v.to(dtype).repeat_interleave(H // Hk, 1)
    bias = torch.as_tensor(-math.log(Tk) if bias is None else bias, dtype=dtype, device=q.device)
    s = q_ @ k_.mT * (D ** -0.5 if scale is None else scale) + bias.view(-1, 1, 1)      # (B, H, Tq, Tk)
    j = torch.arange(Tk, device=q.device)
    distance = torch.arange(Tk - Tq, Tk, device=q.device)[:, None] - j                  # (Tq, Tk) query - key position
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(dtype).view(-1, 1, 1) * distance.abs()
    if is_causal:
        s = s.masked_fill(distance < 0, -math.inf)
    if k_lens is not None:
        s = s.masked_fill(j >= k_lens.view(-1, 1, 1, 1), -math.inf)
    return (torch.sigmoid(s) @ v_).to(q.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. Tensor descriptors are upper case, tiles lower case. A program owns BM queries or BN keys of one head of one
# sequence: m is its first query row, n its first key row. i and j are positions on the key axis, where query row r stands
# at i = r + Tk - Tq: the last query sees the last key.

@triton.jit
def load(X, b, h, row):
    """The tile (rows, D) of sequence b and head h that begins at `row`; zeros beyond the edge of the tensor."""
    return X.load([b, h, row, 0]).reshape(X.block_shape[2], X.block_shape[3])


@triton.jit
def store(X, b, h, row, x):
    X.store([b, h, row, 0], x.to(X.dtype).reshape(1, 1, X.block_shape[2], X.block_shape[3]))


@triton.jit
def dot(a, b, acc=None):
    return tl.dot(a, b, acc, input_precision="ieee")  # fp32 stays fp32, not tf32; no effect on 16-bit tiles


@triton.jit
def head_bias(bias, Bias, Slopes, h):
    """(b, slope) of head h: the (H,) tensor Bias, where there is one, replaces the number; no Slopes, no slope."""
    slope = None
    if Bias is not None:
        bias = tl.load(Bias + h).to(tl.float32)
    if Slopes is not None:
        slope = tl.load(Slopes + h).to(tl.float32)
    return bias, slope


@triton.jit
def key_length(KLens, b, Tk):
    if KLens is not None:
        Tk = tl.minimum(tl.load(KLens + b).to(tl.int32), Tk)
    return Tk


@triton.jit
def key_range(m, k_len, Tq, Tk, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, HIDE: tl.constexpr):
    """Queries m .. m + BM see keys [0, whole) without a mask and keys [whole, end) through one."""
    whole, end = k_len, k_len
    if CAUSAL:
        whole, end = tl.minimum(k_len, m + Tk - Tq + 1), tl.minimum(k_len, m + Tk - Tq + BM)
    if HIDE:
        whole = tl.maximum(whole, 0) // BN * BN
    return whole, end


@triton.jit
def weights(s, i, j, k_len, scale, bias, slope, CAUSAL: tl.constexpr, MASK: tl.constexpr, EXACT: tl.constexpr):
    """P = sigmoid(scale * s + bias - slope * |i - j|) of an fp32 tile s, 0 where masked; i and j broadcast to its shape.

    y = A (1 + exp(-x)) takes one ex2. Its reciprocal takes no second one: subtracting the bits of y from a constant is a
    first guess of 1/y, and a Newton step with tuned A and C leaves a relative error below 1.2e-4 for every logit, where
    tanh.approx (x < -10, as with b = -log 65536) is off by up to 32 %. EXACT, for fp32 inputs, divides.
    """
    A: tl.constexpr = 0.51512199
    C: tl.constexpr = 1.4355202
    LOG2_A: tl.constexpr = -0.95701397
    LOG2_E: tl.constexpr = 1.44269504
    e = s * (-scale * LOG2_E) + (LOG2_A - bias * LOG2_E)
    if slope is not None:
        e += (slope * LOG2_E) * tl.abs(i - j).to(tl.float32)
    if MASK:
        visible = j < k_len
        if CAUSAL:
            visible = visible & (i >= j)
        e = tl.where(visible, e, float("inf"))
    y = A + tl.exp2(e)
    if EXACT:
        return A / y
    r = (0x7EB50000 - y.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return tl.clamp(r * (C - y * r), 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)  # y = inf gives -inf here: P = 0


@triton.jit
def forward_kernel(Q, K, V, O, Bias, Slopes, KLens, bias, scale, H, Tq, Tk, GROUP: tl.constexpr, CAUSAL: tl.constexpr):
    """O = P V for BM queries: one pass over the keys, nothing to rescale."""
    EXACT: tl.constexpr = Q.dtype == tl.float32
    BM: tl.constexpr = Q.block_shape[2]
    BN: tl.constexpr = K.block_shape[2]
    HIDE: tl.constexpr = CAUSAL or KLens is not None
    tiles = tl.cdiv(Tq, BM)
    m = (tiles - 1 - tl.program_id(0) % tiles) * BM  # the longest rows first
    h, b = tl.program_id(0) // tiles % H, tl.program_id(0) // tiles // H
    bias, slope = head_bias(bias, Bias, Slopes, h)
    k_len = key_length(KLens, b, Tk)
    whole, end = key_range(m, k_len, Tq, Tk, BM, BN, CAUSAL, HIDE)
    i = m + Tk - Tq + tl.arange(0, BM)[:, None]
    q = load(Q, b, h, m)
    o = tl.zeros(q.shape, tl.float32)
    for MASK in tl.static_range(1 + HIDE):
        for n in range(whole if MASK else 0, end if MASK else whole, BN):
            k, v = load(K, b, h // GROUP, n), load(V, b, h // GROUP, n)
            j = n + tl.arange(0, BN)[None, :]
            p = weights(dot(q, k.T), i, j, k_len, scale, bias, slope, CAUSAL, MASK, EXACT)
            o = dot(p.to(v.dtype), v, o)
    store(O, b, h, m, o)


@triton.jit
def dq_kernel(Q, K, V, DO, DQ, DB, Bias, Slopes, KLens, bias, scale, H, Tq, Tk, GROUP: tl.constexpr, CAUSAL: tl.constexpr):
    """dQ = scale * dS K for BM queries, and the sum of dS over their rows, for db."""
    EXACT: tl.constexpr = Q.dtype == tl.float32
    BM: tl.constexpr = Q.block_shape[2]
    BN: tl.constexpr = K.block_shape[2]
    HIDE: tl.constexpr = CAUSAL or KLens is not None
    tiles = tl.cdiv(Tq, BM)
    m = (tiles - 1 - tl.program_id(0) % tiles) * BM
    h, b = tl.program_id(0) // tiles % H, tl.program_id(0) // tiles // H
    bias, slope = head_bias(bias, Bias, Slopes, h)
    k_len = key_length(KLens, b, Tk)
    whole, end = key_range(m, k_len, Tq, Tk, BM, BN, CAUSAL, HIDE)
    i = m + Tk - Tq + tl.arange(0, BM)[:, None]
    q, do = load(Q, b, h, m), load(DO, b, h, m)
    dq = tl.zeros(q.shape, tl.float32)
    db = tl.zeros([BM], tl.float32)
    for MASK in tl.static_range(1 + HIDE):
        for n in range(whole if MASK else 0, end if MASK else whole, BN):
            k, v = load(K, b, h // GROUP, n), load(V, b, h // GROUP, n)
            j = n + tl.arange(0, BN)[None, :]
            p = weights(dot(q, k.T), i, j, k_len, scale, bias, slope, CAUSAL, MASK, EXACT)
            ds = p * (1 - p) * dot(do, v.T)
            dq = dot(ds.to(k.dtype), k, dq)
            if DB is not None:
                db += tl.sum(ds, 1)
    store(DQ, b, h, m, dq * scale)
    if DB is not None:
        tl.store(DB + tl.program_id(0), tl.sum(db))


@triton.jit
def dkdv_kernel(Q, K, V, DO, DK, DV, Bias, Slopes, KLens, bias, scale, H, Tq, Tk, GROUP: tl.constexpr, CAUSAL: tl.constexpr):
    """dK = scale * dS^T Q and dV = P^T dO for BN keys, summed over the GROUP query heads that share them."""
    EXACT: tl.constexpr = Q.dtype == tl.float32
    BM: tl.constexpr = Q.block_shape[2]
    BN: tl.constexpr = K.block_shape[2]
    tiles = tl.cdiv(Tk, BN)
    n = tl.program_id(0) % tiles * BN
    hk, b = tl.program_id(0) // tiles % (H // GROUP), tl.program_id(0) // tiles // (H // GROUP)
    k_len = key_length(KLens, b, Tk)
    first, whole = 0, 0  # rows [first, whole) see these keys through the causal mask, rows [whole, last) without one
    last = tl.where(n < k_len, Tq, 0)
    if CAUSAL:
        first = tl.minimum(tl.maximum(n + Tq - Tk, 0) // BM * BM, last)
        whole = tl.minimum(tl.cdiv(tl.maximum(n + BN - 1 + Tq - Tk, 0), BM) * BM, last)
    j = n + tl.arange(0, BN)[:, None]
    k, v = load(K, b, hk, n), load(V, b, hk, n)
    dk, dv = tl.zeros(k.shape, tl.float32), tl.zeros(v.shape, tl.float32)
    for g in range(GROUP):
        h = hk * GROUP + g
        b_h, slope = head_bias(bias, Bias, Slopes, h)
        for MASK in tl.static_range(1 if CAUSAL else 0, -1, -1):
            for m in range(first if MASK else whole, whole if MASK else last, BM):
                q, do = load(Q, b, h, m), load(DO, b, h, m)
                i = m + Tk - Tq + tl.arange(0, BM)[None, :]
                pT = weights(dot(k, q.T), i, j, k_len, scale, b_h, slope, CAUSAL, MASK, EXACT)
                dv = dot(pT.to(do.dtype), do, dv)
                dsT = pT * (1 - pT) * dot(v, do.T)
                dk = dot(dsT.to(q.dtype), q, dk)
    if KLens is not None:  # the tile that k_len cuts
        dk, dv = tl.where(j < k_len, dk, 0.0), tl.where(j < k_len, dv, 0.0)
    store(DK, b, hk, n, dk * scale)
    store(DV, b, hk, n, dv)


# ---------------------------------------------------------------------------------------------------------------------
# Operators: torch.compile sees them as one node each, and autograd as a function that saves its inputs alone.

TILES = {  # pass: {bytes of a row, D padded to a power of two: (queries, keys, warps, pipeline stages)}
    "forward": {128: (128, 64, 4, 3), 256: (128, 64, 4, 2), 512: (64, 32, 4, 2), 1024: (32, 32, 4, 1)},
    "dq": {128: (128, 64, 4, 2), 256: (128, 64, 8, 2), 512: (64, 32, 4, 2), 1024: (32, 32, 4, 1)},
    "dkdv": {128: (64, 64, 4, 2), 256: (64, 64, 4, 2), 512: (32, 64, 4, 1), 1024: (32, 32, 4, 1)},
}


def tile_shape(name, x):
    """(queries, keys, launch options) of the pass for tensors like x."""
    BM, BN, warps, stages = TILES[name][max(128, triton.next_power_of_2(x.shape[3]) * x.element_size())]
    return BM, BN, dict(num_warps=warps, num_stages=stages)


def tiled(x, rows):
    """Descriptor of x (B, H, T, D) in tiles of `rows` rows; D is padded with zeros to a power of two.

    The hardware addresses 16-byte units: a base or a stride that is no multiple of it costs one copy of x.
    """
    if x.data_ptr() % 16 or x.stride(3) != 1 or any(s * x.element_size() % 16 for s in x.stride()[:3]):
        x = x.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, max(16, triton.next_power_of_2(x.shape[3]))])


def forward_op(q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor], slopes: Optional[Tensor],
               k_lens: Optional[Tensor], b: float, scale: float, is_causal: bool) -> Tensor:
    """O (B, H, Tq, D). The number b is the bias where the tensor bias (H,) is None."""
    (B, H, Tq, D), (Hk, Tk) = q.shape, k.shape[1:3]
    BM, BN, options = tile_shape("forward", q)
    o = torch.empty_like(q)
    with torch.cuda.device_of(q):
        forward_kernel[(triton.cdiv(Tq, BM) * H * B,)](
            tiled(q, BM), tiled(k, BN), tiled(v, BN), tiled(o, BM), bias, slopes, k_lens, b, scale, H, Tq, Tk, H // Hk,
            is_causal, **options)
    return o


def backward_op(do: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor], slopes: Optional[Tensor],
                k_lens: Optional[Tensor], b: float, scale: float, is_causal: bool) -> list[Tensor]:
    """[dQ, dK, dV] and, where bias is a tensor, db (H,). Two kernels without atomics: the same bits every time."""
    (B, H, Tq, D), (Hk, Tk) = q.shape, k.shape[1:3]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    with torch.cuda.device_of(q):
        BM, BN, options = tile_shape("dkdv", q)
        dkdv_kernel[(triton.cdiv(Tk, BN) * Hk * B,)](
            tiled(q, BM), tiled(k, BN), tiled(v, BN), tiled(do, BM), tiled(dk, BN), tiled(dv, BN), bias, slopes, k_lens, b,
            scale, H, Tq, Tk, H // Hk, is_causal, **options)
        BM, BN, options = tile_shape("dq", q)
        tiles = triton.cdiv(Tq, BM)
        db = None if bias is None else q.new_empty(B, H, tiles, dtype=torch.float32)  # one number a program
        dq_kernel[(tiles * H * B,)](
            tiled(q, BM), tiled(k, BN), tiled(v, BN), tiled(do, BM), tiled(dq, BM), db, bias, slopes, k_lens, b, scale, H,
            Tq, Tk, H // Hk, is_causal, **options)
    return [dq, dk, dv] if bias is None else [dq, dk, dv, db.sum((0, 2)).to(bias.dtype)]


def fake_backward(do, q, k, v, bias, *_):
    return [torch.empty_like(x) for x in (q, k, v, bias) if x is not None]


def save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.numbers = inputs[6:]


def differentiate(ctx, do):
    dq, dk, dv, *db = backward_op(do, *ctx.saved_tensors, *ctx.numbers)
    return dq, dk, dv, db[0] if db else None, None, None, None, None, None


def refuse(ctx, *_):
    raise RuntimeError("sigmoid_attention: second derivatives are not implemented in the kernels; "
                       "use sigmoid_attention_reference")


forward_op = torch.library.custom_op("flashsigmoid::forward", forward_op, mutates_args=())
backward_op = torch.library.custom_op("flashsigmoid::backward", backward_op, mutates_args=())
forward_op.register_fake(lambda q, *_: torch.empty_like(q))
backward_op.register_fake(fake_backward)
forward_op.register_autograd(differentiate, setup_context=save_inputs)
backward_op.register_autograd(refuse)


def require(ok, name, given, allowed, error=ValueError):
    if not ok:
        raise error(f"sigmoid_attention: {name} is {given}, allowed: {allowed}")


def sigmoid_attention(q, k, v, bias=None, is_causal=False, scale=None, alibi_slopes=None, k_lens=None):
    """O = sigmoid(scale * q k^T + bias - slope * |i - j|) v, the drop-in for F.scaled_dot_product_attention.

    Fused kernels on CUDA, `sigmoid_attention_reference` elsewhere. Deterministic; once differentiable in q, k, v and bias.

    q             (B, H, Tq, D), fp16, bf16 or fp32, any strides with a contiguous last dimension, 16 <= D <= 256
    k, v          (B, Hk, Tk, D), like q; H is a multiple of Hk (grouped queries)
    bias          a number or a tensor (H,), which may require a gradient; None means -log(Tk), paper section 2
    is_causal     query i sees the keys j <= i + Tk - Tq (aligned to the last key); a query that sees none returns 0
    scale         None means 1 / sqrt(D)
    alibi_slopes  (H,): subtracts slope * |i + Tk - Tq - j|, exactly
    k_lens        (B,) integers: hides the keys j >= k_lens of each sequence; their tiles cost nothing
    returns       (B, H, Tq, D) in q's dtype and order of strides

    Where D, a base address or a stride is no multiple of 16 bytes, the tensor is copied once. Raises ValueError or
    TypeError naming the argument.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        require(isinstance(x, Tensor), name, type(x).__name__, "a tensor", TypeError)
        require(x.dim() == 4 and x.numel() > 0, f"{name}.shape", x.shape, "(B, H, T, D), none of them 0")
        require(x.dtype in (torch.float16, torch.bfloat16, torch.float32), f"{name}.dtype", x.dtype,
                "float16, bfloat16, float32 (for float64 call sigmoid_attention_reference)", TypeError)
        require(x.dtype == q.dtype, f"{name}.dtype", x.dtype, f"that of q, {q.dtype}", TypeError)
        require(x.device == q.device, f"{name}.device", x.device, f"that of q, {q.device}")
        require(x.stride(3) == 1, f"{name}.stride(-1)", x.stride(3), "1: the last dimension is contiguous")
    (B, H, Tq, D), (Hk, Tk) = q.shape, k.shape[1:3]
    require(16 <= D <= 256, "D", D, "16 to 256")
    require(k.shape == (B, Hk, Tk, D), "k.shape", k.shape, f"(B, Hk, Tk, D) with B = {B} and D = {D} of q")
    require(v.shape == k.shape, "v.shape", v.shape, f"that of k, {tuple(k.shape)}")
    require(H % Hk == 0, "the number of heads of k", Hk, f"a divisor of that of q, {H}")
    for name, x, size in (("bias", bias, H), ("alibi_slopes", alibi_slopes, H), ("k_lens", k_lens, B)):
        if isinstance(x, Tensor):
            require(x.shape == (size,), f"{name}.shape", x.shape, f"({size},)")
            require(x.device == q.device, f"{name}.device", x.device, f"that of q, {q.device}")
            require(x.is_floating_point() != (name == "k_lens"), f"{name}.dtype", x.dtype,
                    "int32 or int64" if name == "k_lens" else "a float", TypeError)
        else:
            number = name == "bias" and isinstance(x, (int, float))
            require(x is None or number, name, type(x).__name__, f"None, a tensor ({size},)", TypeError)
            require(not number or math.isfinite(x), name, x, "a finite number")
    require(alibi_slopes is None or not alibi_slopes.requires_grad, "alibi_slopes.requires_grad", True, "False")
    scale = D ** -0.5 if scale is None else scale
    require(math.isfinite(scale), "scale", scale, "a finite number")
    if q.device.type not in KERNEL_DEVICES:
        return sigmoid_attention_reference(q, k, v, bias, is_causal, scale, alibi_slopes, k_lens)
    b = 0.0 if isinstance(bias, Tensor) else -math.log(Tk) if bias is None else float(bias)
    bias = bias.contiguous() if isinstance(bias, Tensor) else None
    pad = -D % (16 // q.element_size())
    if pad:
        q, k, v = (F.pad(x, (0, pad)) for x in (q, k, v))
    return forward_op(q, k, v, bias, alibi_slopes, k_lens, b, float(scale), bool(is_causal))[..., :D]
