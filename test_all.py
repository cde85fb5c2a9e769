"""Every test of the repository: `python test_all.py`. No GPU and no network needed; with a GPU the kernel tests run on it."""
import math
import os
import random
import subprocess
import sys
import unittest
from itertools import combinations, product

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: the kernels run on the CPU, in its interpreter

import flashsigmoid
from flashsigmoid import row_errors, sigmoid_attention, sigmoid_attention_reference, tl, triton

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)  # drawn on the CPU: the same numbers everywhere


# -------- flashsigmoid.py

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
if not CUDA:
    del TOLERANCE[torch.bfloat16]  # NumPy, and so the interpreter, has none
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "packed": lambda x: torch.stack([x.transpose(1, 2)] * 3, 2)[:, :, 1].transpose(1, 2),  # k of a (B, T, 3, H, D)
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


def cases(**options):
    """Draws that together hold every pair of values of two options: each the best of 1000, until none shows a new pair."""
    draw, seen = random.Random(0), set()
    while True:
        drawn = [tuple((name, draw.choice(values)) for name, values in options.items()) for _ in range(1000)]
        best = max(drawn, key=lambda case: len(set(combinations(case, 2)) - seen))
        if seen.issuperset(combinations(best, 2)):
            return
        seen.update(combinations(best, 2))
        yield dict(best)


@triton.jit
def weights_kernel(X, P, k_len, N: tl.constexpr, MASK: tl.constexpr, EXACT: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(P + i, flashsigmoid.weights(tl.load(X + i), i, i, k_len, 1.0, 0.0, 0.0, False, False, MASK, EXACT))


class FlashSigmoid(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)

    def test_known_answer(self):
        """Logits log(3) (1, -1) and (0, 0): P = (3/4, 1/4), (1/2, 1/2); v = (10, 14): O = 7.5 + 3.5, 5 + 7.

        The default bias -log(2) gives P = (3/5, 1/7), (1/3, 1/3); a slope of log(3) gives P = (3/4, 1/10), (1/4, 1/2).
        Query heads 0 and 1 share a key head; 2 and 3 share one whose v is doubled.
        """
        q, k, v, expected = (torch.zeros(1, heads, 2, 16, device=DEVICE) for heads in (4, 2, 2, 4))
        q[:, :, 0, 3] = 8
        k[:, :, :, 3] = torch.tensor([1.0, -1.0])
        v[:, :, :, 5] = torch.tensor([[10.0, 14.0], [20.0, 28.0]])
        slopes, k_lens = torch.full((4,), math.log(3), device=DEVICE), torch.tensor([1], device=DEVICE)
        for options, answer in ((dict(), [8, 8]), (dict(bias=0), [11, 12]), (dict(bias=0, is_causal=True), [7.5, 12]),
                                (dict(bias=0, k_lens=k_lens), [7.5, 5]), (dict(bias=0, alibi_slopes=slopes), [8.9, 9.5])):
            expected[0, :, :, 5] = torch.tensor([[1], [1], [2], [2]]) * torch.tensor(answer)
            for attention in (sigmoid_attention, sigmoid_attention_reference):
                torch.testing.assert_close(attention(q, k, v, scale=math.log(3) / 8, **options), expected)

    def test_reference_derivatives(self):
        """First and second derivatives against finite differences: causal, ALiBi, k_lens and grouped queries at once."""
        shapes = (2, 2, 3, 4), (2, 1, 4, 4), (2, 1, 4, 4), (2,)
        leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        options = True, None, torch.tensor([0.5, 0.1]), torch.tensor([2, 4])
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            self.assertTrue(check(lambda *x: sigmoid_attention_reference(*x, *options), leaves))

    def test_kernels_against_float64(self):
        """Output and gradients within a few roundings of the dtype, with every pair of features."""
        lengths, dims = [1, 7, 33, 64, 130] + [1000, 2049] * CUDA, [16, 17, 20, 40, 64] + [128, 256] * CUDA
        for case in cases(dtype=list(TOLERANCE), Tq=lengths, Tk=lengths, D=dims, heads=[(2, 2), (4, 2), (3, 1)],
                          layout=list(LAYOUTS), bias=[None, -2.5, "tensor"], is_causal=[False, True], alibi=[False, True],
                          k_lens=[None, "0 and all", "1 and half"]):
            dtype, Tq, Tk, D, (H, Hk), layout, bias, is_causal, alibi, k_lens = case.values()
            q, k, v, do = (LAYOUTS[layout](normal(2, heads, T, D, dtype=dtype))
                           for heads, T in ((H, Tq), (Hk, Tk), (Hk, Tk), (H, Tq)))
            bias = torch.linspace(-3, 1, H, device=DEVICE) if bias == "tensor" else bias
            slopes = torch.linspace(0.1, 1, H, device=DEVICE) if alibi else None
            hide = k_lens and torch.tensor([0, Tk] if k_lens == "0 and all" else [1, Tk // 2 + 1], device=DEVICE)
            errors = row_errors(q, k, v, 16 * do, bias, is_causal=is_causal, alibi_slopes=slopes, k_lens=hide)
            for name, error in errors.items():  # 16 * do: fewer gradients in the subnormal numbers of fp16
                with self.subTest(name, **case):
                    self.assertLess(error, TOLERANCE[dtype])

    @unittest.skipUnless(flashsigmoid.KERNEL_DEVICES, "no Triton on this platform")
    def test_weights(self):
        """The kernels' sigmoid over the range of fp32: relative error, bounds, infinite, NaN and masked logits."""
        x = torch.linspace(-128, 80, 4096, device=DEVICE)
        x[:4] = torch.tensor([-math.inf, -1e4, math.inf, math.nan])
        for EXACT, tolerance in ((False, 1.5e-4), (True, 1e-5)):
            p, masked = torch.full((2, 4096), -1.0, device=DEVICE)
            weights_kernel[(1,)](x, p, 4096, 4096, False, EXACT)
            weights_kernel[(1,)](x, masked, 2048, 4096, True, EXACT)
            self.assertTrue(torch.equal(masked[4:2048], p[4:2048]) and not masked[2048:].any())
            self.assertTrue(p[0] == p[1] == 0 and p[3].isnan())
            self.assertTrue(((p >= 0) & (p <= 1.001))[x == x].all(), f"not in [0, 1]: {x[~(p >= 0)]}")
            self.assertLess((p / torch.sigmoid(x.double()) - 1).abs()[x.abs() <= 80].max(), tolerance)

    def test_weights_of_16_bit_inputs(self):
        """O = P for one key and v = 4096: one rounding of the dtype, down to the logits of b = -log 65536."""
        x = torch.linspace(-16, 16, 257, device=DEVICE)  # exact in fp16 and bf16
        for dtype, bias in product(TOLERANCE, (0.0, -math.log(65536))):
            q = torch.zeros(1, 1, 257, 16, device=DEVICE, dtype=dtype)
            q[..., 0] = x
            key = torch.ones(1, 1, 1, 16, device=DEVICE, dtype=dtype)
            p = sigmoid_attention(q, key, 4096 * key, bias, scale=1.0)[0, 0, :, 7].double() / 4096
            exact = torch.sigmoid(x.double() + bias)
            error = (p / exact - 1).abs()[exact > torch.finfo(dtype).tiny].max()  # above the subnormal numbers
            self.assertLess(error, torch.finfo(dtype).eps / 2 + 2e-4)

    def test_nan_spreads(self):
        """A NaN in a query makes its row NaN, one in a key every row that sees it, and no other."""
        for dtype in TOLERANCE:
            q, k, v = normal(3, 1, 2, 70, 16, dtype=dtype)
            q[0, 0, 40, 3] = math.nan
            k[0, 1, 50, 3] = math.nan
            rows = sigmoid_attention(q, k, v, is_causal=True).isnan().float().mean(-1)
            self.assertEqual(rows[0].tolist(), [[0] * 40 + [1] + [0] * 29, [0] * 50 + [1] * 20])

    def test_hidden_is_zero(self):
        """Queries that see no key have zero output and dq, keys that no query sees zero dk and dv."""
        q, k, v = (normal(2, 2, T, 16).requires_grad_() for T in (70, 40, 40))  # causal: the first 30 queries see nothing
        out = sigmoid_attention(q, k, v, is_causal=True, k_lens=torch.tensor([0, 20], device=DEVICE))
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), normal(2, 2, 70, 16))
        for x, hidden in ((out, 30), (dq, 30), (dk.flip(2), 20), (dv.flip(2), 20)):
            self.assertTrue((x[0] == 0).all() and (x[1, :, :hidden] == 0).all() and (x[1, :, hidden:] != 0).all())

    def test_identities(self):
        """Disjoint keys add up; a causal call's last row is the call of one query; equal calls give equal bits."""
        q, k, v = normal(3, 2, 2, 150, 16).requires_grad_()
        parts = (sigmoid_attention(q, k[:, :, part], v[:, :, part], bias=-3) for part in (slice(50), slice(50, None)))
        torch.testing.assert_close(sigmoid_attention(q, k, v, bias=-3), sum(parts))
        causal = sigmoid_attention(q, k, v, is_causal=True)
        last = q[:, :, -1:].mT.contiguous().mT  # one token, whose stride, 1, is no multiple of 16 bytes
        torch.testing.assert_close(sigmoid_attention(last, k, v, is_causal=True), causal[:, :, -1:])
        twice = [torch.autograd.grad(causal, (q, k, v), torch.ones_like(q), retain_graph=True) for _ in range(2)]
        self.assertTrue(all(torch.equal(a, b) for a, b in zip(*twice)))

    def test_row_sum_at_initialisation(self):
        """q, k ~ N(0, 1): a row of P sums to about e^(1/2) with b = -log n and to n / 2 with b = 0; half that if causal."""
        q, k = normal(2, 4, 1, 512, 64)
        for bias, is_causal, expected in ((None, False, 1.64), (0, False, 256), (None, True, 0.822), (0, True, 128)):
            row_sum = sigmoid_attention_reference(q, k, torch.ones_like(k), bias, is_causal).mean().item()
            self.assertAlmostEqual(row_sum / expected, 1, delta=0.04)

    def test_jacobian_bound(self):
        """Theorem 3.2: ||J|| <= ||Wv|| (n max P + 2 max P' ||A|| sum |x_i|^2), A = Wq^T Wk; tight for small inputs."""
        norm, ratios = torch.linalg.matrix_norm, []
        for n, d, size, bias in product((2, 6), (1, 3), (0.03, 0.5, 2), (0, -2)):
            x, Wq, Wk, Wv = (torch.randn(rows, d, dtype=torch.float64) for rows in (n, d, d, d))
            J = torch.func.jacrev(lambda x: sigmoid_attention_reference(
                *((x @ W.T)[None, None] for W in (Wq, Wk, Wv)), bias, scale=1.0))(x * size).reshape(n * d, n * d)
            p = torch.sigmoid(x @ Wq.T @ Wk @ x.T * size ** 2 + bias)
            bound = n * p.max() + 2 * (p * (1 - p)).max() * norm(Wq.T @ Wk, 2) * (x * size).square().sum()
            ratios.append((norm(J, 2) / norm(Wv, 2) / bound).item())
        self.assertTrue(0.9 < max(ratios) <= 1 + 1e-12, ratios)

    def test_operators(self):
        """PyTorch's own checks of a custom operator, with every optional tensor and with none."""
        q, k, v = (normal(2, heads, 9, 16).requires_grad_() for heads in (4, 2, 2))
        tensors = normal(4).requires_grad_(), normal(4).abs(), torch.tensor([3, 9], device=DEVICE, dtype=torch.int32)
        for optional in ((None, None, None), tensors):
            torch.library.opcheck(torch.ops.flashsigmoid.forward.default, (q, k, v, *optional, -2.0, 0.25, True))

    def test_compile(self):
        """One graph, the same numbers as eager, at a second length too."""
        compiled = torch.compile(sigmoid_attention, fullgraph=True, backend="inductor" if CUDA else "aot_eager")
        for T in (20, 37):
            q, k, v, do = normal(4, 2, 2, T, 20).requires_grad_()
            eager, graph = (f(q, k, v, is_causal=True) for f in (sigmoid_attention, compiled))
            torch.testing.assert_close(graph, eager)
            for a, b in zip(*(torch.autograd.grad(out, (q, k, v), do) for out in (graph, eager))):
                torch.testing.assert_close(a, b)

    def test_autograd(self):
        """Only q, k and v are kept for the backward pass; a second derivative is refused; autocast applies."""
        q, k, v = (normal(2, 2, 9, 16).requires_grad_() for _ in range(3))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
            out = sigmoid_attention(q, k, v)
        self.assertEqual(kept, [x.data_ptr() for x in (q, k, v)])
        dq, = torch.autograd.grad(out.sum(), q, create_graph=True)
        with self.assertRaisesRegex(RuntimeError, "differentiable once"):
            dq.sum().backward()
        with torch.autocast(DEVICE, torch.float16):
            out = sigmoid_attention(q, k, v)
        self.assertTrue(torch.equal(out, sigmoid_attention(q.half(), k.half(), v.half())))
        self.assertEqual(torch.autograd.grad(out.sum(), q)[0].dtype, torch.float32)

    def test_bad_arguments(self):
        """Each is refused by an error that names it."""
        x, one, nan = normal(2, 4, 8, 16), torch.ones(4, device=DEVICE), math.nan
        for error, words, bad in (
                (TypeError, "q is None", dict(q=None)), (TypeError, "q is torch.float64", dict(q=x.double())),
                (TypeError, "v is torch.int64", dict(v=x.long())), (TypeError, "dtype of q, k, v", dict(k=x.half())),
                (ValueError, "q is .* allowed: .B, H, T, D", dict(q=x[0])), (ValueError, "nothing empty", dict(k=x[:, :, :0])),
                (ValueError, "last stride 1", dict(q=x.mT.contiguous().mT)), (ValueError, "device of q", dict(k=x.to("meta"))),
                (ValueError, "k is .* a divisor of 4", dict(k=x[:, :3])), (ValueError, "v is .* shape of k", dict(v=x[:1])),
                (ValueError, "D is 8", dict(q=x[..., :8])), (ValueError, "D is 257", dict(q=normal(2, 4, 8, 257))),
                (ValueError, "bias is nan", dict(bias=nan)), (ValueError, "scale is nan", dict(scale=nan)),
                (ValueError, "bias is .* shape .4,", dict(bias=one[:3])), (TypeError, "bias", dict(bias=one.long())),
                (ValueError, "k_lens is .* shape .2,", dict(k_lens=one.int())), (TypeError, "k_lens", dict(k_lens=one[:2])),
                (ValueError, "no requires_grad", dict(alibi_slopes=one.clone().requires_grad_())),
                (TypeError, "alibi_slopes is 0.5", dict(alibi_slopes=0.5)), (TypeError, "k_lens is 3", dict(k_lens=3))):
            with self.subTest(words), self.assertRaisesRegex(error, words):
                sigmoid_attention(**(dict(q=x, k=x, v=x) | bad))

    def test_import(self):
        """Importing prints, parses and starts nothing; without Triton the reference takes over."""
        no_triton = ("import sys; sys.modules['triton'] = None; import torch; from flashsigmoid import *; q = torch.ones(1, 2, 3, 16);"
                     "assert sigmoid_attention(q, q, q).equal(sigmoid_attention_reference(q, q, q))")
        for code in ("import flashsigmoid, torch; assert not torch.cuda.is_initialized()", no_triton):
            command = [sys.executable, "-c", code, "--no-such-flag"]
            done = subprocess.run(command, cwd=os.path.dirname(os.path.abspath(__file__)), capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stdout), (0, ""), done.stderr)


if __name__ == "__main__":
    unittest.main()
