"""Every test of the repository: `python test_all.py`. No GPU and no network needed; a GPU, if any, runs the kernels."""
import argparse
import contextlib
import gzip
import importlib.util
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import unittest
import urllib.error
from itertools import product
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: the kernels run on the CPU, in its interpreter

import byov
import data.text
import flashsigmoid
import hier_iwae
import nmn_iterated
import sigmoid_gpt
from data import augment, cifar10, corruptions, densities, download, glyphs, mnist
from data import probes, shapes_questions as questions, shapes_syget as syget, summary
from data.calibration import auroc, gaussianity, measure, predictive_std
from flashsigmoid import sigmoid_attention, sigmoid_attention_reference, tl, triton
from test_hopper import Hopper  # noqa: F401, unittest finds it here

ROOT = Path(__file__).parent
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


class Case(unittest.TestCase):
    """Each test begins with seed 0 and with a folder of its own, which goes when it is over."""
    def setUp(self):
        torch.manual_seed(0)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(mock.patch.stopall)
        self.out = Path(folder.name)
        self.plot = ["--plot", self.out / "x.png"] if importlib.util.find_spec("matplotlib") else []


# -------- flashsigmoid.py

TOLERANCE = {torch.float32: 3e-5, torch.float16: 2e-3} | ({torch.bfloat16: 1e-2} if CUDA else {})  # NumPy has no bf16
LAYOUTS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "packed": lambda x: torch.stack([x.transpose(1, 2)] * 3, 2)[:, :, 1].transpose(1, 2),  # k of a (B, T, 3, H, D)
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)  # drawn on the CPU: the same numbers everywhere


def row_errors(q, k, v, do, bias, **options):
    """Largest relative error of a row of out, dq, dk, dv and (bias a tensor) db against the reference in float64; a row
    whose norm is below a tenth of the mean counts as that large."""
    def run(attention, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        if isinstance(bias, torch.Tensor):
            leaves.append(bias.detach().to(torch.promote_types(dtype, bias.dtype)).requires_grad_())
        out = attention(*leaves[:3], *(leaves[3:] or [bias]), **options)
        return out, *torch.autograd.grad(out, leaves, do.to(dtype))
    found = {}
    for name, x, exact in zip(("out", "dq", "dk", "dv", "db"), run(sigmoid_attention, q.dtype),
                              run(sigmoid_attention_reference, torch.float64)):
        norm = exact.norm(dim=-1)
        found[name] = ((x - exact).norm(dim=-1) / norm.clamp(min=norm.mean() / 10 + 1e-300)).max().item()
    return found


@triton.jit
def weights_kernel(X, P, k_len, N: tl.constexpr, MASK: tl.constexpr, GRAD: tl.constexpr, EXACT: tl.constexpr):
    i = tl.arange(0, N)
    p, z = flashsigmoid.weights(tl.load(X + i), i, i, k_len, 1.0, 0.0, None, False, MASK, GRAD, EXACT)
    tl.store(P + i, p if GRAD else flashsigmoid.narrow(p, tl.float32))


class FlashSigmoid(Case):
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
                       layout=[*LAYOUTS], bias=[0, 1], causal=[0, 1], alibi=[0, 1], k_lens=[None, (0, 1), (0.1, 0.6)],
                       tier=[flashsigmoid.hopper_tier, lambda *_: None])  # the portable kernels on Hopper, too
        draw = random.Random(9)  # of which 80 cases hold every pair of values of two options (on the CPU)
        for case in ({name: draw.choice(values) for name, values in options.items()} for _ in range(80)):
            dtype, Tq, Tk, D, (H, Hk), layout, bias, causal, alibi, k_lens, tier = case.values()
            q, k, v, do = (LAYOUTS[layout](normal(2, heads, T, D, dtype=dtype))
                           for heads, T in ((H, Tq), (Hk, Tk), (Hk, Tk), (H, Tq)))
            if bias:  # db is a sum over all pairs, which would cancel
                v, do = v.add_(1), do.add_(1)
            bias = torch.linspace(-9, 6, H, device=DEVICE) if bias else None
            slopes = torch.linspace(0.3, 1, H, device=DEVICE) / max(Tq, Tk) if alibi else None  # no underflow in fp16
            k_lens = k_lens and torch.tensor([int(part * Tk) for part in k_lens], device=DEVICE)
            with self.subTest(**case), mock.patch.multiple(flashsigmoid, hopper_tier=tier, FEW=0):
                errors = row_errors(q, k, v, 16 * do, bias, is_causal=causal, alibi_slopes=slopes, k_lens=k_lens)
                self.assertTrue(all(error < TOLERANCE[dtype] for error in errors.values()), errors)

    @unittest.skipUnless(flashsigmoid.KERNEL_DEVICES, "no Triton on this platform")
    def test_weights(self):
        x = torch.linspace(-128, 80, 4096, device=DEVICE)
        x[:4] = torch.tensor([-math.inf, -1e4, math.inf, math.nan])
        for GRAD, (EXACT, tolerance) in product((False, True), ((False, 1.2e-4), (True, 1e-5))):
            p, masked = torch.full((2, 4096), -1.0, device=DEVICE)
            weights_kernel[(1,)](x, p, 4096, 4096, False, GRAD, EXACT)
            weights_kernel[(1,)](x, masked, 2048, 4096, True, GRAD, EXACT)
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
        q, do, k, v = (normal(2, heads, 9, 16) for heads in (4, 4, 2, 2))
        tensors = normal(4), normal(4), torch.tensor([3, 9], device=DEVICE, dtype=torch.int32)
        for optional in ((None, None, None), tensors):
            inputs = q, k, v, *optional, -2.0, 0.25, True
            torch.library.opcheck(torch.ops.flashsigmoid.forward.default, inputs)
            torch.library.opcheck(torch.ops.flashsigmoid.backward.default, (do, *inputs))
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
        types = (("q", None, "q is None"), ("q", x.double(), "q is torch.float64"))
        values = (("q", x[0], "q is.*T, D"), ("q", x.mT.contiguous().mT, "q is.*stride"), ("q", x[..., :8], "D is 8"),
                  ("k", x[:, :, :0], "k is.*empty"), ("k", x[:, :3], "k is.*divisor"), ("v", x[:1], "v is.*alike"),
                  ("k", x.half(), "k is torch.float16.*float32"), ("k", x.to("meta"), "k is.*on meta"),
                  ("scale", nan, "scale is nan"), ("scale", one[0], "scale is torch.float32"),
                  ("bias", nan, "bias is nan"), ("bias", one[:3], "bias is.*tensor .4,"),
                  ("k_lens", one.int(), "k_lens is.*tensor .2,"), ("k_lens", one[:2], "k_lens is.*int"),
                  ("k_lens", 3, "k_lens is 3"),
                  ("alibi_slopes", torch.nn.Parameter(one), "alibi_slopes is.*requires_grad"))
        for error, table in ((TypeError, types), (ValueError, values)):
            for argument, value, words in table:
                with self.subTest(words), self.assertRaisesRegex(error, words):
                    sigmoid_attention(**(dict(q=x, k=x, v=x) | {argument: value}))

    def test_import_is_silent_and_needs_no_triton(self):
        for code in ("import flashsigmoid, torch\nassert not torch.cuda.is_initialized()",
                     "import sys\nsys.modules['triton'] = None\nimport flashsigmoid as f, torch\n"
                     "assert f.sigmoid_attention(*torch.ones(3, 1, 1, 2, 16), bias=0, scale=0).eq(1).all()"):
            printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
            self.assertEqual(printed, "")


# -------- sigmoid_gpt.py and data/text.py

TINY = "--device cpu --layers 2 --channels 32 --heads 2 --context 16 --batch 8 --dropout 0.1 --data".split()
TINY += [argparse.__file__]  # a text that our edits do not change


def run(main, *flags):
    """(what main returns or its exit status, what it printed); on the CPU, kernels are left to their own tests."""
    out, handler = io.StringIO(), signal.getsignal(signal.SIGINT)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), \
            mock.patch.object(flashsigmoid, "KERNEL_DEVICES", ("cuda",)):
        try:
            result = main([str(flag) for flag in flags])
        except SystemExit as exit:
            result = exit.code
    signal.signal(signal.SIGINT, handler)  # an interrupted run leaves its own, as its process ends with it
    return result, out.getvalue()


class SigmoidGPT(Case):
    def train(self, *flags, out=None):
        return run(sigmoid_gpt.main, *TINY, "--out_dir", out or self.out, *flags)

    def state(self, out=""):
        return torch.load(self.out / out / "checkpoint.pt", weights_only=True)

    def test_learns(self):
        result, printed = self.train("--steps", 240, "--eval_interval", 80)
        for key in ("val_loss", "repeat_loss", "repeat_loss_beyond"):
            self.assertLess(result[key], 2.7, key)  # at random 5.5, the frequencies of the bytes alone 2.9
        self.assertIn("val_loss", printed)
        self.assertEqual([[*x][:3] for x in sigmoid_gpt.history(self.out)], [[80, 160, 240], [0, 10, 20]])
        _, text = run(sigmoid_gpt.main, "--sample", "--prompt", "def ", "--out_dir", self.out, "--device", "cpu")
        self.assertTrue(text.startswith("def ") and len(text) > 400)

    def test_resume_and_seed(self):
        """Stopped after ten steps and resumed, a run ends with the same bits; another seed with others."""
        save = sigmoid_gpt.save_checkpoint
        with mock.patch.object(sigmoid_gpt, "save_checkpoint", lambda *x: save(*x) or sys.exit(9)):
            self.assertEqual(self.train("--steps", 20, "--eval_interval", 10)[0], 9)
        self.train("--steps", 20, "--eval_interval", 10, "--resume")
        for name, seed in (("whole", 1337), ("other", 1)):
            self.train("--steps", 20, "--eval_interval", 10, "--seed", seed, out=self.out / name)
        resumed, whole, other = (self.state(out)["model"] for out in ("", "whole", "other"))
        self.assertTrue(all(resumed[key].equal(whole[key]) for key in whole))
        self.assertFalse(resumed["head.weight"].equal(other["head.weight"]))
        status, printed = self.train(*"--resume --pos rope --layers 3 --seed 2 --data".split(), ROOT / "byov.py")
        self.assertEqual((status, printed.count("there")), (2, 4), printed)
        self.assertRegex(printed, r"dataset \S+argparse.py \([\d,]+ bytes\) there, \S+byov.py \([\d,]+ bytes\) here")

    def test_interrupt_and_kill(self):
        """Ctrl-C ends the step, saves and exits with 130; a write that is cut short leaves the old checkpoint."""
        command = [sys.executable, "-u", "sigmoid_gpt.py", *TINY, "--out_dir", str(self.out)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        printed = process.stdout.readline()
        process.send_signal(signal.SIGINT)  # before the first step
        printed += process.communicate(timeout=120)[0]
        self.assertTrue(process.returncode == 130 and "interrupted" in printed and "Traceback" not in printed, printed)
        with mock.patch("torch.nn.utils.clip_grad_norm_", lambda *_: signal.raise_signal(signal.SIGINT)):
            status, printed = self.train("--steps", 100)
        self.assertTrue(status == 130 and re.search("interrupted at step 1; .* is saved, --resume", printed), printed)
        step = self.state()["step"]
        with mock.patch("torch.save", lambda state, path: path.write_bytes(b"half") and sys.exit(9)):
            self.assertEqual(self.train("--resume", "--steps", step + 1)[0], 9)
        self.assertEqual(self.state()["step"], step)

    def test_every_choice(self):
        """Each option learns, and what it makes of a byte does not depend on later ones."""
        text = torch.randint(256, (2, 16))
        for flags in ("--pos alibi", "--pos rope", "--pos learned", "--pos none", "--norm pre", "--no-qk_norm",
                      "--attn softmax", "--attn softmax --pos rope", "--attn_bias 0 --heads 1"):
            with self.subTest(flags), mock.patch.object(flashsigmoid, "KERNEL_DEVICES", ("cuda",)):
                model = sigmoid_gpt.GPT(sigmoid_gpt.parse(TINY + flags.split())).eval()
                torch.testing.assert_close(model.logits(text[:, :7]), model.logits(text)[:, :7], atol=1e-5, rtol=0)
                model(text).mean().backward()
                self.assertTrue(all(parameter.grad.any() for parameter in model.parameters()))

    def test_kernels_train(self):
        """Through the Triton kernels, interpreted where there is no GPU, gradients are those of the reference."""
        found = []
        for devices in (("cuda",), flashsigmoid.KERNEL_DEVICES):
            with mock.patch.object(flashsigmoid, "KERNEL_DEVICES", devices):
                torch.manual_seed(0)
                model = sigmoid_gpt.GPT(sigmoid_gpt.parse(TINY + ["--dropout", "0"])).to(DEVICE)
                model(torch.arange(34, device=DEVICE).view(2, 17)).mean().backward()
                found.append(model.blocks[0].attn.qkv.weight.grad)
        torch.testing.assert_close(*found, atol=1e-6, rtol=1e-3)

    def test_compare(self):
        flags = ["--compare", "--steps", 5, "--pos", "none", *self.plot]
        with mock.patch.object(sigmoid_gpt, "save_checkpoint") as save:  # what has ended is read without a checkpoint
            self.train(*flags)
            result, printed = self.train(*flags, "--seeds", 2, "--resume")
        self.assertEqual(save.call_count, 6)  # three of the second command's six runs were there
        softmax, sigmoid, without = result["rows"]
        self.assertEqual((softmax["name"], softmax["seeds"], softmax["val_loss_std"] > 0), ("softmax", 2, True))
        self.assertGreater(without["attention_rms_init"], 3 * sigmoid["attention_rms_init"])  # the paper's explanation
        self.assertEqual(json.loads((self.out / "metrics.json").read_text())["rows"], result["rows"])
        self.assertTrue(not self.plot or (self.out / "x.png").stat().st_size > 5000)
        self.assertIn(f"| softmax | {softmax['val_loss']:.3f} ± {softmax['val_loss_std']:.3f} |", printed)
        single = json.loads((self.out / "softmax_seed_1337" / "metrics.json").read_text())
        self.assertIn("| pos | attention |", sigmoid_gpt.table([softmax, single | dict(pos="rope")]))
        self.assertRegex(self.train(*flags, "--resume", "--lr", 1)[1], "softmax_seed_1337.* lr 0.003 there, 1.0 here")

    def test_two_processes(self):
        """torchrun with two processes takes the batches, and finds the loss, of one."""
        flags = [*TINY, "--steps", "10", "--dropout", "0", "--out_dir", str(self.out)]
        torchrun = "-m torch.distributed.run --standalone --local_addr localhost --nproc_per_node 2 sigmoid_gpt.py"
        done = subprocess.run([sys.executable, *torchrun.split(), *flags], cwd=ROOT, text=True, capture_output=True,
                              timeout=200, env=os.environ | {"TRITON_INTERPRET": "0"})
        self.assertEqual(done.returncode, 0, done.stderr)
        two, one = json.loads((self.out / "metrics.json").read_text()), run(sigmoid_gpt.main, *flags)[0]
        self.assertLess(abs(one["val_loss"] - two["val_loss"]) + abs(one["train_loss"] - two["train_loss"]), 1e-4)

    def test_bad_input(self):
        for name, content in (("empty.txt", b""), ("binary.bin", b"a\0b" * 99), ("short.txt", b"too short")):
            (self.out / name).write_bytes(content)
        for flags, words in (
                ("--context 0", "--context 0; allowed: 2"), ("--dropout nan", "--dropout nan; allowed: 0"),
                ("--attn x", "--attn.*'x'"), ("--heads 3", "--heads 3.*allowed"), ("--nonsense", "--nonsense"),
                ("--device tpu", "--device.*'tpu'"), ("--resume", "checkpoint.pt"), ("--sample", "checkpoint.pt"),
                ("--plot nowhere/x.png", "--plot nowhere/x.png"), ("--data nowhere", "nowhere: no such file"),
                (f"--data {self.out}/empty.txt", "empty"), (f"--data {self.out}/binary.bin", "binary.bin.*NUL"),
                (f"--data {self.out}/short.txt", r"short.txt \(9 bytes\); allowed: 1,600")):
            with self.subTest(flags):
                status, printed = self.train(*flags.split())
                self.assertEqual(status, 2)
                self.assertRegex(printed, f"ERROR: .*{words}")
                self.assertLessEqual(len(re.findall("^(?!HINT)", printed, re.M)), 3, printed)
        diverged = self.train("--steps", 30, "--lr", 1e30, "--warmup", 0, "--no-qk_norm", "--norm", "pre")
        self.assertRegex("{} {}".format(*diverged), "(?s)^1 .*ERROR: loss (nan|inf) at step 9, learning rate")

    def test_alibi_slopes(self):
        twelve = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625, 0.7071, 0.3536, 0.1768, 0.0884]
        torch.testing.assert_close(sigmoid_gpt.alibi_slopes(12), torch.tensor(twelve), atol=1e-4, rtol=0)


class TextData(Case):
    def setUp(self):
        super().setUp()
        for module in (download, data.text):
            mock.patch.object(module, "CACHE", self.out / "cache").start()

    def test_download_and_cache(self):
        source, content = self.out / "source.txt", b"to be or not to be"
        source.write_bytes(content)
        arguments = "x/y.txt", source.as_uri(), download.checksum(content)
        for _ in range(2):  # the second time without the source: from the cache
            self.assertEqual(download.cached(*arguments), content)
            source.unlink(missing_ok=True)
        (self.out / "cache/x/y.txt").write_bytes(content[:-1])
        with self.assertRaisesRegex(ValueError, f"y.txt: sha256 [0-9a-f]+, expected {arguments[2]}"):
            download.cached(*arguments)
        source.write_bytes(b"something else")
        self.assertRaises(ValueError, download.cached, "x/z.txt", *arguments[1:])
        self.assertEqual([path.name for path in (self.out / "cache/x").iterdir()], ["y.txt"])  # nothing bad was kept

    def test_offline(self):
        offline = mock.patch("urllib.request.urlopen", side_effect=urllib.error.URLError("no network"))
        with offline, contextlib.redirect_stdout(io.StringIO()) as out:
            tokens, name = data.text.load_text()
            self.assertRaisesRegex(OSError, "HINT: put it at", data.text.load_text, ["shakespeare"])
        self.assertRegex(name, r"^python 3[\d.]+ \([\d,]+ bytes\)$")
        self.assertTrue(out.getvalue().count("\n") == 1 and len(tokens) > 3_000_000 and tokens.dtype == torch.uint8)

    def test_own_files(self):
        for name, content in (("a.txt", "ä"), ("b/c.txt", "c"), (".hidden", "h"), (".git/x", "x"), ("d.bin", "\0")):
            (self.out / "own" / name).parent.mkdir(parents=True, exist_ok=True)
            (self.out / "own" / name).write_text(content)
        tokens, _ = data.text.load_text([str(self.out / "own"), str(self.out / "own/a.txt")])
        self.assertEqual(bytes(tokens.tolist()).decode(), "ä\nc\nä")


# -------- hier_iwae.py, data/mnist.py and data/glyphs.py

def linear(q, r, log_joint):
    """A model of one dimension: z0 ~ N(0, 1), q_j = N(a_j + b_j z0, s_j), r_j = N(c_j + d_j z_j, t_j); rows a, b, s."""
    def gaussian(rows):
        a, b, s = torch.tensor(rows, dtype=torch.float64)[..., None]                        # each (L, 1)
        return lambda x, c: (a + b * F.pad(x, (0, 1 - x.shape[-1]))[:, :, None], s.expand(len(x), x.shape[1], -1, 1))
    return argparse.Namespace(encoder=lambda x: x, q0=gaussian([[0], [0], [1]]), q=gaussian(q), r=gaussian(r),
                              log_joint=lambda x, z: log_joint(z))


def weights(model, N, k, arm):
    proposal, weights = arm.split()
    args = argparse.Namespace(k=[k], proposal=proposal, weights=weights, grad="plain")
    return hier_iwae.log_weights(model, torch.ones(N, 1, dtype=torch.float64), args)


class HierIWAE(Case):
    def train(self, flags, out=""):
        return run(hier_iwae.main, *"--device cpu --nll_samples 3000 --out_dir".split(), self.out / out, *flags.split())

    def test_bound(self):  # x = 1.3, p(x) = N(0, 5/4): valid weights are unbiased, known gaps; with own r_j some not
        q, shared = [[0.4, 1, 1.6], [0.5, -0.4, 0.2], [0.5, 0.6, 0.45]], [[0.1], [0.2], [0.9]]
        own, log_p = [[-0.5, 0.3, 1], [0.5, -0.4, 0.2], [0.9] * 3], -1.69 / 2.5 - 0.5 * math.log(2.5 * math.pi)
        log_joint = lambda z: (-2 * (1.3 - z) ** 2 - z * z / 2).sum(-1) - math.log(math.pi)
        for arm, r, gap in (("joint uniform", shared, 0.367), ("joint uniform", own, 0.461),
                            ("joint balance", shared, 0.1725), ("independent balance", shared, 0.1297),
                            ("joint power", shared, 0.1968), ("joint balance", own, None), ("joint power", own, None)):
            log_w, _, loss = weights(linear(q, r, log_joint), 200_000, 3, arm)
            p_hat = (log_w - log_p).exp().mean(1)
            score = (p_hat.mean() - 1) / p_hat.std() * len(p_hat) ** 0.5
            self.assertTrue(abs(score) < 3.5 and abs(loss + log_p - gap) < 0.01 if gap else score < -30, (arm, score))

    def test_reductions(self):
        """Equal q_j that ignore z0, r = q0: the weights of IWAE. k = 1 and r(z0 | z) = q(z0 | z): those of q(z)."""
        for arm, k, r, std in (*((f"joint {name}", 3, [[0], [0], [1]], 0.8) for name in hier_iwae.POWERS),
                               ("joint uniform", 1, [[-0.18], [0.6], [0.8]], 1)):  # q(z) = N(0.3, 1)
            q = [[0.3] * k, [0.6 * (k == 1)] * k, [0.8] * k]
            log_w, (_, z), _ = weights(linear(q, r, lambda z: (-0.5 * z * z).sum(-1)), 99, k, arm)
            expected = 0.5 * ((z - 0.3) / std) ** 2 + math.log(std) + 0.5 * math.log(2 * math.pi) - 0.5 * z * z
            torch.testing.assert_close(log_w, expected[..., 0], atol=1e-10, rtol=0)

    def test_coupling(self):
        """Weights with the same marginal laws, z0 shared with opposite or the same slopes (values of 4e6 draws)."""
        log_prior = lambda z: torch.distributions.Normal(0.5, 0.8).log_prob(z).sum(-1)
        for sign, known in ((-1, (-0.0619, -0.194, 0.1286, 0.0769)), (1, (0.0630, 0.198, 0.1909, 0.1518))):
            model = linear([[0, 0], [0.6, 0.6 * sign], [0.9] * 2], [[0, 0], [0.5, 0.5 * sign], [0.9] * 2], log_prior)
            log_w, _, _ = weights(model, 400_000, 2, "joint uniform")
            found, p_hat = hier_iwae.statistics(log_w[None]), log_w.exp().mean(1)
            variance = found["variance_part"] + found["covariance_part"]
            self.assertAlmostEqual(variance, (p_hat / p_hat.mean()).var().item(), places=9)
            values = torch.tensor([2 * found["covariance_part"], found["correlation"], variance, -found["bound"]])
            torch.testing.assert_close(values, torch.tensor(known), atol=0.006, rtol=0)

    def test_gradients(self):  # squared z-scores of dreg against plain: the same mean where it is allowed, else another
        for arm, exact in (("joint", 1), ("gaussian --target loggamma", 1), ("iid", 0), ("joint --weights balance", 0)):
            torch.manual_seed(2)
            args, found = hier_iwae.parse(f"--device cpu --task density --proposal {arm}".split()), []
            model = hier_iwae.HIWAE(args)
            w = [w for net in (model.q0, model.q) for w in net.parameters() if w.numel()]
            for args.grad in ("plain", "dreg"):
                losses = (hier_iwae.log_weights(model, torch.ones(2000, 0), args)[2] for _ in range(80))
                found.append(torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(x, w)]) for x in losses]))
            (a, s), (b, t) = ((x.mean(0), x.var(0)) for x in found)
            score = ((a - b) ** 2 * 80 / (s + t + 1e-12)).mean()
            self.assertTrue(score < 2 if exact else score > 3, (arm, score))

    def test_runs(self):  # stopped, killed, resumed is whole; joint beats IWAE; a decoder learns; wrong flags are named
        flags, clip = "--target loggamma --steps 40", torch.nn.utils.clip_grad_norm_
        with mock.patch("torch.nn.utils.clip_grad_norm_", lambda *x: signal.raise_signal(signal.SIGINT) or clip(*x)):
            status, printed = self.train(flags)
        self.assertTrue(status == 130 and "\nERROR: interrupted" in printed and "Traceback" not in printed, printed)
        with mock.patch.object(hier_iwae, "evaluate", mock.Mock(side_effect=[*[dict(bound=0.0)] * 7, SystemExit(9)])):
            self.assertEqual(self.train(flags + " --resume")[0], 9)
        resumed, whole = (self.train(*how)[0] for how in ((flags + " --resume",), (flags, "whole")))
        self.assertEqual(resumed["bound"], whole["bound"])
        flags = "--compare gaussian joint:balance --steps 150 --lr 0.01"
        result, printed = self.train(flags, "compare")
        self.assertTrue(result["rows"][1]["gap"] < 0.8 * result["rows"][0]["gap"] and "| joint:balance, k" in printed)
        with mock.patch.object(hier_iwae, "log_weights", None):  # all is there
            self.assertEqual(self.train(flags + " --resume", "compare")[0], result)
        flags = "--task images --data glyphs --k 2 --batch 8 --steps 60 --lr 0.003 --nll_samples 8 --test_images 100"
        images, _ = self.train(flags, "images")
        self.assertTrue(-260 < images["bound"] <= -images["nll"], images)  # it starts at -550
        z = lambda x: x[:, :1, None] * torch.tensor([0, 0.05, 0.2, 1]) + torch.randn(len(x), 2, 4)
        with mock.patch.object(hier_iwae, "log_weights", lambda _, x, args: (x, (None, z(x)))):  # two active units
            found = hier_iwae.evaluate(mock.Mock(target=None), torch.randn(400, 2), hier_iwae.parse(["--k", "2"]), 40)
        self.assertEqual(found["active_units"], 2)
        for flags, words in (("--grad dreg --weights power", "--grad dreg; allowed"), ("--k 2 3", "--k 2 3; allowed"),
                             ("--grad dreg --proposal iid", "--grad dreg; allowed"), ("--compare x", "--compare: inv"),
                             ("--resume --target u1 --steps 40", "there, u1 here"), ("--resume --out_dir x", "no ch"),
                             ("--resume --nll_samples 4000", "3000 there, 4000 here")):
            self.assertRegex("{} {}".format(*self.train(flags)), f"(?s)^2 .*ERROR: .*{words}")

    def test_data(self):  # glyphs are drawn by their seed; MNIST arrives whole
        (images, _), again, other = (glyphs.load_glyphs(40, 32, 3, seed) for seed in (1, 1, 2))
        self.assertTrue(images.shape == (40, 3, 32, 32) and images.equal(again[0]) and not images.equal(other[0]))
        self.assertAlmostEqual(densities.log_normaliser(densities.TARGETS["u2"], 2), 3.30983, places=4)
        content, file = bytes(16) + bytes(range(196)) * 8, self.out / "mnist/x.gz"
        file.parent.mkdir()
        patch = mock.patch.multiple(mnist, SHA256={"x": download.checksum(content)})
        with patch, mock.patch.object(download, "CACHE", self.out):
            file.write_bytes(gzip.compress(content))
            self.assertEqual(mnist.idx_images("x")[1].flatten().tolist(), [*range(196)] * 4)
            file.write_bytes(gzip.compress(content)[:-9])
            self.assertRaisesRegex(ValueError, "x.gz: sha256", mnist.idx_images, "x")


# -------- nmn_iterated.py, data/shapes_questions.py and data/shapes_syget.py

class NMNIterated(Case):
    TINY = ("--device cpu --images 2 --width 8 --hidden 16 --batch 16 --generations 2 --interact_steps 4 --lr 0.01 "
            "--eval_interval 2 --generator_steps 4 --engine_steps 4 --transmitted 50 --out_dir").split()

    def test_batches_run_as_one_by_one(self):
        true = questions.question_tensors()["programs"][::6]
        programs = torch.cat([true, torch.randint(13, (40, 8)), 0 * true[:1]])  # most of them ill-formed
        programs = programs.masked_fill((programs == 0).cummax(1).values, 0)
        images = torch.randint(256, (len(programs), 9, 300), dtype=torch.uint8)
        for kind in ("tensor --spectral_norm", "film"):
            engine = nmn_iterated.Engine(nmn_iterated.parse_flags(f"--width 8 --modules {kind}".split()))
            for _ in range(600):  # until the power iterations of the spectral norm stand still
                singly, matrices = [], [conv.matrices() for conv in engine.cells.convs]
            for image, tokens in zip(images, programs.tolist()):
                scene, stack, zero = engine.stem(image[None] / 255.0).flatten(1), [], torch.zeros(1, 72)
                for token in (token for token in reversed(tokens) if token):
                    operands = [stack.pop() if stack and i < (token > 1) + (token == 12) else zero for i in (0, 1)]
                    stack.append(engine.cells(scene, *operands, torch.tensor([token]), matrices))
                singly.append(engine.classifier([zero, *stack][-1].unflatten(1, (9, -1)).amax(1))[0])
            logits, valid = engine(images, programs)
            torch.testing.assert_close(*((x, torch.autograd.grad(x.square().sum(), list(engine.cells.parameters())))
                                         for x in (logits, torch.stack(singly))), atol=1e-5, rtol=1e-4)
        self.assertTrue(valid[:len(true)].all() and not valid[-1] and valid.sum() < len(true) + 10)

    def test_reinforce(self):  # samples estimate the gradient of the expected reward, over all programs of two tokens
        shapes = nmn_iterated.load(args := nmn_iterated.parse_flags([*self.TINY, "x"]), 0, "cpu")
        generator, programs = nmn_iterated.Generator(16), torch.tensor([[0, 0], *product(range(1, 13), range(13))])
        asked, rows = torch.full((157,), 7), torch.full((20_000,), 14)  # image 14 asks question 7
        judge = lambda images, said: (torch.eye(2)[(said[:, 0] + shapes.train[2][14]) % 2], said[:, 0] > 3)
        with mock.patch.object(nmn_iterated, "LENGTH", 2):
            p = nmn_iterated.speak(generator, shapes, asked, programs)[1].exp()
            loss, _ = nmn_iterated.loss_of("interacting", generator, judge, shapes, rows, asked[:0], 0.3, None, args)
        expected = (p * ((programs[:, 0] > 3) & (programs[:, 0] % 2 == 0))).sum()
        exact, sampled = (torch.autograd.grad(x, generator.out.bias)[0] for x in (-expected, loss))
        self.assertTrue(abs(p.sum() - 1) < 1e-5 and (sampled - exact).abs().max() < 0.006 < exact.abs().max() / 5)

    def test_phases_and_resume(self):
        def states(*flags, kill=None):  # {(phase, step): the weights saved there}
            found, save = {}, nmn_iterated.save_checkpoint
            def spy(path, state):
                save(path, state)
                now = {k: torch.cat([x.flatten() for x in agent[0].values()]) for k, agent in state["agents"].items()}
                found[state["number"], state["done"]] = now
                return sys.exit(9) if kill in found else None
            with mock.patch.object(nmn_iterated, "save_checkpoint", spy):
                run(nmn_iterated.main, *self.TINY, self.out, *flags)
            return found
        learning, still, loss = states(), states("--lr", 0), nmn_iterated.loss_of
        for phase, (kind, other) in enumerate((("generator", "engine"), ("engine", "generator")), 1):
            self.assertTrue(learning[phase - 1, 4][other].equal(learning[phase, 4][other]))  # frozen
            self.assertFalse(still[phase - 1, 4][kind].equal(still[phase, 2][kind]))  # new, where nobody learns
        for kill in ((0, 2), (1, 2), (2, 2), "Ctrl-C"):
            press = lambda *x: signal.raise_signal(signal.SIGINT) or loss(*x)
            with mock.patch.object(nmn_iterated, "loss_of", press if kill == "Ctrl-C" else loss):
                self.assertEqual(max(states(kill=kill)), (0, 1) if kill == "Ctrl-C" else kill)
            self.assertTrue(all(x.equal(learning[3, 4][kind]) for kind, x in states("--resume")[3, 4].items()), kill)
        for flags, words in (("--given 136", "136; allowed: 135"), ("--compare --generations 1", "1; allowed: 2 or"),
                             ("--lr nan", "--lr nan; allowed"), ("--resume --width 9", "width 8 there, 9 here"),
                             ("--plot nowhere/x.png", "x.png; allowed"), ("--plot x --true_programs", "not with")):
            status, printed = run(nmn_iterated.main, *self.TINY, self.out, *flags.split())
            self.assertTrue(status == 2 and re.search(f"ERROR: .*{words}", printed), printed)

    def test_compare(self):
        one, two = (run(nmn_iterated.main, *self.TINY, self.out, "--compare", "--eval_interval", 9, *more)[0]["rows"]
                    for more in (self.plot, ("--seeds", 2, "--resume")))  # the second reads seed 0 and trains seed 1
        self.assertEqual(*([row["runs"][key][0] for row in rows for key in nmn_iterated.SCORES] for rows in (one, two)))
        row = type("Row", (dict,), dict(__missing__=lambda *_: 0.4))(name="difference", seeds=4)
        self.assertIn('"step": 8', (self.out / "no_generations_seed_0/log.jsonl").read_text())  # equal interactions
        self.assertIn("+0.400 (-0.236 to +1.036)", nmn_iterated.table([row]))  # 3.182 x 0.4 / 2

    def test_shapes(self):
        scene = torch.tensor([[1, 2], [0, 0], [0, 0], [3, 1], [1, 3]] + [[0, 0]] * 4).view(1, 3, 3, 2)
        for text, answer in (("square above blue", 1), ("square above above red", 0), ("blue left_of red", 1),
                             ("blue right_of red", 0), ("square left_of above triangle", 1), ("blue square", 0)):
            self.assertEqual(questions.execute(questions.program(text.split()), scene).item(), answer, text)
        images, scenes = syget.draw([("red", "red")] * 5000, torch.Generator().manual_seed(1))
        self.assertTrue(syget.decode(images).equal(scenes) and (scenes[..., 0] == 1).flatten(1).any(1).all())
        self.assertAlmostEqual((scenes[..., 1] > 0).float().mean().item(), 0.805, delta=0.006)
        shapes = nmn_iterated.load(nmn_iterated.parse_flags([*self.TINY, "x"]), 0, "cpu")
        for _ in range(20):  # symmetries: the executor finds the same answers
            images, z = nmn_iterated.transform(shapes.train[0], shapes.programs[shapes.train[1]], shapes)
            scenes = syget.decode(images.view(-1, 3, 3, 10, 10, 3).transpose(2, 3).reshape(-1, 30, 30, 3))
            found = [questions.execute([questions.TOKENS[i] for i in one if i], x[None]) for one, x in zip(z, scenes)]
            self.assertTrue(torch.cat(found).long().equal(shapes.train[2]))
        if (download.CACHE / "shapes_syget/val_iid.input.npy").exists():
            self.assertEqual(syget.published("val_iid")[2].sum(), 405)  # 1,080 answers, all of them the executor's
            with mock.patch.object(syget, "decode", lambda x, decode=syget.decode: decode(x.flip(-1))):  # as B, G, R
                self.assertRaisesRegex(ValueError, "val_iid.output: 3[0-9][0-9] answers", syget.published, "val_iid")


# -------- byov.py and what it needs of data/

class BYOV(Case):
    SMALL = "--data glyphs --device cpu --width 4 --batch 16 --steps 4 --eval_interval 2 --samples 3".split()

    def setUp(self):
        super().setUp()
        pair = self.images, self.labels = glyphs.load_glyphs(300, 32, 3)[0], torch.arange(300) % 10
        mock.patch.object(byov, "load_images", lambda _: (dict(train=pair, val=pair, test=pair), "few")).start()

    def test_posterior(self):
        """Closed-form KL against Monte Carlo, and 0 at the prior; local reparameterisation against drawn weights."""
        net = torch.nn.Sequential(torch.nn.Linear(40, 30))
        byov.make_bayesian(net, [0.5])
        q, x = torch.distributions.Normal(net[0].weight, F.softplus(net[0].rho)), torch.randn(1, 40)
        w = q.sample((2000,))
        ratio = (q.log_prob(w) - torch.distributions.Normal(0.0, 0.3).log_prob(w)).sum((1, 2))
        self.assertLess((ratio.mean() - byov.kl_divergence(net, 0.3)).abs(), 3 * ratio.std() / 2000 ** 0.5)
        local = net(x.expand(20_000, 40)) - F.linear(x, net[0].weight, net[0].bias)
        drawn = torch.stack([byov.draw(net, i) or net.eval()(x)[0] for i in range(3000)])
        torch.testing.assert_close(local.mean(0) / drawn.std(0), torch.zeros(30), atol=0.04, rtol=0)
        torch.testing.assert_close(local.std(0) / drawn.std(0), torch.ones(30), atol=0.08, rtol=0)
        net[0].weight.data.zero_()
        net[0].rho.data.fill_(math.log(math.expm1(0.3)))
        self.assertLess(byov.kl_divergence(net, 0.3).abs(), 1e-3)

    def test_byol_step(self):
        """A step of BYOL against it written out: summed losses, SGD, then the average of weights."""
        run(byov.main, *self.SMALL, "--compare", "BYOL", "--steps", 1, "--out_dir", self.out)
        args = byov.parse(self.SMALL)
        torch.manual_seed(args.seed)
        online, target = byov.make_network(args), byov.make_network(args)
        target.load_state_dict(online.state_dict())
        torch.manual_seed(1_000_003 * args.seed)
        batch = torch.randint(300, (16,))
        views = augment.two_views(self.images[batch], args.data)
        byov.loss_terms(online, target, views, None, args)[0].backward()
        self.assertEqual([w for w in target.parameters() if w.grad is not None], [])
        online.zero_grad()
        p, t = online.predictor(online.projector(online.encoder(views))), target.projector(target.encoder(views))
        (4 - 2 * F.cosine_similarity(p[:16], t[16:]) - 2 * F.cosine_similarity(p[16:], t[:16])).mean().backward()
        saved = torch.load(self.out / "BYOL_seed_1337" / "checkpoint.pt", weights_only=True)
        for (name, w), average in zip(online.named_parameters(), target.parameters()):
            new = w - args.lr * (10 if "predictor" in name else 1) * (w.grad + args.weight_decay * (w.dim() > 1) * w)
            both = new, average.lerp(new, 1 - args.tau)
            torch.testing.assert_close((saved["online"][name], saved["target"][name]), both, atol=1e-6, rtol=1e-5)

    def test_vit(self):
        """A block of either attention against it written out; a run with softmax."""
        x, norm = torch.randn(2, 5, 64), torch.nn.RMSNorm(64)
        for attn, weigh in ("softmax", lambda s: s.softmax(-1)), ("sigmoid", lambda s: (s - math.log(5)).sigmoid()):
            block = byov.Block(64, attn)
            q, k, v = (some.view(2, 5, 2, 32).transpose(1, 2) for some in block.qkv(norm(x)).split(64, 2))
            weights = weigh(F.normalize(q, dim=3) @ F.normalize(k, dim=3).mT * 32 ** 0.5)
            y = x + 0.1 * block.out((weights @ v).transpose(1, 2).reshape(2, 5, 64))
            torch.testing.assert_close(block(x), y + 0.1 * block.mlp(norm(y)), atol=1e-5, rtol=1e-4)
        flags = *self.SMALL, *"--encoder vit --attn softmax --steps 1 --samples 1 --out_dir".split(), self.out
        self.assertGreater(run(byov.main, *flags)[0]["knn_acc"], 0)

    def test_metrics(self):
        two, three = torch.tensor([[[0.8, 0.2], [0.6, 0.4], [0.3, 0.7]], [[0.6, 0.4], [0.6, 0.4], [0.3, 0.7]]])
        found = measure(two, torch.tensor([0, 1, 1])) | predictive_std(torch.stack([two, three]))
        right = dict(ece=1.1 / 3, brier=0.98 / 3, linear_acc=2 / 3, nll=-math.log(0.224) / 3, ece_adaptive=1.1 / 3)
        torch.testing.assert_close({key: found[key] for key in right}, right)  # gaps 0.2, 0.6, 0.3; 0.08, 0.72, 0.18
        torch.testing.assert_close(found["std"], torch.tensor([0.02 ** 0.5, 0, 0]))
        self.assertEqual(auroc(torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.1, 0.7])), 0.75)  # 4.5 pairs of 6
        shapes = gaussianity(dict(flat=torch.rand(100_000), bell=torch.randn(100_000)))
        for key, value in dict(flat_ks=0.0572, flat_kurtosis=-1.2, flat_sd=12 ** -0.5, bell_ks=0, bell_qq_r2=1).items():
            self.assertAlmostEqual(shapes[f"predictive_{key}"], value, delta=0.01, msg=key)
        probs = (3 * torch.randn(100_000, 10)).softmax(1)
        labels, hot = torch.multinomial(probs, 1)[:, 0], (2 * probs.log()).softmax(1)  # calibrated, overconfident
        low, high, again = (measure(p, labels)["ece"] for p in (probs, hot, probes.temperature_scale(hot, hot, labels)))
        self.assertTrue(max(low, again) < 0.01 and high > 0.05, (low, high, again))

    def test_images(self):
        factors = torch.tensor([[2.0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1 / 3]])
        colour = augment.jitter(factors, torch.arange(4).expand(4, 4))[:, :3] @ torch.tensor([1, 0, 0, .5, .5, .5])
        torch.testing.assert_close(colour, torch.tensor([[2.0, 0, 0], [0.5] * 3, [0.299] * 3, [0, 1, 0]]))
        rows = augment.resize(torch.tensor([8.0]), torch.tensor([16.0]), 32)[0, 0] @ torch.arange(32.0)
        torch.testing.assert_close(rows, 7.75 + torch.arange(32) / 2)
        grey, clean = torch.full((16, 3, 32, 32), 128, dtype=torch.uint8), self.images.float()
        changed = [(corruptions.corrupt(grey, "salt_and_pepper", i) != 128).float().mean().item() for i in range(1, 6)]
        torch.testing.assert_close(changed, [0.01, 0.02, 0.03, 0.05, 0.07], atol=0.003, rtol=0)
        noise = torch.randint(256, (300, 3, 32, 32), dtype=torch.uint8)
        sharp, blurred = (augment.augment(noise, 1, 0, 0, 0, 0, share).diff().abs().mean() for share in (0.0, 1.0))
        self.assertLess(blurred, 0.6 * sharp)
        for name in corruptions.CORRUPTIONS:
            weak, strong = (F.mse_loss(corruptions.corrupt(self.images, name, i).float(), clean) for i in (1, 5))
            self.assertTrue(0 < weak < strong, name)

    def test_runs(self):
        """Resume to the bit and measured alike; --compare, also resumed; collapse; bad flags; a broken CIFAR-10."""
        rename, grey, flags = Path.replace, torch.ones(8, 4), [*self.SMALL, "--out_dir", self.out]
        with mock.patch.object(Path, "replace", lambda *x: rename(*x) and sys.exit(9)):  # once a checkpoint is there
            self.assertEqual(run(byov.main, *flags)[0], 9)
        self.assertIn("width 4 there, 8 here", run(byov.main, *flags, "--resume", "--width", 8)[1])
        (resumed, _), (whole, _) = (run(byov.main, *flags, *x) for x in (["--resume"], ["--out_dir", self.out / "w"]))
        self.assertEqual(resumed | dict(seconds=0), whole | dict(seconds=0))
        compare = [*flags, "--compare", "--seeds", 2, "--steps", 2]
        result, printed = run(byov.main, *compare, *self.plot)
        names = [row["name"] for row in result["rows"]]
        self.assertEqual((names[4:6], names[-1]), (["supervised BBB", "BYOV - BYOL"], "BYOV less supervised BBB"))
        self.assertIn(byov.table(result["rows"]), printed)
        with mock.patch.object(byov, "loss_terms"):  # nothing is trained twice
            self.assertEqual(run(byov.main, *compare, "--resume")[0], result)
        with mock.patch.object(byov, "loss_terms", lambda net, *_: (net.predictor[3].bias.sum(), 0.0, grey)):
            self.assertRegex(run(byov.main, *flags)[1], "ERROR: .*collapsed")
        for bad, words in (("--steps 0", "--steps 0; allowed: 1"), ("--tau 2", "0 to 1"), ("--data x", "--data.*'x'"),
                           ("--encoder vit --width 6", "multiples of 4"), ("--plot nowhere/x.png", "x.png; allowed")):
            self.assertRegex(run(byov.main, *flags, *bad.split())[1], f"ERROR: .*{words}")
        (self.out / "cifar10").mkdir()
        for name in cifar10.MD5:
            (self.out / "cifar10" / name).write_bytes(b"broken")
        with mock.patch.object(cifar10, "CACHE", self.out):
            self.assertRaisesRegex(ValueError, "data_batch_1.bin: MD5 .*expected 5dd7", cifar10.load_cifar10)


class Repository(unittest.TestCase):
    """README.md, results/README.md, and the files they speak of."""
    README = "".join((ROOT / folder / "README.md").read_text() for folder in ("", "results"))
    RUN = dict(val_loss=3, repeat_loss=3, repeat_loss_beyond=3, attention_rms_init=2)  # columns of the GPT's tables
    TABLES = [  # (script, what of results/ its rows come from)
        (flashsigmoid, "flashsigmoid_h200.json"), (hier_iwae, "hier_iwae_compare_loggamma_cpu.json"),
        (hier_iwae, "hier_iwae_compare_u2_cpu.json"), (hier_iwae, "hier_iwae_compare_mnist_h100.json"),
        (nmn_iterated, "nmn_iterated_compare_cpu.json"), (nmn_iterated, "nmn_iterated_compare_three_cpu.json"),
        (byov, "byov_compare_h100.json", summary.COLUMNS[:2]), (byov, "byov_compare_cpu.json", summary.COLUMNS[:1]),
        (byov, "byov_corruptions_h100.json", summary.COLUMNS[2:3]), (byov, "byov_vit_h100.json", summary.COLUMNS[:2]),
        (sigmoid_gpt, " ".join(f"sigmoid_gpt_compare_{arm}_cpu.json" for arm in ("rope", "no_qk", "alibi")), RUN),
        (sigmoid_gpt, "sigmoid_gpt_compare_h100.json", RUN), (sigmoid_gpt, "sigmoid_gpt_norms_h100.json", RUN),
        (sigmoid_gpt, "sigmoid_gpt_long_h100.json", dict(best_val_loss=3) | RUN),
        (sigmoid_gpt, "sigmoid_gpt_lr_h100.json", RUN), (sigmoid_gpt, "sigmoid_gpt_speed_h100.json", sigmoid_gpt.COST)]

    def test_lines(self):
        budgets = {"flashsigmoid.py": 490, "flashsigmoid_hopper.py": 293, "sigmoid_gpt.py": 420, "byov.py": 459,
                   "nmn_iterated.py": 558, "hier_iwae.py": 418, "test_all.py": 790, "test_hopper.py": 204}
        for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]:
            lines = path.read_text().splitlines()
            with self.subTest(path.name):
                self.assertLessEqual(len(lines), budgets.get(path.name, 90))
                self.assertEqual([line for line in lines if len(line) > 120], [])

    def test_tables(self):
        """Every table of results is what its script makes of the JSON, and every file of results/ is spoken of."""
        for script, names, *columns in self.TABLES:
            found = [json.loads((ROOT / "results" / name).read_text()) for name in names.split()]
            rows = [row for one in found for row in one.get("rows", [one])]
            with self.subTest(names):
                self.assertTrue(script.table(rows, *columns) in self.README, script.table(rows, *columns))
        named = set(re.findall(r"results/(\w+\.\w+)", self.README))
        there = {path.name for path in (ROOT / "results").iterdir()}
        self.assertEqual(named - there, set())
        self.assertEqual({name for name in there - named if "json" in name}, set())

    @unittest.skipUnless(importlib.util.find_spec("matplotlib"), "matplotlib is not there")
    def test_picture(self):
        """The code in results/README.md still draws its pictures."""
        for code in re.findall("```python\n(import json\nfrom pathlib.*?)```", self.README, re.S):
            with mock.patch("matplotlib.figure.Figure.savefig") as savefig:
                exec(code.replace("results/", f"{ROOT}/results/"), {})
            savefig.assert_called()

    def test_commands(self):
        """Every command names a script that is there, and flags that it has."""
        commands = re.findall(r"(?:python|torchrun --nproc_per_node 2) (\w+\.py)([^#`\n]*)", self.README)
        self.assertGreater(len(commands), 20)
        for script, flags in commands:
            for flag in re.findall(r"--[a-z_-]+", flags):
                self.assertIn(f'"{flag.replace("--no-", "--")}"', (ROOT / script).read_text(), f"{script} {flags}")


if __name__ == "__main__":
    unittest.main(warnings="ignore")  # the interpreter overflows in exp2, as the GPU does, and NumPy warns
