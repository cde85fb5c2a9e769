"""Every test of the repository: `python test_all.py`. No GPU and no network needed; a GPU, if any, runs the kernels."""
import math
import os
import random
import subprocess
import sys
import unittest
from itertools import product

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: the kernels run on the CPU, in its interpreter

import flashsigmoid
from flashsigmoid import row_errors, sigmoid_attention, sigmoid_attention_reference, tl, triton

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

# -------- flashsigmoid.py

TOLERANCE = {torch.float32: 3e-5, torch.float16: 2e-3} | ({torch.bfloat16: 1e-2} if CUDA else {})  # NumPy has no bf16
LAYOUTS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "packed": lambda x: torch.stack([x.transpose(1, 2)] * 3, 2)[:, :, 1].transpose(1, 2),  # k of a (B, T, 3, H, D)
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)  # drawn on the CPU: the same numbers everywhere


@triton.jit
def weights_kernel(X, P, k_len, N: tl.constexpr, MASK: tl.constexpr, EXACT: tl.constexpr):
    i = tl.arange(0, N)
    p, z = flashsigmoid.weights(tl.load(X + i), i, i, k_len, 1.0, 0.0, 0.0, False, False, MASK, EXACT)
    tl.store(P + i, p)


class FlashSigmoid(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)

    def test_known_answer(self):
        """Logits log(3) (1, -1) and (0, 0): P = (3/4, 1/4), (1/2, 1/2); v = (10, 14): O = 7.5 + 3.5, 5 + 7.
        The default bias -log(2) gives P = (3/5, 1/7), (1/3, 1/3); a slope of log(3) gives (3/4, 1/10), (1/4, 1/2)."""
        q, k, v = torch.zeros(1, 4, 2, 16), torch.zeros(1, 2, 2, 16), torch.zeros(1, 2, 2, 16)
        q[:, :, 0, 3], k[:, :, 0, 3], k[:, :, 1, 3] = math.log(3), 1, -1
        v[:, :, :, 5] = torch.tensor([[10.0, 14.0], [20.0, 28.0]])  # v doubled for query heads 2 and 3
        q, k, v, slopes, lens = (x.to(DEVICE) for x in (q, k, v, torch.full((4,), math.log(3)), torch.tensor([1])))
        for options, answer in ((dict(), [8, 8]), (dict(bias=0), [11, 12]), (dict(bias=0, is_causal=True), [7.5, 12]),
                                (dict(bias=0, k_lens=lens), [7.5, 5]), (dict(bias=0, alibi_slopes=slopes), [8.9, 9.5])):
            for attention in (sigmoid_attention, sigmoid_attention_reference):
                out = attention(q, k, v, scale=1, **options)[0, :, :, 5].cpu()
                torch.testing.assert_close(out, torch.tensor([[1.0], [1], [2], [2]]) * torch.tensor(answer))

    def test_reference_derivatives(self):
        shapes = (2, 2, 3, 4), (2, 1, 4, 4), (2, 1, 4, 4), (2,)  # q, k, v, bias
        leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        options = True, None, torch.tensor([0.5, 0.1]), torch.tensor([2, 4])  # causal, scale, slopes, k_lens
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            self.assertTrue(check(lambda *x: sigmoid_attention_reference(*x, *options), leaves))

    def test_kernels_against_float64(self):
        lengths, dims = [1, 7, 33, 64, 130] + [1000, 2049] * CUDA, [16, 17, 20, 40, 64] + [128, 256] * CUDA
        options = dict(dtype=[*TOLERANCE], Tq=lengths, Tk=lengths, D=dims, heads=[(2, 2), (4, 2), (3, 1)],
                       layout=[*LAYOUTS], bias=[0, 1], causal=[0, 1], alibi=[0, 1], k_lens=[None, (0, 1), (0.1, 0.6)])
        draw = random.Random(1)  # of which 80 cases hold every pair of values of two options (on the CPU)
        for case in ({name: draw.choice(values) for name, values in options.items()} for _ in range(80)):
            dtype, Tq, Tk, D, (H, Hk), layout, bias, causal, alibi, k_lens = case.values()
            q, k, v, do = (LAYOUTS[layout](normal(2, heads, T, D, dtype=dtype))
                           for heads, T in ((H, Tq), (Hk, Tk), (Hk, Tk), (H, Tq)))
            bias = torch.linspace(-9, 6, H, device=DEVICE) if bias else None
            slopes = torch.linspace(1, 3, H, device=DEVICE) / max(Tq, Tk) if alibi else None
            k_lens = k_lens and torch.tensor([int(part * Tk) for part in k_lens], device=DEVICE)
            with self.subTest(**case):
                errors = row_errors(q, k, v, 16 * do, bias, is_causal=causal, alibi_slopes=slopes, k_lens=k_lens)
                self.assertTrue(all(error < TOLERANCE[dtype] for error in errors.values()), errors)

    @unittest.skipUnless(flashsigmoid.KERNEL_DEVICES, "no Triton on this platform")
    def test_weights(self):
        x = torch.linspace(-128, 80, 4096, device=DEVICE)
        x[:4] = torch.tensor([-math.inf, -1e4, math.inf, math.nan])
        for EXACT, tolerance in ((False, 1.5e-4), (True, 1e-5)):
            p, masked = torch.full((2, 4096), -1.0, device=DEVICE)
            weights_kernel[(1,)](x, p, 4096, 4096, False, EXACT)
            weights_kernel[(1,)](x, masked, 2048, 4096, True, EXACT)
            self.assertTrue(p[0] == p[1] == 0 and p[3].isnan() and not masked[2048:].any())
            self.assertTrue(((p >= 0) & (p <= 1.001) | x.isnan()).all(), f"logits {x[~(p >= 0)]}")
            self.assertLess((p / torch.sigmoid(x.double()) - 1)[x.abs() <= 80].abs().max(), tolerance)

    def test_weights_are_rounded_once(self):
        x = torch.linspace(-16, 16, 257, device=DEVICE)  # exact in fp16 and bf16
        for dtype, bias in product(TOLERANCE, (0, -math.log(65536))):
            one = torch.ones(1, 1, 1, 16, device=DEVICE, dtype=dtype)
            p = sigmoid_attention(one * x[:, None].to(dtype), one, 4096 * one, bias, scale=1 / 16)[0, 0, :, 7] / 4096.0
            ref = torch.sigmoid(x.double() + bias)
            self.assertLess((p / ref - 1)[ref > torch.finfo(dtype).tiny].abs().max(), torch.finfo(dtype).eps / 2 + 2e-4)

    def test_nan_and_hidden_rows(self):
        """A NaN reaches the rows that see it and no other; a row that sees or is seen by nothing is zero."""
        for dtype in TOLERANCE:
            q, k, v = normal(3, 1, 2, 70, 16, dtype=dtype)
            q[0, 0, 40, 3] = k[0, 1, 50, 3] = math.nan
            rows = sigmoid_attention(q, k, v, is_causal=True).isnan().float().mean(-1)
            self.assertEqual(rows[0].tolist(), [[0] * 40 + [1] + [0] * 29, [0] * 50 + [1] * 20])
        q, k, v = (normal(2, 2, T, 16).requires_grad_() for T in (70, 40, 40))  # causal: 30 queries see no key
        out = sigmoid_attention(q, k, v, is_causal=True, k_lens=torch.tensor([0, 20], device=DEVICE))
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), normal(2, 2, 70, 16))
        for x, hidden in ((out, 30), (dq, 30), (dk.flip(2), 20), (dv.flip(2), 20)):
            self.assertTrue(not x[0].any() and not x[1, :, :hidden].any() and x[1, :, hidden:].all())

    def test_identities(self):
        """Disjoint keys add up; a causal call's last row is the call of one query; equal calls give equal bits."""
        q, k, v = normal(3, 2, 2, 150, 16).requires_grad_()
        parts = (sigmoid_attention(q, k[:, :, part], v[:, :, part], bias=-3) for part in (slice(50), slice(50, None)))
        torch.testing.assert_close(sigmoid_attention(q, k, v, bias=-3), sum(parts))
        out = sigmoid_attention(q, k, v, is_causal=True)
        last = q[:, :, -1:].mT.contiguous().mT  # the stride of its one token is 1
        torch.testing.assert_close(sigmoid_attention(last, k, v, is_causal=True), out[:, :, -1:])
        twice = (torch.autograd.grad(out, (q, k, v), torch.ones_like(q), retain_graph=True) for _ in range(2))
        torch.testing.assert_close(*twice, rtol=0, atol=0)

    def test_row_sum_at_initialisation(self):
        q, k = normal(2, 4, 1, 512, 64)
        for bias, is_causal, expected in ((None, False, 1.64), (0, False, 256), (None, True, 0.822), (0, True, 128)):
            row_sum = sigmoid_attention_reference(q, k, torch.ones_like(k), bias, is_causal).mean().item()
            self.assertAlmostEqual(row_sum / expected, 1, delta=0.04)

    def test_jacobian_bound(self):
        """Theorem 3.2: |J| <= |Wv| (n max P + 2 max P' |A| sum |x_i|^2), A = Wq^T Wk; tight for small inputs."""
        norm, ratios = torch.linalg.matrix_norm, []
        for n, d, size, bias in product((2, 6), (1, 3), (0.03, 0.5, 2), (0, -2)):
            x, Wq, Wk, Wv = (torch.randn(rows, d, dtype=torch.float64) for rows in (n, d, d, d))
            J = torch.func.jacrev(lambda x: sigmoid_attention_reference(
                *((x @ W.T)[None, None] for W in (Wq, Wk, Wv)), bias, scale=1))(size * x).reshape(n * d, n * d)
            p = torch.sigmoid(size ** 2 * x @ Wq.T @ Wk @ x.T + bias)
            bound = n * p.max() + 2 * (p * (1 - p)).max() * norm(Wq.T @ Wk, 2) * (size * x).square().sum()
            ratios.append((norm(J, 2) / norm(Wv, 2) / bound).item())
        self.assertTrue(0.9 < max(ratios) <= 1 + 1e-12, ratios)

    def test_operators(self):
        q, k, v = (normal(2, heads, 9, 16).requires_grad_() for heads in (4, 2, 2))
        tensors = normal(4).requires_grad_(), normal(4), torch.tensor([3, 9], device=DEVICE, dtype=torch.int32)
        for optional in ((None, None, None), tensors):
            torch.library.opcheck(torch.ops.flashsigmoid.forward.default, (q, k, v, *optional, -2.0, 0.25, True))
        compiled = torch.compile(sigmoid_attention, fullgraph=True, backend="inductor" if CUDA else "aot_eager")
        for T in (20, 37):
            q, k, v, do = normal(4, 2, 2, T, 20).requires_grad_()
            outs = [attention(q, k, v, is_causal=True) for attention in (compiled, sigmoid_attention)]
            torch.testing.assert_close(*outs)
            torch.testing.assert_close(*(torch.autograd.grad(out, (q, k, v), do) for out in outs))

    def test_autograd(self):
        """Only q, k and v are kept for the backward pass; a second derivative is refused; autocast applies."""
        q, k, v = (normal(2, 2, 9, 16).requires_grad_() for _ in range(3))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
            out = sigmoid_attention(q, k, v)
        self.assertEqual(kept, [x.data_ptr() for x in (q, k, v)])
        dq, = torch.autograd.grad(out.sum(), q, create_graph=True)
        self.assertRaisesRegex(RuntimeError, "differentiable once", dq.sum().backward)
        with torch.autocast(DEVICE, torch.float16):
            self.assertTrue(sigmoid_attention(q, k, v).equal(sigmoid_attention(q.half(), k.half(), v.half())))

    def test_bad_arguments(self):
        x, one, nan = normal(2, 4, 8, 16), torch.ones(4, device=DEVICE), math.nan
        types = (("q", None, "q is None"), ("q", x.double(), "q is torch.float64"), ("k", x.half(), "dtype of q, k, v"),
                 ("k_lens", one[:2], "k_lens is.*int32"), ("k_lens", 3, "k_lens is 3"))
        values = (("q", x[0], "q is.*T, D"), ("q", x.mT.contiguous().mT, "q is.*stride"), ("q", x[..., :8], "D is 8"),
                  ("k", x[:, :, :0], "k is.*empty"), ("k", x[:, :3], "k is.*divisor"), ("v", x[:1], "v is.*shape of k"),
                  ("k", x.to("meta"), "k is.*device"), ("scale", nan, "scale is nan"), ("bias", nan, "bias is nan"),
                  ("bias", one[:3], "bias is.*shape .4,"), ("k_lens", one.int(), "k_lens is.*shape .2,"),
                  ("alibi_slopes", torch.nn.Parameter(one), "alibi_slopes is.*requires_grad"))
        for error, table in ((TypeError, types), (ValueError, values)):
            for argument, value, words in table:
                with self.subTest(words), self.assertRaisesRegex(error, words):
                    sigmoid_attention(**(dict(q=x, k=x, v=x) | {argument: value}))

    def test_import_is_silent_and_needs_no_triton(self):
        for code in ("import flashsigmoid, torch\nassert not torch.cuda.is_initialized()",
                     "import sys\nsys.modules['triton'] = None\nimport flashsigmoid as f, torch\n"
                     "assert f.sigmoid_attention(*torch.ones(3, 1, 1, 2, 16), bias=0, scale=0).eq(1).all()"):
            printed = subprocess.check_output([sys.executable, "-c", code], cwd=os.path.dirname(__file__), text=True)
            self.assertEqual(printed, "")


if __name__ == "__main__":
    unittest.main(warnings="ignore")  # the interpreter overflows in exp2, as the GPU does, and NumPy warns
