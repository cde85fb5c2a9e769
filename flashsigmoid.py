"""
FlashSigmoid: fused sigmoid attention (arXiv 2409.04431), forward and backward, in Triton.

    S = scale * Q K^T + b - slope * |i - j|        P = sigmoid(S)  (0 where masked)        O = P V
    dV = P^T dO      dP = dO V^T      dS = P (1 - P) dP      dQ = scale * dS K      dK = scale * dS^T Q      db = sum dS

Softmax divides a row by a sum over all its keys; the sigmoid does not. So there is no running maximum, no rescaling and
no log-sum-exp, the backward pass needs nothing but q, k and v, and the outputs of disjoint sets of keys add up.
b = -log(n) keeps the mass of a row near that of softmax: sigmoid(u - log n) = e^u / (e^u + n).

Tiles that stick out of a tensor are filled with zeros. A key of zeros has weight sigmoid(b), on a value of zeros: it
adds nothing to O and nothing to any gradient. So ragged lengths need no mask; only what the caller hides does.

Two kernels do everything on any GPU; flashsigmoid_hopper.py, if there, is faster on Hopper.
`python flashsigmoid.py` compares with float64 and, on CUDA, with the time of PyTorch's attention.
"""
import argparse
import contextlib
import functools
import json
import math
import sys
from itertools import product
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
    COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)
    KERNEL_DEVICES = ("cuda",) if COMPILED else ("cuda", "cpu")  # cpu with TRITON_INTERPRET=1
except ImportError:  # no Triton for this platform: everything runs on the PyTorch reference
    triton = SimpleNamespace(jit=lambda kernel: kernel)
    tl = SimpleNamespace(constexpr=int)
    KERNEL_DEVICES = ()


def sigmoid_attention_reference(q, k, v, bias=None, is_causal=False, scale=None, alibi_slopes=None, k_lens=None):
    """`sigmoid_attention` in plain PyTorch, in fp32 or float64: any device, every derivative, but O(Tq Tk) memory."""
    (H, Tq, D), (Hk, Tk) = q.shape[1:], k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    k_, v_ = (x.to(dtype)[:, :, None].expand(-1, -1, H // Hk, -1, -1).flatten(1, 2) for x in (k, v))  # (B, H, Tk, D)
    s = q.to(dtype) @ k_.mT * (D ** -0.5 if scale is None else scale)                       # (B, H, Tq, Tk)
    s = s + torch.as_tensor(-math.log(Tk) if bias is None else bias, dtype=dtype, device=q.device).view(-1, 1, 1)
    j = torch.arange(Tk, device=q.device)
    distance = torch.arange(Tk - Tq, Tk, device=q.device)[:, None] - j                      # (Tq, Tk), i - j
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(dtype).view(-1, 1, 1) * distance.abs()
    if is_causal:
        s = s.masked_fill(distance < 0, -math.inf)
    if k_lens is not None:
        s = s.masked_fill(j >= k_lens.view(-1, 1, 1, 1), -math.inf)
    return (torch.sigmoid(s) @ v_).to(q.dtype)


# -------- Kernels. Tensor descriptors are upper case, tiles lower case. A program owns BM queries, from row m on, or BN
# keys, from row n on. i and j are positions on the key axis: query row r stands at r + Tk - Tq, the last with the last.

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
def entry(X, index, otherwise):
    """X[index], or the number `otherwise` where there is no tensor X."""
    return otherwise if X is None else tl.load(X + index)


@triton.jit
def place(rows: tl.constexpr, T, heads, LAST_FIRST: tl.constexpr):
    """(first row, head, sequence) of this program's tile. Programs take eight heads at a time, which stay in the cache,
    and of these the last or the first tiles first: when causal, long tiles, so that short ones fill the end."""
    tiles = tl.cdiv(T, rows)
    group, rest = tl.program_id(0) // (8 * tiles), tl.program_id(0) % (8 * tiles)
    heads_here = tl.minimum(8, tl.num_programs(0) // tiles - 8 * group)
    tile, bh = rest // heads_here, 8 * group + rest % heads_here
    return (tiles - 1 - tile if LAST_FIRST else tile) * rows, bh % heads, bh // heads


@triton.jit
def key_range(i, k_len, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, HIDE: tl.constexpr):
    """BM queries from position i on see the keys [0, whole) without a mask and [whole, end) through one."""
    whole, end = k_len, k_len
    if CAUSAL:
        whole, end = tl.minimum(k_len, i + 1), tl.minimum(k_len, i + BM)
    if HIDE:
        whole = tl.maximum(whole, 0) // BN * BN
    return whole, end


@triton.jit
def weights(s, i, j, k_len, scale, bias, slope, CAUSAL: tl.constexpr, MASK, GRAD: tl.constexpr, EXACT: tl.constexpr):
    """P = sigmoid(x) and z = exp(-x) of x = scale * s + bias - slope * |i - j|; s is an fp32 tile, P = 0 where masked.

    z takes one ex2. To spare its unit, 1 / y of y = A (1 + z) is made of y's bits: a constant minus these is a first
    guess r, and a Newton step with tuned A and C leaves a relative error of P below 1.2e-4 for every logit. EXACT, for
    fp32 inputs, divides. GRAD needs 1 - P = P z, which does not cancel, and stops z where r and so P is 0. Otherwise y
    and r are scaled so that r > 0 up to y = inf, where P is -inf, which `narrow` makes 0.
    """
    A: tl.constexpr = 0.51512199 if GRAD else 0.51512199 * 64
    C: tl.constexpr = 1.4355202 if GRAD else 1.4355202 * 8
    GUESS: tl.constexpr = 0x7EB50000 if GRAD else -0x7FCB0000  # 3 exponents up, past the sign bit
    LIMIT: tl.constexpr = 2.33527466e38  # where y has the bits 0x7EB50000
    LOG2_E: tl.constexpr = 1.44269504
    e = s * (-scale * LOG2_E) - bias * LOG2_E
    if slope is not None:
        e += (slope * LOG2_E) * tl.abs(i - j).to(tl.float32)
    if MASK:
        e = tl.where(j < (tl.minimum(k_len, i + 1) if CAUSAL else k_len), e, float("inf"))
    z = tl.exp2(e)
    if GRAD or EXACT:
        z = tl.minimum(z, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if EXACT:
        return tl.where(z < LIMIT, 1 / (1 + z), 0 * z), z
    y = A + A * z
    r = (GUESS - y.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    p = r * (C - y * r)
    if COMPILED and not GRAD:  # the unit that makes ex2 has time for a quarter of the reciprocals, too
        direct = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [1 + z], tl.float32, True, 1)
        p = tl.where((j & 24) == 0, direct, p)
    return p, z


@triton.jit
def narrow(p, dtype: tl.constexpr):
    """max(p, 0) rounded to dtype; NaN stays NaN. To 16 bits, that is one instruction for two, which Triton has not."""
    if COMPILED and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("cvt.rn.relu.bf16x2.f32 $0, $2, $1;", "=r,r,r", [p], tl.bfloat16, True, 2)
    if COMPILED and dtype == tl.float16:
        return tl.inline_asm_elementwise("cvt.rn.relu.f16x2.f32 $0, $2, $1;", "=r,r,r", [p], tl.float16, True, 2)
    return tl.maximum(p, 0.0, propagate_nan=tl.PropagateNan.ALL).to(dtype)


@triton.jit
def query_kernel(Q, K, V, O, DO, DB, Bias, Slopes, Lens, bias, scale, H, Tq, Tk, G: tl.constexpr, CAUSAL: tl.constexpr):
    """O = P V for BM queries; given DO, O is dQ = scale * dS K, and DB the sum of dS over these rows, for db."""
    BM: tl.constexpr = Q.block_shape[2]
    BN: tl.constexpr = K.block_shape[2]
    HIDE: tl.constexpr = CAUSAL or Lens is not None
    GRAD: tl.constexpr = DO is not None
    EXACT: tl.constexpr = Q.dtype == tl.float32
    m, h, b = place(BM, Tq, H, True)  # when causal, the longest rows first
    bias = entry(Bias, h, bias)
    slope = None if Slopes is None else tl.load(Slopes + h)
    k_len = tl.minimum(entry(Lens, b, Tk), Tk)
    whole, end = key_range(m + Tk - Tq, k_len, BM, BN, CAUSAL, HIDE)
    i = m + Tk - Tq + tl.arange(0, BM)[:, None]
    q = load(Q, b, h, m)
    o = tl.zeros(q.shape, tl.float32)
    db = tl.zeros([BM], tl.float32)
    if GRAD:
        do = load(DO, b, h, m)
    for n in range(0, end, BN):
        k, v = load(K, b, h // G, n), load(V, b, h // G, n)
        j = n + tl.arange(0, BN)[None, :]
        masked = n >= whole if HIDE else False
        p, z = weights(dot(q, k.T), i, j, k_len, scale, bias, slope, CAUSAL, masked, GRAD, EXACT)
        if GRAD:
            ds = p * (p * z) * dot(do, v.T)
            o = dot(ds.to(k.dtype), k, o)
            if DB is not None:
                db += tl.sum(ds, 1)
        else:
            o = dot(narrow(p, v.dtype), v, o)
    store(O, b, h, m, o * scale if GRAD else o)
    if DB is not None:
        tl.store(DB + ((b * H + h) * tl.cdiv(Tq, BM) + m // BM), tl.sum(db))


@triton.jit
def key_kernel(Q, K, V, DO, DK, DV, Bias, Slopes, Lens, bias, scale, H, Tq, Tk, G: tl.constexpr, CAUSAL: tl.constexpr):
    """dK = scale * dS^T Q and dV = P^T dO for BN keys, summed over the G query heads that share them."""
    BM: tl.constexpr = Q.block_shape[2]
    BN: tl.constexpr = K.block_shape[2]
    EXACT: tl.constexpr = Q.dtype == tl.float32
    n, hk, b = place(BN, Tk, H // G, False)
    k_len = tl.minimum(entry(Lens, b, Tk), Tk)
    end = tl.where(n < k_len, Tq, 0)
    first, whole = 0, 0  # rows [first, whole) need the causal mask, the rest does not
    if CAUSAL:
        first = tl.minimum(tl.maximum(n + Tq - Tk, 0) // BM * BM, end)
        whole = tl.minimum(tl.cdiv(tl.maximum(n + Tq - Tk + BN - 1, 0), BM) * BM, end)
    j = n + tl.arange(0, BN)[:, None]
    k, v = load(K, b, hk, n), load(V, b, hk, n)
    dk, dv = tl.zeros(k.shape, tl.float32), tl.zeros(v.shape, tl.float32)
    for group in range(G):
        h = hk * G + group
        head_bias = entry(Bias, h, bias)
        slope = None if Slopes is None else tl.load(Slopes + h)
        for m in range(first, end, BM):
            q, do = load(Q, b, h, m), load(DO, b, h, m)
            i = m + Tk - Tq + tl.arange(0, BM)[None, :]
            masked = m < whole if CAUSAL else False
            p, z = weights(dot(k, q.T), i, j, k_len, scale, head_bias, slope, CAUSAL, masked, True, EXACT)  # P^T
            dv = dot(p.to(do.dtype), do, dv)
            ds = p * (p * z) * dot(v, do.T)                                                                 # dS^T
            dk = dot(ds.to(q.dtype), q, dk)
    if Lens is not None:  # the tile that k_len cuts
        dk, dv = tl.where(j < k_len, dk, 0.0), tl.where(j < k_len, dv, 0.0)
    store(DK, b, hk, n, dk * scale)
    store(DV, b, hk, n, dv)


# -------- Operators: torch.compile sees each as one node; autograd saves their inputs and nothing else.

TILES = {  # pass: {D, padded to a power of two: (queries, keys, warps, pipeline stages)} for 16-bit inputs
    "forward": {64: (64, 64, 4, 3), 128: (128, 64, 4, 2), 256: (64, 32, 4, 2)},
    "dq": {64: (64, 64, 4, 2), 128: (128, 64, 8, 3), 256: (64, 32, 4, 2)},
    "dkdv": {64: (64, 64, 4, 2), 128: (64, 128, 8, 3), 256: (32, 64, 4, 1)},
}
FEW = 1024  # up to so many queries or keys, or 32 times as many queries in all, D <= 64 wants small programs on Hopper
compiled = {}  # kernels, by what their code depends on


@functools.cache  # like all that a call would ask again: a small call waits for the CPU
def tile_shape(name, device, dtype, D):
    """(queries, keys, launch options) of the pass."""
    BM, BN, warps, stages = TILES[name][max(64, triton.next_power_of_2(D))]
    if dtype == torch.float32:  # no tensor cores: large tiles only spill
        BM, BN, warps, stages = 32, 16, 4, 1
    if device.type == "cuda" and torch.cuda.get_device_properties(device).shared_memory_per_block_optin < 160 * 1024:
        stages = 1  # consumer GPUs: no room for more
    return BM, BN, dict(num_warps=warps, num_stages=stages)


@functools.cache
def hopper_tier(device, dtype, D):
    """The module of faster kernels, where they serve such tensors, or None."""
    if device.type == "cuda" and dtype != torch.float32 and 32 < D <= 128:
        with contextlib.suppress(ImportError):  # this file may be alone, or Triton without Gluon
            import flashsigmoid_hopper
            return flashsigmoid_hopper if torch.cuda.get_device_capability(device)[0] == 9 else None


@functools.lru_cache(4096)
def geometry(shape, strides, itemsize, rows, columns=None):
    """The descriptor of such a tensor (B, H, T, D) in tiles of `rows` rows and a power of two of columns, but its base;
    None where the hardware, which addresses units of 16 bytes, cannot step like this."""
    strides = [stride if size > 1 else 16 for size, stride in zip(shape, strides)]  # any will do for one row
    if strides[3] == 1 and not any(stride * itemsize % 16 for stride in strides[:3]):
        block = [1, 1, rows, columns or triton.next_power_of_2(shape[3])]
        return dict(shape=list(shape), strides=strides, block_shape=block, padding="zero")


def launch(kernel, programs, tensors, rest, descriptor=None, **options):
    """kernel[(programs,)](*(descriptors of the tensors), *rest), without Triton's slow look at every argument."""
    descriptors = []
    for x, *block in tensors:
        fields = geometry(x.shape, x.stride(), x.element_size(), *block)
        if fields is None or x.data_ptr() % 16:
            x = x.clone(memory_format=torch.contiguous_format)
            fields = geometry(x.shape, x.stride(), x.element_size(), *block)
        descriptors.append(object.__new__(TensorDescriptor))  # its constructor's checks are slow, too
        vars(descriptors[-1]).update(base=x, **fields)
    *optional, b, scale, H, Tq, Tk, G, is_causal = rest
    key = (kernel, x.dtype, x.device, fields["block_shape"][3], G, is_causal, *((n == 1, n % 16) for n in (H, Tq, Tk)),
           *(x is None or x.data_ptr() % 16 for x in optional))
    if found := compiled.get(key):
        found[programs, 1, 1](*descriptors, *rest)
    else:
        descriptors = ((descriptor or TensorDescriptor)(**vars(x)) for x in descriptors)
        compiled[key] = kernel[(programs,)](*descriptors, *rest, **options)


INPUTS = ("Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? slopes, Tensor? k_lens, "
          "float b, float scale, bool is_causal")  # b is the bias where the tensor is None
torch.library.define("flashsigmoid::forward", f"({INPUTS}) -> Tensor")
torch.library.define("flashsigmoid::backward", f"(Tensor do, {INPUTS}) -> Tensor[]")


@torch.library.impl("flashsigmoid::forward", "default")
def launch_forward(q, k, v, bias, slopes, k_lens, b, scale, is_causal):
    (B, H, Tq, D), (Hk, Tk) = q.shape, k.shape[1:3]
    o = torch.empty_like(q)
    rest = bias, slopes, k_lens, b, scale, H, Tq, Tk, H // Hk, is_causal
    with torch.cuda.device_of(q):
        if (D > 64 or min(Tq, Tk) > FEW and B * H * Tq > 32 * FEW) and (tier := hopper_tier(q.device, q.dtype, D)):
            tier.forward(q, k, v, o, rest)
            return o
        BM, BN, options = tile_shape("forward", q.device, q.dtype, D)
        launch(query_kernel, B * H * math.ceil(Tq / BM), ((q, BM), (k, BN), (v, BN), (o, BM)),
               (None, None, *rest), **options)
    return o


@torch.library.impl("flashsigmoid::backward", "default")
def launch_backward(do, q, k, v, bias, slopes, k_lens, b, scale, is_causal):
    """[dQ, dK, dV] and, where bias is a tensor, db. The two portable kernels give the same bits every time."""
    (B, H, Tq, D), (Hk, Tk) = q.shape, k.shape[1:3]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    rest = bias, slopes, k_lens, b, scale, H, Tq, Tk, H // Hk, is_causal
    tier = bias is None and not torch.are_deterministic_algorithms_enabled() and hopper_tier(q.device, q.dtype, D)
    with torch.cuda.device_of(q):
        if tier:
            tier.backward(do, q, k, v, dq, dk, dv, rest)
            return [dq, dk, dv]
        BM, BN, options = tile_shape("dkdv", q.device, q.dtype, D)
        launch(key_kernel, B * Hk * math.ceil(Tk / BN),
               ((q, BM), (k, BN), (v, BN), (do, BM), (dk, BN), (dv, BN)), rest, **options)
        BM, BN, options = tile_shape("dq", q.device, q.dtype, D)
        db = None if bias is None else q.new_empty(B, H, math.ceil(Tq / BM), dtype=torch.float32)  # one a program
        launch(query_kernel, B * H * math.ceil(Tq / BM),
               ((q, BM), (k, BN), (v, BN), (dq, BM), (do, BM)), (db, *rest), **options)
    return [dq, dk, dv] if bias is None else [dq, dk, dv, db.sum((0, 2))]


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs[:6])
        ctx.numbers = inputs[6:]
        return torch.ops.flashsigmoid.forward(*inputs)

    @staticmethod
    def backward(ctx, do):
        dq, dk, dv, *db = torch.ops.flashsigmoid.backward(do, *ctx.saved_tensors, *ctx.numbers)
        return dq, dk, dv, db[0] if db else None, None, None, None, None, None


def refuse(ctx, *_):
    raise RuntimeError("sigmoid_attention is differentiable once; sigmoid_attention_reference has second derivatives")


torch.library.register_fake("flashsigmoid::forward", lambda q, *_: torch.empty_like(q))
torch.library.register_fake("flashsigmoid::backward",
                            lambda do, *inputs: [torch.empty_like(x) for x in inputs[:4] if x is not None])
torch.library.register_autograd("flashsigmoid::backward", refuse)


def require(ok, name, given, allowed, *numbers, error=ValueError):
    if not ok:
        if isinstance(given, Tensor):
            given = f"{given.dtype} {tuple(given.shape)}, strides {given.stride()}, on {given.device}"
        raise error(f"sigmoid_attention: {name} is {given}; allowed: {allowed.format(*numbers)}")


def sigmoid_attention(q, k, v, bias=None, is_causal=False, scale=None, alibi_slopes=None, k_lens=None):
    """O = sigmoid(scale * q k^T + bias - slope * |i - j|) v, called like F.scaled_dot_product_attention.

    q             (B, H, Tq, D), fp16, bf16 or fp32, any strides with a contiguous last dimension, 16 <= D <= 256
    k, v          (B, Hk, Tk, D), like q; H is a multiple of Hk (grouped queries)
    bias          a number or a tensor (H,), which may require a gradient; None means -log(Tk), paper section 2
    is_causal     query i sees the keys j <= i + Tk - Tq (aligned to the last key); a query that sees none returns 0
    scale         a number; None means 1 / sqrt(D)
    alibi_slopes  (H,): subtracts slope * |i + Tk - Tq - j|
    k_lens        (B,) integers: hides the keys j >= k_lens of each sequence; their tiles cost nothing
    returns       (B, H, Tq, D) in q's dtype and order of strides

    Fused kernels on CUDA, `sigmoid_attention_reference` elsewhere; differentiable once in q, k, v, bias. Gradients have
    the same bits every time, on Hopper if torch.use_deterministic_algorithms(True) asks for that. Autocast applies. A
    tensor whose D, base address or stride is no multiple of 16 bytes is copied. Errors name the argument."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        require(isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16, torch.float32), name, x,
                "a tensor of float16, bfloat16 or float32 (float64: sigmoid_attention_reference)", error=TypeError)
        require(x.dim() == 4 and x.numel() > 0 and x.stride(3) == 1, name, x, "(B, H, T, D), last stride 1, not empty")
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    (B, H, Tq, D), (Hk, Tk) = q.shape, k.shape[1:3]
    require(16 <= D <= 256, "D", D, "16 to 256")
    for name, x in (("k", k), ("v", v)):
        require(x.shape == (B, Hk, Tk, D) and H % Hk == 0 and x.dtype == q.dtype and x.device == q.device, name, x,
                "({}, a divisor of {}, Tk, {}) in {} on {}, k and v alike", B, H, D, q.dtype, q.device)
    scale = D ** -0.5 if scale is None else scale
    bias = -math.log(Tk) if bias is None else bias
    learned = bias if isinstance(bias, Tensor) else None
    for name, x, size, kind in (("bias", learned, H, "float"), ("alibi_slopes", alibi_slopes, H, "float"),
                                ("k_lens", k_lens, B, "int")):
        require(x is None or isinstance(x, Tensor) and x.shape == (size,) and x.device == q.device
                and x.is_floating_point() == (kind == "float"),
                name, x, "a tensor ({},), {}, on {}", size, kind, q.device)
    require(alibi_slopes is None or not alibi_slopes.requires_grad, "alibi_slopes", alibi_slopes, "no requires_grad")
    for name, x in (("scale", scale), ("bias", 0 if learned is not None else bias)):
        require(not isinstance(x, Tensor) and math.isfinite(x), name, x, "a finite number")
    if q.device.type not in KERNEL_DEVICES or q.is_cpu and q.dtype == torch.bfloat16:  # the interpreter has no bf16
        return sigmoid_attention_reference(q, k, v, bias, is_causal, scale, alibi_slopes, k_lens)
    b, bias = (float(bias), None) if learned is None else (0.0, bias.float().contiguous())
    slopes = None if alibi_slopes is None else alibi_slopes.float().contiguous()
    k_lens = None if k_lens is None else k_lens.int().contiguous()
    padding = -D % (16 // q.element_size())
    if padding:
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    inputs = q, k, v, bias, slopes, k_lens, b, float(scale), bool(is_causal)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:4])
    out = (Attention.apply if learns else torch.ops.flashsigmoid.forward)(*inputs)
    return out[..., :D] if padding else out


# -------- python flashsigmoid.py

def check(device):
    """Errors against float64: {dtype: {what: error}}; the run stops where one is above a few roundings of the dtype.
    The last is for weights of about 1/65,536, where a sigmoid by tanh.approx is off by 32 %."""
    errors = {}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
        found = []
        inputs = torch.randn(4, 2, 4, 300, 128, device=device).to(dtype)
        far = [torch.randn(1, 2, T, 64, device=device).to(dtype) for T in (64, 65536, 65536)]
        for attention, precision in ((sigmoid_attention, dtype), (sigmoid_attention_reference, torch.float64)):
            *leaves, do = (x.requires_grad_() for x in inputs.to(precision).unbind())
            out = attention(*leaves, is_causal=True)
            found.append((out, *torch.autograd.grad(out, leaves, do), attention(*(x.to(precision) for x in far))))
        results = zip(("out", "dq", "dk", "dv", "out of 65,536 keys"), *found)
        errors[str(dtype)] = here = {name: ((x - exact).norm() / exact.norm()).item() for name, x, exact in results}
        print(f"{dtype}, against float64:", *(f"{name} {error:.1e}" for name, error in here.items()))
        if not max(here.values()) < tolerance:
            raise SystemExit(f"ERROR: an error above {tolerance}")
    return errors


def table(rows):
    """Markdown: TFLOP/s without and with a causal mask, a line for each direction, D and T."""
    names = [name for name in rows[0] if name not in ("D", "T", "causal", "direction")]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for full, causal in zip(rows, rows[2:]):
        if causal["causal"] and not full["causal"]:
            cells = (f"{full[name][0]:.0f} / {causal[name][0]:.0f}" if name in full else "" for name in names)
            lines.append(f"| {full['direction']}, D = {full['D']}, T = {full['T']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def benchmark():
    """Rows of [TFLOP/s, GiB] beside other attention, forward and backward: 16,384 tokens, 2,048 channels, bf16."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def measure(f, flops):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        peak = (torch.cuda.max_memory_allocated() - before) / 2 ** 30
        return flops / triton.testing.do_bench(f, warmup=100, rep=200, return_mode="median") / 1e9, peak

    rows = []
    sdpa = F.scaled_dot_product_attention
    peers = {"ours": (sigmoid_attention, SDPBackend.MATH), "FlashAttention-2": (sdpa, SDPBackend.FLASH_ATTENTION),
             "cuDNN": (sdpa, SDPBackend.CUDNN_ATTENTION)}
    with contextlib.suppress(ImportError):  # where that is installed
        from flash_attn_interface import flash_attn_func
        peers["FlashAttention-3"] = (lambda q, k, v, is_causal: flash_attn_func(
            *(x.transpose(1, 2) for x in (q, k, v)), causal=is_causal).transpose(1, 2), SDPBackend.MATH)
    for D, T, causal in product((64, 128), (1024, 4096, 16384), (False, True)):
        q, k, v, do = (torch.randn(16384 // T, T, 2048 // D, D, device="cuda", dtype=torch.bfloat16,
                                   requires_grad=True).transpose(1, 2) for _ in range(4))
        forward, backward = (dict(D=D, T=T, causal=causal, direction=name) for name in ("forward", "backward"))
        flops = 4 * 16384 * T * 2048 / (1 + causal)
        for name, (attention, backend) in peers.items():
            with sdpa_kernel(backend):
                forward[name] = measure(lambda: attention(q, k, v, is_causal=causal), flops)
                out = attention(q, k, v, is_causal=causal)
                if out.requires_grad:
                    grad = lambda: torch.autograd.grad(out, (q, k, v), do, retain_graph=True)
                    backward[name] = measure(grad, 2.5 * flops)
        rows += [forward, backward]
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description="Check the kernels against float64 and, on CUDA, time them.")
    parser.add_argument("--out", type=argparse.FileType("a"), metavar="FILE.json", help="for errors and times")
    args = parser.parse_args(argv)
    device, name = ("cuda", torch.cuda.get_device_name()) if torch.cuda.is_available() else ("cpu", "CPU")
    print(f"{name}, torch {torch.__version__}, {'Triton kernels' if device in KERNEL_DEVICES else 'PyTorch reference'}")
    torch.manual_seed(0)
    result = dict(device=name, torch=torch.__version__, errors=check(device))
    if device == "cuda":
        result.update(triton=triton.__version__, rows=benchmark())
        print("\nTFLOP/s, full / causal\n" + table(result["rows"]))
    if args.out:
        args.out.truncate(0)  # only now: a run that stops before leaves the old file
        args.out.write(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.modules["flashsigmoid"] = sys.modules["__main__"]  # so that flashsigmoid_hopper does not import this file again
    main()
