"""
Hierarchical importance weighted autoencoder ("Hierarchical Importance Weighted Autoencoders", arXiv 1905.04866).

IWAE draws k samples that know nothing of each other. Here they share a z0, so that they can divide the work:

    z0 ~ q0(z0 | x),   z_j ~ q_j(z_j | z0, x) for j = 1..k,   and a reverse model r_j(z0 | z_j, x) pays for z0
    bound = E log p_hat <= log p(x),   p_hat = mean_j w_j,   w_j = p(x, z_j) r_j(z0 | z_j, x) / (q0(z0 | x) d_j)
    d_j = q_j(z_j) (uniform weights), the mixture (1/k) sum_l q_l(z_j) (balance heuristic), or a power of both

Baselines: --proposal gaussian is IWAE (with --k 1 the VAE), iid draws k pairs (z0, z) from one hierarchy, independent
draws a z0 for each q_j: all stays but the coupling. --grad dreg is the doubly reparameterised gradient, exact for all
of these; official is that of the authors' code, which is biased.

    python hier_iwae.py                        a 2-D density on a CPU, binarised MNIST on a GPU
    python hier_iwae.py --compare --seeds 3    the proposals, then the estimators, at equal k and steps, in one table
    python hier_iwae.py --compare gaussian joint --k 2 5 10 20 --plot growth.png

Differs from the paper's code in steps and batch; in r_j, which differ by output rows, as the q_j do; in its training
weights, which are those of the bound; in a schedule of the learning rate.
"""
import argparse
import importlib.util
import json
import math
import re
import signal
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm
from tqdm import tqdm

from data.densities import TARGETS, log_normaliser
from data.mnist import binarised, load_digits

DEFAULTS = {
    "density": dict(k=[3], latent=2, hidden=64, context=1, batch=64, steps=3000, lr=1e-3, nll_samples=600_000,
                    test_images=10),
    "loggamma": dict(k=[2], latent=1, hidden=0, context=1, batch=1024, steps=4000, lr=2e-2, nll_samples=1_000_000,
                     test_images=10),
    "images": dict(k=[5], latent=32, hidden=100, context=100, batch=128, steps=20_000, lr=1e-3, nll_samples=5000,
                   test_images=10_000),
    "images on cpu": dict(batch=32, steps=400, nll_samples=200, test_images=500),
}
ARMS = {
    "density": "gaussian iid independent joint independent:balance joint:balance joint:power "
               "gaussian:dreg joint:dreg joint:official joint:balance:dreg",
    "images": "gaussian iid independent joint gaussian:dreg joint:dreg",
}
ARCHITECTURE = "task target data binarise proposal weights reverse k hidden".split()
POWERS = dict(uniform=0, balance=1, power=2)


# -------- Model. N images, k samples, J draws of z0 (1 if joint), L proposals (1 if iid), d latent, C context

class Modulated(nn.Module):
    """scale(c) * (W x) + bias(c), the rows of W of length 1: a linear layer that the context c (..., C) turns."""

    def __init__(self, inputs, outputs, C):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.context = nn.Parameter(0.001 * torch.randn(2 * outputs, C))
        self.offset = nn.Parameter((2 * torch.rand(2 * outputs) - 1) / C ** 0.5)

    def forward(self, x, c):
        scale, bias = F.linear(c, self.context, self.offset).chunk(2, -1)
        return scale * F.linear(x, F.normalize(self.weight, dim=1)) + bias


class Conditional(nn.Module):
    """L diagonal Gaussians of `outputs` dimensions given `inputs` and the context; any size may be 0: q0 has no inputs,
    plain IWAE is the hierarchy whose z0 has no dimensions, and without hidden units all is linear."""

    def __init__(self, inputs, outputs, L, args):
        super().__init__()
        hidden, C = args.hidden if outputs else 0, args.context
        self.shape = L, outputs
        self.hidden = Modulated(inputs, hidden, C)
        self.head = Modulated(hidden, 2 * L * outputs, C)
        self.skip = Modulated(inputs, L * outputs, C)

    def forward(self, x, c):
        """x (N, J, inputs), c (N, 1, C) -> mean and standard deviation, each (N, J, L, outputs)."""
        mean, raw = self.head(F.elu(self.hidden(x, c)), c).chunk(2, -1)
        return (mean + self.skip(x, c)).unflatten(-1, self.shape), F.softplus(raw).unflatten(-1, self.shape) + 1e-5


class Residual(nn.Module):
    """second(ELU(first(x))) + skip(x), then ELU if not last; weight-normalised. First and skip are one layer."""

    def __init__(self, layer, inputs, outputs, last=False, **options):
        super().__init__()
        self.first = weight_norm(layer(inputs, 2 * outputs, **options))
        self.second = weight_norm(layer(outputs, outputs))
        self.last = last

    def forward(self, x):
        x, skip = self.first(x).chunk(2, 1)
        x = self.second(F.elu(x)) + skip
        return x if self.last else F.elu(x)


class Upsample(nn.Module):
    """(N, C, n, n) -> (N, C, 2n, 2n), bilinear, as products with a matrix: on a GPU the gradient of F.interpolate adds
    atomically, so that runs would differ in their last bits."""

    def __init__(self, n):
        super().__init__()
        matrix = F.interpolate(torch.eye(n)[None], scale_factor=2, mode="linear")[0]            # (n, 2n)
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, x):
        return ((x @ self.matrix).mT.contiguous() @ self.matrix).mT


class HIWAE(nn.Module):
    """q0, the q_j and r; for images an encoder and a decoder, for densities a target in the place of p(x, z)."""

    def __init__(self, args, autocast=nullcontext()):
        super().__init__()
        k, d, C = args.k[0], args.latent, args.context
        d0 = 0 if args.proposal == "gaussian" else d
        L = k if args.proposal in ("joint", "independent") else 1
        self.q0 = Conditional(0, d0, 1, args)
        self.q = Conditional(d0, d, L, args)
        reverse = args.reverse or ("own" if args.weights == "uniform" else "shared")
        self.r = Conditional(d, d0, L if reverse == "own" else 1, args)
        self.images, self.autocast = args.task == "images", autocast
        if not self.images:
            self.target = TARGETS[args.target]
            self.log_z = log_normaliser(self.target, d)
            return
        conv = partial(nn.Conv2d, kernel_size=3, padding=1)
        self.encoder = nn.Sequential(
            Residual(conv, 1, 16, stride=2), Residual(conv, 16, 16), Residual(conv, 16, 32, stride=2),
            Residual(conv, 32, 32), Residual(conv, 32, 32, stride=2), nn.Flatten(), Residual(nn.Linear, 512, C))
        self.decoder = nn.Sequential(
            Residual(nn.Linear, d, C), Residual(nn.Linear, C, 512), nn.Unflatten(1, (32, 4, 4)), Upsample(4),
            Residual(conv, 32, 32), Residual(conv, 32, 32), nn.ZeroPad2d((0, -1, 0, -1)), Upsample(7),
            Residual(conv, 32, 16), Residual(conv, 16, 16), Upsample(14), Residual(conv, 16, 1, last=True))
        nn.init.constant_(self.decoder[-1].first.bias[1:], -3)  # most pixels are black

    def encode(self, x):
        """x (N, 1, 28, 28), or (N, 0) for a density -> context (N, C)."""
        if not self.images:
            return x.new_ones(len(x), 1)
        with self.autocast:
            return self.encoder(x).float()

    def decode(self, z):
        """z (N, d) -> logits (N, 1, 28, 28)."""
        with self.autocast:
            return self.decoder(z).float()

    def log_likelihood(self, x, z):
        """log p(x | z) of z (N, k, d): (N, k)."""
        if not self.images:
            return z.new_zeros(z.shape[:2])
        logits = self.decode(z.flatten(0, 1)).view(*z.shape[:2], -1)                        # (N, k, 784)
        return (x.flatten(1)[:, None] * logits - F.softplus(logits)).sum(-1)

    def log_prior(self, z):
        return log_normal(z, torch.zeros_like(z), torch.ones_like(z)) if self.images else self.target(z) - self.log_z


# -------- Loss

def log_normal(x, mean, std):
    return (-0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def own(t):
    """Of t (N, J, L, d), where J or L is k or 1, what belongs to sample j: (N, k, d)."""
    return t.flatten(1, 2) if 1 in t.shape[1:3] else t.diagonal(dim1=1, dim2=2).mT


def log_weights(model, x, k, proposal, power, grad="plain"):
    """log w (N, k), z (N, k, d) and a scalar whose gradient is that of -bound, by the estimator grad.

    v_j = w_j / sum_l w_l. plain differentiates log sum_j w_j. dreg drops the scores of q0 and q_j and scales what goes
    through the samples. With theta_l = (mean, std) of q_l and d_j ~ q_j^(1-p) / sum_l q_l^p the score of q is
    v_j sum_l a_jl dlog q_l(z_j), a_jl = (1-p) [j=l] + p rho_jl, rho_j = softmax_l p log q_l(z_j). A z_j of q_j is one
    of q_l at another noise (Bauer and Mnih, arXiv 2101.11046), so E v_j a_jl dlog q_l(z_j)/dtheta_l =
    E (d/dz (v_j a_jl) + v_j a_jl d/dz log (q_j/q_l)) dz_jl/dtheta_l. With p = 0 there remains v_j^2 dlog w_j/dz.
    """
    N, p, hooked = len(x), power, []

    def scaled(t):  # the same numbers (N, k, ..), but v_j multiplies the gradient
        hooked.append(t.expand(N, k, -1))
        return hooked[-1]

    def needed(pair):  # a mixture asks for all L proposals at each sample, otherwise each one for its own
        return pair if p else [own(t)[:, :, None] for t in pair]

    c = model.encode(x)[:, None]                                                            # (N, 1, C)
    m0, s0 = (own(t) for t in model.q0(c[..., :0], c))                                      # (N, 1, d0)
    z0 = m0 + s0 * torch.randn(N, 1 if proposal == "joint" else k, m0.shape[-1], device=c.device, dtype=c.dtype)
    alone = grad == "dreg" and proposal != "joint"  # then (z0_j, z_j) is a sample of its own, with a score in q0, too
    mean, std = needed(model.q(z0.detach() if alone else z0, c))                            # (N, J or k, L or 1, d)
    noise = torch.randn(N, k, mean.shape[-1], device=c.device, dtype=c.dtype)
    z = own(mean) + own(std) * noise                                                        # (N, k, d)
    mean_q, std_q, context, L = mean, std, c, mean.shape[2]
    mine = c.new_ones(k, 1) if L == 1 else torch.eye(k, device=c.device)       # (k, L), [j = l]
    if grad == "official":
        mean_q, std_q = mean.detach(), std.detach()
        z, z0, m0, s0, context = map(scaled, (z, z0, m0, s0, c))
    if grad == "dreg":
        m0, s0, mean_q, std_q = m0.detach(), s0.detach(), mean.detach(), std.detach()
        noise_l = ((z[:, :, None] - mean) / std).detach()                                   # (N, k, L, d)
        paths = mean + std * noise_l                                                        # all are z_j
        paths_v = paths.view_as(paths)
        if alone:  # z0_j moves the weight as it does in plain, only v_j times as much
            z0, fixed = scaled(z0), {name: w.detach() for name, w in model.q.named_parameters()}
            mean_q, std_q = needed(functional_call(model.q, fixed, (z0, c.detach())))
        z = own(mean_q) + own(std_q) * noise + (paths_v - paths_v.detach()).sum(2)
    log_q = log_normal(z[:, :, None], mean_q, std_q)                                        # (N, k, L)
    log_d = (1 - p) * (log_q * mine).sum(2) + (p * log_q).logsumexp(2) - math.log(L)
    log_r = log_normal(z0, *(own(t) for t in model.r(z, context)))
    log_w = model.log_likelihood(x, z) + model.log_prior(z) + log_r - log_normal(z0, m0, s0) - log_d
    if grad == "plain":
        return log_w, z, math.log(k) - log_w.logsumexp(1).mean()
    v = log_w.softmax(1).detach()
    for t in hooked:
        if t.requires_grad:
            t.register_hook(lambda g: g * v[..., None])
    surrogate = (v * log_w).sum(1)
    if grad == "dreg":
        rho, score = (p * log_q).softmax(2).detach(), -noise_l / std.detach()               # score: d log q_l / dz
        rho, a = rho[..., None], ((1 - p) * mine + p * rho)[..., None]                      # (N, k, L, 1)
        factor = mine[..., None] - a * (1 - v[..., None, None])
        paths_v.register_hook(lambda g: g * factor)
        rest = p * p * rho * (score - (rho * score).sum(2, True)) + a * ((mine[..., None] * score).sum(2, True) - score)
        surrogate = surrogate - (v[..., None, None] * rest * paths).sum((1, 2, 3))
    return log_w, z, -surrogate.mean()


# -------- Evaluation

def statistics(log_w):
    """Of log_w (N, R, k), R draws of k weights for each of N images: a dict of means over the images.

    Var(p_hat / p) = variance_part + covariance_part, the sums over i = j and i != j of Cov(w_i, w_j) / (k p)^2.
    NAME_se is the standard error of the draws, from ten blocks of them."""
    log_w = log_w.double()
    N, R, k = log_w.shape
    log_p = log_w.flatten(1).logsumexp(1) - math.log(R * k)                                 # (N,)

    def moments(log_w):
        log_p_hat = log_w.logsumexp(2) - math.log(k)                                        # (N, R)
        w = (log_w - log_p[:, None, None]).exp() / k
        w = w - w.mean(1, keepdim=True)
        covariance = w.mT @ w / (w.shape[1] - 1)                                            # (N, k, k)
        variance = covariance.diagonal(dim1=1, dim2=2)                                      # (N, k)
        std, correlations = variance.sqrt().clamp(min=1e-30), max(1, k * (k - 1))
        return dict(bound=log_p_hat.mean(), var_log_p_hat=log_p_hat.var(1).mean(), variance_part=variance.sum(1).mean(),
                    covariance_part=(covariance.sum((1, 2)) - variance.sum(1)).mean(),
                    correlation=(covariance / std[:, :, None] / std[:, None]).sum((1, 2)).sub(k).mean() / correlations)

    blocks = [moments(block) for block in log_w.tensor_split(min(10, R // 2), 1)]
    v, found = log_w.softmax(2), moments(log_w)
    found |= {f"{name}_se": torch.stack([block[name] for block in blocks]).std() / len(blocks) ** 0.5 for name in found}
    found |= dict(nll=-log_p.mean(), ess=(1 / v.square().sum(2)).mean(), largest_weight=v.amax(2).mean())
    return {name: value.item() for name, value in found.items()}


@torch.no_grad()
def evaluate(model, x, args, samples):
    """Metrics from `samples` importance samples for each of x (N, ...), always the same noise; a density has one x."""
    torch.manual_seed(0)
    k, rows = args.k[0], max(1, (500 if model.images and not x.is_cuda else 20_000) // args.k[0])
    x = x if model.images else x.new_zeros(min(rows, samples // k), 0)
    log_w, means = [], []
    for _ in range(max(4, samples // k // (1 if model.images else len(x)))):
        parts = [log_weights(model, part, k, args.proposal, POWERS[args.weights]) for part in x.split(rows)]
        log_w.append(torch.cat([part[0] for part in parts]))
        means.append(torch.cat([part[1].mean(1) for part in parts]))                        # (N, d)
    log_w = torch.stack(log_w, 1)                                                           # (N, R, k)
    if model.images:
        return statistics(log_w) | dict(active_units=(sum(means) / len(means)).var(0).gt(0.01).sum().item())
    found = statistics(log_w.view(1, -1, k))
    if args.target == "loggamma" and args.proposal != "gaussian":
        up, down = (model.q(x.new_full((1, 1, 1), z0), x.new_ones(1, 1, 1))[0].flatten() for z0 in (1, -1))
        found |= dict(least_slope=(up - down).min().item() / 2, largest_slope=(up - down).max().item() / 2)
    return found | dict(gap=-found["bound"])


# -------- Training

def save_checkpoint(path, state):
    """Write another file, then rename it: a kill in between leaves the old checkpoint whole."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def load_checkpoint(path, device, args):
    if not path.exists():
        fail(f"--out_dir {path.parent} holds no {path.name}\nHINT: train first, without --resume")
    state = torch.load(path, map_location=device, weights_only=True)
    differing = [f"{name} {state['args'][name]} there, {getattr(args, name)} here" for name in ARCHITECTURE
                 if state["args"][name] != getattr(args, name)]
    if differing:
        fail(f"--resume: {path} is another architecture: {'; '.join(differing)}")
    return state


def train(args, data, device, out_dir):
    """Train on data, (train, validation, test) images, or None for a density; writes checkpoint.pt and log.jsonl.

    Returns (model, metrics, curves); curves holds (step, bound, var_log_p_hat). Ctrl-C saves and exits."""
    began, cuda = time.time(), device.type == "cuda"
    bf16 = cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    torch.manual_seed(args.seed)
    model = HIWAE(args, torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(args.lr, device=device), capturable=cuda,
                                 fused=device.type != "mps")
    first, curves = 0, []
    if args.resume:
        state = load_checkpoint(out_dir / "checkpoint.pt", device, args)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, curves = state["step"], state["curves"]
        if first >= args.steps:
            fail(f"--resume: {out_dir} is at step {first}; allowed: --steps above that")
    out_dir.mkdir(parents=True, exist_ok=True)
    log = open(out_dir / "log.jsonl", "a" if args.resume else "w", buffering=1)
    log.write(json.dumps(dict(config=vars(args), device=str(device), torch=torch.__version__)) + "\n")
    images, val, test = data or [torch.zeros(args.batch, 0, device=device)] * 3
    bound = torch.zeros((), device=device)

    def update():
        x = images[torch.randint(len(images), (args.batch,), device=device)]
        if x.dtype == torch.uint8:  # dynamic binarisation: a draw at every use
            x = (torch.rand(x.shape, device=device) < x / 255).float()
        log_w, _, loss = log_weights(model, x, args.k[0], args.proposal, POWERS[args.weights], args.grad)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        bound.copy_(log_w.detach().logsumexp(1).mean() - math.log(args.k[0]))

    stop, step_once = [], update  # Ctrl-C lets the step in progress end; a second one does not wait
    previous = signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if stop else stop.append(True))
    seconds, counted, tick = 0.0, 0, None  # the clock leaves out recording and evaluation
    if cuda:
        torch.cuda.set_stream(torch.cuda.Stream(device))  # a graph can be recorded on any stream but the first
    bar = tqdm(total=args.steps, initial=first, desc=out_dir.name, mininterval=1)
    for step in range(first, args.steps):
        lr = args.lr * min(1, (1 - step / args.steps) / 0.3)  # constant, then a straight line to zero
        for group in optimizer.param_groups:
            group["lr"].fill_(lr)
        torch.manual_seed(1_000_003 * args.seed + step)  # batch and noise depend on nothing else: resuming is exact
        if cuda and step == first + 5:  # one CUDA graph: to launch kernels this small takes longer than to run them
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                update()
            step_once = graph.replay
        step_once()
        bar.update()
        due = step + 1 == args.steps or bool(stop) or (step + 1) % args.eval_interval == 0
        if due or (step + 1) % 20 == 0:
            train_bound = bound.item()  # waits for the device, so that the clock tells the truth
            if not math.isfinite(train_bound):
                bar.close()
                fail(f"bound {train_bound} at step {step}, learning rate {lr:.2e}", status=1)
            if tick:
                seconds, counted = seconds + time.time() - tick[0], counted + step - tick[1]
            tick = time.time(), step
            bar.set_postfix(bound=f"{train_bound:.3f}", refresh=False)
        if due:
            found = evaluate(model, val[:args.test_images // 5], args, 10 * args.k[0] if data else 60_000)
            curves.append((step + 1, found["bound"], found["var_log_p_hat"]))
            log.write(json.dumps(dict(step=step + 1, train_bound=train_bound, **found)) + "\n")
            state = dict(args=vars(args), model=model.state_dict(), optimizer=optimizer.state_dict())
            save_checkpoint(out_dir / "checkpoint.pt", dict(state, step=step + 1, curves=curves))
            tick = time.time(), step
        if stop:
            bar.close()
            fail(f"interrupted at step {step + 1}; {out_dir / 'checkpoint.pt'} is saved, --resume goes on", status=130)
    bar.close()
    signal.signal(signal.SIGINT, previous)
    metrics = evaluate(model, test, args, args.nll_samples)
    return model, metrics | dict(ms_per_step=1000 * seconds / max(1, counted), seconds=time.time() - began), curves


def compare(args, data, device, out_dir):
    """Every arm, for every --k and seed, at equal steps and batches: (rows, {name: curves of the last seed})."""
    rows, curves = [], {}
    for arm, k in ((arm, k) for arm in args.compare for k in args.k):
        name, runs = f"{arm}, k = {k}", []
        for seed in range(args.seed, args.seed + args.seeds):
            run = argparse.Namespace(**vars(args) | arm_flags(arm) | dict(k=[k], seed=seed))
            folder = out_dir / f"{arm} k {k} seed {seed}".replace(" ", "_").replace(":", "_")
            _, metrics, curves[name] = train(run, data, device, folder)
            runs.append(metrics)
        rows.append(dict(name=name, arm=arm, k=k, seeds=args.seeds, runs=runs))
        for key in runs[0]:
            values = torch.tensor([run[key] for run in runs], dtype=torch.float64)
            rows[-1] |= {key: values.mean().item(), f"{key}_std": values.std(correction=min(1, args.seeds - 1)).item()}
    shown = ["bound", "nll", "var_log_p_hat", "covariance_part", "correlation", "ess", "ms_per_step"]
    print(f"\nmean ± std, seeds: {args.seeds}\n{'':28}" + "".join(f"{key:>20}" for key in shown))
    for row in rows:
        cells = (f"{row[key]:.4f} ± {row[f'{key}_std']:.4f}" for key in shown)
        print(f"{row['name']:28}" + "".join(f"{cell:>20}" for cell in cells))
    return rows, curves


@torch.no_grad()
def plot(path, args, model, data, curves, rows):
    """A density: the proposals coloured by |z0|. Images: some. Comparison: bound and variance over steps, or over k."""
    from matplotlib.figure import Figure
    k, device = args.k[0], next(model.parameters()).device
    shown = 0 if rows else 1 if data else (k + 2) * (args.latent == 2)  # pictures, to the left of the two curves
    figure = Figure(figsize=(9, 3.2) if shown < 2 else (1.9 * (shown + 2), 2.4), layout="constrained")
    axes = figure.subplots(1, shown + 2, width_ratios=[3 if data else 1] * shown + [1, 1])
    torch.manual_seed(0)
    if shown == 1:
        draws = log_weights(model, data[2][:30], k, args.proposal, POWERS[args.weights])[1][:, 0]
        images = model.decode(torch.cat([draws, torch.randn(30, args.latent, device=device)])).sigmoid()
        grid = torch.cat([data[2][:30], images]).view(9, 10, 28, 28).transpose(1, 2).reshape(252, 280)
        axes[0].imshow(grid.cpu(), cmap="gray", aspect="auto")
        axes[0].set(xticks=[], yticks=[42, 126, 210], yticklabels=["test", "reconstructed", "sampled"])
    if shown > 1:
        z0, axis = [], torch.linspace(-6, 6, 200, device=device)
        hook = model.q.register_forward_pre_hook(lambda _, inputs: z0.append(inputs[0].norm(dim=-1)))      # (N, J)
        log_w, z, _ = log_weights(model, axis.new_zeros(100_000, 0), k, args.proposal, POWERS[args.weights])
        hook.remove()
        target = model.target(torch.cartesian_prod(axis, axis)).exp().view(200, 200).T
        axes[0].imshow(target.cpu(), origin="lower", extent=(-6, 6, -6, 6), cmap="Blues")
        chosen = z[torch.arange(len(z), device=device), torch.multinomial(log_w.softmax(1), 1)[:, 0]]
        axes[1].hist2d(*chosen.T.cpu().numpy(), bins=120, range=((-6, 6), (-6, 6)), cmap="Blues")
        for j in range(k):
            axes[2 + j].scatter(*z[:4000, j].T.cpu(), c=z0[0].expand(z.shape[:2])[:4000, j].cpu(), s=1, cmap="hsv")
        for ax, title in zip(axes, ["target", "resampled", *(f"proposal {j + 1}" for j in range(k))]):
            ax.set(title=title, xlim=(-6, 6), ylim=(-6, 6), aspect="equal", xticks=[], yticks=[])
    if len(args.k) > 1:  # a line an arm, from the rows
        curves = {arm: [(row["k"], row["bound"], row["var_log_p_hat"]) for row in rows if row["arm"] == arm]
                  for arm in args.compare}
    for name, curve in curves.items():
        x, bounds, variances = zip(*curve)
        axes[-2].plot(x, [bound if data else -bound for bound in bounds], label=name)
        axes[-1].plot(x, variances, label=name)
    for ax, label in zip(axes[-2:], ("bound" if data else "gap", "Var(log p_hat)")):
        ax.set(xlabel="k" if len(args.k) > 1 else "step", ylabel=label, yscale="linear" if data else "log")
    if rows:
        figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


# -------- Arguments

def fail(message, status=2):
    print(f"ERROR: {message}", file=sys.stderr)
    raise SystemExit(status)


def arm_flags(arm):
    """"joint:balance:dreg" -> dict(proposal="joint", weights="balance", grad="dreg"); missing are uniform and plain."""
    found = re.fullmatch("(joint|independent|iid|gaussian)(?::(balance|power))?(?::(dreg|official))?", arm)
    if not found:
        fail(f"--compare {arm}; allowed: joint, independent, iid, gaussian; then :balance, :power; :dreg, :official")
    return dict(proposal=found[1], weights=found[2] or "uniform", grad=found[3] or "plain")


def parse(argv):
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    parser = argparse.ArgumentParser(description="Hierarchical importance weighted autoencoder (arXiv 1905.04866).",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail
    data = parser.add_argument_group("data").add_argument
    data("--task", choices=("density", "images"), default="density" if there[0] == "cpu" else "images",
         help="fit proposals to a density, or train encoder and decoder")
    data("--target", choices=[*TARGETS], default="u2", help="density")
    data("--data", choices=("mnist", "glyphs"), help="images; None is mnist, or glyphs where that can't be had")
    data("--binarise", choices=("dynamic", "static"), default="dynamic", help="training images at every use, or once")
    data("--test_images", type=int, help="of the test set, from its start")
    model = parser.add_argument_group("model").add_argument
    model("--proposal", choices=("joint", "independent", "iid", "gaussian"), default="joint", help="of samples")
    model("--weights", choices=[*POWERS], default="uniform", help="heuristic: none, balance, or power 2")
    model("--reverse", choices=("own", "shared"), help="r_j or one r; None is own with uniform weights, else shared")
    model("--k", type=int, nargs="+", help="samples; several only with --compare")
    model("--hidden", type=int, help="hidden units of q0, q_j and r; 0 makes them linear")
    optimisation = parser.add_argument_group("optimisation").add_argument
    optimisation("--grad", choices=("plain", "dreg", "official"), default="plain", help="estimator; official is biased")
    optimisation("--steps", type=int, help="optimiser steps of a run")
    optimisation("--batch", type=int, help="images, or draws of z0, a step")
    optimisation("--lr", type=float, help="learning rate of Adam")
    run = parser.add_argument_group("run").add_argument
    run("--compare", nargs="*", metavar="ARM", help="train arms spelled proposal:weights:grad; the default shows all")
    run("--seeds", type=int, default=1, help="with --compare: runs an arm")
    run("--seed", type=int, default=1337, help="of weights, batches and noise")
    run("--nll_samples", type=int, help="importance samples an image of the final evaluation")
    run("--plot", metavar="FILE.png", help="draw proposals or images, with --compare bound and variance")
    run("--out_dir", default="out/hier_iwae", help="for checkpoint.pt, log.jsonl, metrics.json")
    run("--resume", action="store_true", help="go on from out_dir/checkpoint.pt, bit for bit")
    run("--eval_interval", type=int, help="steps between evaluations, with checkpoints; None: a 20th of --steps")
    run("--device", choices=there, default=there[0], help="of what this machine has")
    args = parser.parse_args(argv)
    name = "loggamma" if args.task == "density" and args.target == "loggamma" else args.task
    small = DEFAULTS["images on cpu"] if args.task == "images" and args.device == "cpu" else {}
    parser.set_defaults(**DEFAULTS[name] | small)  # once more, now that it is known what suits the run
    args = parser.parse_args(argv)
    args.eval_interval = max(1, args.steps // 20) if args.eval_interval is None else args.eval_interval
    args.compare = ARMS[args.task].split() if args.compare == [] else args.compare
    weights = [arm_flags(arm)["weights"] for arm in args.compare or []] or [args.weights]
    lowest = dict(hidden=0, steps=1, batch=1, eval_interval=1, seeds=1, seed=0, lr=0, nll_samples=4 * max(args.k),
                  test_images=10)
    for wrong, message in (
            *((not low <= getattr(args, name) < math.inf, f"--{name} {getattr(args, name)}; allowed: {low} or more")
              for name, low in lowest.items()),
            (min(args.k) < 1 or len(args.k) > 1 and not args.compare,
             f"--k {' '.join(map(str, args.k))}; allowed: 1 or more, several only with --compare"),
            (args.reverse == "own" and weights != ["uniform"] * len(weights),
             "--reverse own; allowed: with uniform weights. With weights pi_j that depend on z it is biased: E p_hat "
             "is p(x) only where sum_j pi_j(z, z0) r_j(z0 | z) integrates to 1 over z0"),
            (args.compare and args.resume, "--compare; allowed: without --resume"),
            (args.plot and not Path(args.plot).absolute().parent.is_dir(), f"--plot {args.plot}: no such folder"),
            (args.plot and not importlib.util.find_spec("matplotlib"), "--plot needs: pip install matplotlib")):
        if wrong:
            fail(message)
    return args


def main(argv=None):
    """Train or compare, as the flags say; returns what is in metrics.json."""
    args = parse(argv)
    out_dir, device, data, dataset = Path(args.out_dir), torch.device(args.device), None, args.target
    if args.task == "images":
        try:
            train_images, test_images, dataset = load_digits(args.data)
        except (OSError, ValueError) as error:
            fail(f"--data: {error}")
        images, val = train_images.to(device).tensor_split([len(train_images) * 5 // 6])
        images = binarised(images, 0) if args.binarise == "static" else images
        data = images, binarised(val, 1), binarised(test_images[:args.test_images].to(device), 2)
    name = torch.cuda.get_device_name(device) if args.device == "cuda" else args.device
    bf16 = args.device == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    model = HIWAE(args).to(device)
    print(f"{name}, {'bfloat16 (capability 8.0 or more)' if bf16 else 'float32 (no fast bfloat16)'}, {dataset}, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters, PyTorch kernels")
    rows = None
    if args.compare:
        rows, curves = compare(args, data, device, out_dir)
        result = dict(rows=rows)
    else:
        model, result, curves = train(args, data, device, out_dir)
        curves = {args.proposal: curves}
        for key, value in result.items():
            print(f"{key:24}{value:,.4f}")
    result.update(device=name, dataset=dataset, seed=args.seed, steps=args.steps, torch=torch.__version__)
    (out_dir / "metrics.json").write_text(json.dumps(result, indent=1))
    if args.plot:
        plot(args.plot, args, model, data, curves, rows)
    return result


if __name__ == "__main__":
    main()
