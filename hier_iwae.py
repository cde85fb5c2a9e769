"""
Hierarchical importance weighted autoencoder ("Hierarchical Importance Weighted Autoencoders", arXiv 1905.04866).

IWAE draws k samples that know nothing of each other. Here they share a z0, so that they can divide the work:

    z0 ~ q0(z0 | x),   z_j ~ q_j(z_j | z0, x) for j = 1..k,   and a reverse model r_j(z0 | z_j, x) pays for z0
    bound = E log p_hat <= log p(x),   p_hat = mean_j w_j,   w_j = p(x, z_j) r_j(z0 | z_j, x) / (q0(z0 | x) d_j)
    d_j = q_j(z_j)^(1-p) (1/k) sum_l q_l(z_j)^p,   p = 0 uniform weights, 1 balance heuristic, 2 power heuristic

Baselines: --proposal gaussian is IWAE (with --k 1 the VAE), iid draws k pairs (z0, z) from one hierarchy, independent
draws a z0 for each q_j: all stays but the coupling. --grad dreg is the doubly reparameterised gradient, exact here.
Differs from the authors' code: plainer networks, a z0 of two dimensions, steps, batch, schedule; trained on the bound.

    python hier_iwae.py                        a 2-D density on a CPU, binarised MNIST on a GPU
    python hier_iwae.py --compare --seeds 3    the proposals, then the estimators, at equal k and steps, in one table
"""
import argparse
import importlib.util
import json
import math
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data.densities import TARGETS, log_normaliser
from data.mnist import binarised, load_digits

DEFAULTS = {
    "density": dict(k=[3], latent=2, hidden=64, context=1, batch=64, steps=3000, lr=1e-2, nll_samples=600_000),
    "loggamma": dict(k=[2], latent=1, hidden=0, context=1, batch=1024, steps=4000, lr=4e-2, nll_samples=1_000_000),
    "images": dict(k=[5], latent=32, hidden=100, context=100, batch=256, steps=4000, lr=2e-3, nll_samples=5000),
    "images on cpu": dict(batch=32, steps=400, lr=1e-3, nll_samples=200, test_images=500),
}
ARMS = "gaussian iid independent joint gaussian:dreg joint:dreg independent:balance joint:balance joint:power".split()
POWERS = dict(uniform=0, balance=1, power=2)  # p of d_j
SAME = "task target data proposal weights grad k steps batch lr seed nll_samples test_images".split()  # to resume


# -------- Model. N images, k samples, J draws of z0 (1 if joint), L proposals (1 if iid), d latent, C context

class Conditional(nn.Module):
    """L diagonal Gaussians of `outputs` dimensions given x and the context: a hidden layer, and a skip to the means.
    Each has a first layer of x and a width of its own; they share the rest, as what is its own learns from a k-th of
    the samples. Sizes may be 0: q0 has no x, IWAE's z0 no dimensions, and without hidden units all is linear."""
    def __init__(self, inputs, outputs, L, args):
        super().__init__()
        self.sizes = args.hidden, outputs
        self.own = nn.Linear(inputs, L * sum(self.sizes))
        self.shared = nn.Linear(args.context, sum(self.sizes))
        self.head = nn.Linear(args.hidden, 2 * outputs)
        self.width = nn.Parameter(torch.zeros(L, outputs))

    def forward(self, x, c):  # (N, J, inputs), (N, 1, C) -> mean and standard deviation, each (N, J, L, outputs)
        own = self.own(x / x.shape[-1] ** 0.5).unflatten(-1, (len(self.width), sum(self.sizes)))
        hidden, skip = (own + self.shared(c)[:, :, None]).split(self.sizes, -1)
        mean, raw = self.head(F.elu(hidden)).chunk(2, -1)
        return mean + skip, F.softplus(raw + self.width) + 1e-5


class Residual(nn.Module):
    """ELU(second(ELU(first(x))) + skip(x)). First and skip are one layer."""
    def __init__(self, layer, inputs, outputs, **options):
        super().__init__()
        self.first = layer(inputs, 2 * outputs, **options)
        self.second = layer(outputs, outputs)

    def forward(self, x):
        x, skip = self.first(x).chunk(2, 1)
        return F.elu(self.second(F.elu(x)) + skip)


class HIWAE(nn.Module):
    """q0, the q_j and r; for images an encoder and a decoder, for densities a target in the place of p(x, z)."""
    def __init__(self, args):
        super().__init__()
        k, d, C = args.k[0], args.latent, args.context
        d0 = 0 if args.proposal == "gaussian" else min(d, 2)  # few: until q makes use of z0, it is noise to z and to r
        L = k if args.proposal in ("joint", "independent") else 1
        self.q0 = Conditional(0, d0, 1, args)
        self.q = Conditional(d0, d, L, args)
        # weights that depend on z want one r for all j: p_hat is unbiased if sum_j pi_j(z, z0) r_j integrates to 1
        self.r = Conditional(d, d0, L if args.weights == "uniform" else 1, args)
        self.target = TARGETS[args.target] if args.task == "density" else None
        if self.target:
            self.log_z = log_normaliser(self.target, d)
            self.encoder = lambda x: x.new_ones(len(x), 1)  # a density has no x: (N, 0) -> (N, 1)
            return
        conv = lambda i, o, stride=1: nn.Conv2d(i, o, 3, stride, padding=1)
        self.encoder = nn.Sequential(
            Residual(conv, 1, 16, stride=2), Residual(conv, 16, 16), Residual(conv, 16, 32, stride=2),
            Residual(conv, 32, 32), Residual(conv, 32, 32, stride=2), nn.Flatten(), Residual(nn.Linear, 512, C))
        self.decoder = nn.Sequential(                                                       # (N, 1, 28, 28)
            Residual(nn.Linear, d, C), Residual(nn.Linear, C, 512), nn.Unflatten(1, (32, 4, 4)),
            nn.Upsample(None, 2), Residual(conv, 32, 32), Residual(conv, 32, 32), nn.ZeroPad2d((0, -1, 0, -1)),
            nn.Upsample(None, 2), Residual(conv, 32, 16), Residual(conv, 16, 16), conv(16, 4), nn.PixelShuffle(2))
        nn.init.constant_(self.decoder[-2].bias, -3)  # most pixels are black

    def log_joint(self, x, z):
        """log p(x, z) of z (N, k, d): (N, k)."""
        if self.target:
            return self.target(z) - self.log_z
        logits = self.decoder(z.flatten(0, 1)).view(*z.shape[:2], -1)                       # (N, k, 784)
        return log_normal(z, 0 * z, z.new_ones(1)) + (x.flatten(1)[:, None] * logits - F.softplus(logits)).sum(-1)


# -------- Loss

def log_normal(x, mean, std):
    return (-0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def own(t):
    """Of t (N, J, L, d), where J or L is k or 1, what belongs to sample j: (N, k, d)."""
    return t.flatten(1, 2) if 1 in t.shape[1:3] else t.diagonal(dim1=1, dim2=2).mT


def log_weights(model, x, args):
    """log w (N, k), samples (z0 (N, J, d0), z (N, k, d)), and a loss whose gradient is that of -bound.

    plain differentiates log p_hat. dreg lacks the scores of q0 and q_j: with v_j = w_j / sum_l w_l that of q0 is
    sum_j v_j dlog q0(z0) = dlog q0(z0), in expectation 0, that of q_j is in expectation (v_j - v_j^2) dlog w_j/dz_j
    (Tucker et al., arXiv 1810.04152), so that v_j multiplies once more what passes through z_j, and z_j alone."""
    N, k = len(x), args.k[0]
    c = model.encoder(x)[:, None]                                                           # (N, 1, C)
    m0, s0 = (own(t) for t in model.q0(c[..., :0], c))                                      # (N, 1, d0)
    z0 = m0 + s0 * torch.randn(N, 1 if args.proposal == "joint" else k, m0.shape[-1], device=c.device, dtype=c.dtype)
    mean, std = model.q(z0, c)                                                              # (N, J, L, d)
    z = own(mean) + own(std) * torch.randn_like(own(mean))                                  # (N, k, d)
    if args.grad == "dreg":
        m0, s0, mean, std = (t.detach() for t in (m0, s0, mean, std))
    log_d = log_normal(z, own(mean), own(std))                                              # (N, k)
    if p := POWERS[args.weights]:
        log_d = (1 - p) * log_d + (p * log_normal(z[:, :, None], mean, std)).logsumexp(2) - math.log(mean.shape[2])
    log_r = log_normal(z0, *(own(t) for t in model.r(z, c)))
    log_w = model.log_joint(x, z) + log_r - log_normal(z0, m0, s0) - log_d
    if args.grad == "plain" or not z.requires_grad:
        return log_w, (z0, z), math.log(k) - log_w.logsumexp(1).mean()
    v = log_w.softmax(1).detach()
    z.register_hook(lambda gradient: v[..., None] * gradient)
    return log_w, (z0, z), -(v * log_w).sum(1).mean()


# -------- Evaluation

def statistics(log_w):
    """Means over N images, each with R draws of k weights log_w (N, R, k). Of Var(p_hat / p), variance_part and
    covariance_part are the sums over i = j and i != j of Cov(w_i, w_j) / (k p)^2."""
    log_w = (log_w.cpu() if log_w.is_mps else log_w).double()
    N, R, k = log_w.shape
    log_p = log_w.flatten(1).logsumexp(1) - math.log(R * k)                                 # (N,)
    log_p_hat = log_w.logsumexp(2) - math.log(k)                                            # (N, R)
    w = (log_w - log_p[:, None, None]).exp() / k                                            # their sum is p_hat / p
    v = log_w.softmax(2)
    pairs = lambda w: w.sum(2).var(1) - w.var(1).sum(1)  # by how much the variance of a sum is that of independent ones
    found = dict(bound=log_p_hat, nll=-log_p, var_log_p_hat=log_p_hat.var(1), variance_part=w.var(1).sum(1),
                 covariance_part=pairs(w), ess=1 / v.square().sum(2), largest_weight=v.amax(2),
                 correlation=pairs(w / w.std(1, keepdim=True).clamp(min=1e-30)) / max(1, k * k - k))
    return {name: value.mean().item() for name, value in found.items()}


@torch.no_grad()
def evaluate(model, x, args, samples):
    """Statistics of `samples` importance samples for each of x (N, ...), always the same noise; a density has one x."""
    torch.manual_seed(0)
    repeats = samples // args.k[0]
    rows = max(1, (20_000 if x.is_cuda or model.target else 500) // args.k[0])
    x, repeats = (x.new_zeros(repeats, 0), 1) if model.target else (x, repeats)
    draws = [torch.cat([log_weights(model, some, args)[0] for some in x.split(rows)]) for _ in range(repeats)]
    found = statistics(torch.stack(draws, 0 if model.target else 1))                        # (1, N, k) or (N, R, k)
    if args.target == "loggamma" and args.proposal != "gaussian":
        found["slopes"] = model.q.own.weight[:, 0].tolist()  # of the means in z0: these proposals are linear
    if not model.target:  # Burda et al.: Var over x of E[z | x] > 0.01, here without what noise adds to it
        means = torch.stack([log_weights(model, x[:rows], args)[1][1].mean(1) for _ in range(min(repeats, 100))])
        found["active_units"] = float((means.mean(0).var(0) - means.var(0).mean(0) / len(means) > 0.01).sum())
    return found | (dict(gap=-found["bound"]) if model.target else {})


# -------- Training

def train(args, images, val, test, device, out_dir):
    """Train on images, test on others, empty for a density: (model, metrics); a resumed run that has ended is read."""
    began = time.time()
    first, checkpoint, finished = 0, out_dir / "checkpoint.pt", out_dir / "metrics.json"
    torch.backends.cudnn.deterministic = True  # equal seeds, equal runs; other algorithms are no faster here
    torch.manual_seed(args.seed)
    model = HIWAE(args).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(args.lr, device=device), fused=not images.is_mps,
                                 capturable=images.is_cuda)
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if differing := [f"{name} {state['args'][name]} there, {getattr(args, name)} here" for name in SAME
                         if state["args"][name] != getattr(args, name)]:
            fail(f"--resume: {checkpoint} is another run: {'; '.join(differing)}")
        model.load_state_dict(state["model"])
        if finished.exists():  # written at the end
            return model, json.loads(finished.read_text())
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    out_dir.mkdir(parents=True, exist_ok=True)
    finished.unlink(missing_ok=True)
    log = open(out_dir / "log.jsonl", "a" if args.resume else "w", buffering=1)
    log.write(json.dumps(dict(config=vars(args))) + "\n")
    bound = torch.zeros((), device=device)

    def update():
        x = images[torch.randint(len(images), (args.batch,), device=device)]
        x = (torch.rand(x.shape, device=device) < x / 255).float()  # binarised anew at every use
        log_w, _, loss = log_weights(model, x, args)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        bound.copy_(log_w.detach().logsumexp(1).mean() - math.log(args.k[0]))

    stop = []  # Ctrl-C lets the step in progress end; a second one does not wait
    previous = signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if stop else stop.append(True))
    ms = 0.0
    tick, since = time.time(), first
    if images.is_cuda:
        torch.cuda.set_stream(torch.cuda.Stream(device))  # a graph can be recorded on any stream but the first
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc=out_dir.name, mininterval=1)
    for step in bar:
        lr = args.lr * min(1, (1 - step / args.steps) / 0.3)  # constant, then a straight line to zero
        optimizer.param_groups[0]["lr"].fill_(lr)
        torch.manual_seed(1_000_003 * args.seed + step)  # all noise depends on nothing else: resuming is exact
        if images.is_cuda and step == first + 5:
            graph = torch.cuda.CUDAGraph()  # to launch kernels this small takes longer than to run them
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                update()
            update = graph.replay
        update()
        if step + 1 < args.steps and (step + 1) % max(1, args.steps // 20) and not stop:
            continue
        train_bound = bound.item()  # waits for the device, so that the clock tells the truth
        ms = 1000 * (time.time() - tick) / (step + 1 - since)
        bar.set_postfix(bound=f"{train_bound:.3f}", refresh=False)
        if not math.isfinite(train_bound):
            bar.close()
            fail(f"bound {train_bound} at step {step}, learning rate {lr:.2e}", status=1)
        found = evaluate(model, val, args, 10 * args.k[0] if args.task == "images" else 60_000)
        log.write(json.dumps(dict(step=step + 1, train_bound=train_bound, **found)) + "\n")
        state = dict(args=vars(args), model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
        torch.save(state, out_dir / "part")
        (out_dir / "part").replace(checkpoint)  # a kill in between leaves the old checkpoint whole
        if stop:
            bar.close()
            fail(f"interrupted; {checkpoint} is saved, --resume goes on", status=130)
        tick, since = time.time(), step + 1  # the clock leaves out evaluation
    signal.signal(signal.SIGINT, previous)
    metrics = evaluate(model, test, args, args.nll_samples)
    metrics |= dict(ms_per_step=ms, seconds=time.time() - began, seed=args.seed, steps=args.steps, **args.about)
    finished.write_text(json.dumps(metrics, indent=1))
    return model, metrics


def compare(args, data, device, out_dir):
    """Every arm, for every --k and seed, at equal steps and batches: a row each, with the curve of its last seed."""
    rows = []
    for arm, k in ((arm, k) for arm in args.compare for k in args.k):
        proposal, _, extra = arm.partition(":")
        flags = dict(proposal=proposal, k=[k], weights=extra if extra in POWERS else "uniform",
                     grad="dreg" if extra == "dreg" else "plain")
        runs = []
        for seed in range(args.seed, args.seed + args.seeds):
            folder = out_dir / f"{arm}_k{k}_seed{seed}".replace(":", "_")
            runs.append(train(argparse.Namespace(**vars(args) | flags | dict(seed=seed)), *data, device, folder)[1])
        curve = [line for line in map(json.loads, open(folder / "log.jsonl")) if "step" in line]
        rows.append(dict(name=f"{arm}, k = {k}", arm=arm, k=k, seeds=args.seeds, runs=runs, curve=curve))
        for key in (key for key, value in runs[0].items() if isinstance(value, float)):
            values = torch.tensor([run[key] for run in runs], dtype=torch.float64)
            rows[-1] |= {key: values.mean().item(), f"{key}_std": values.std(correction=min(1, args.seeds - 1)).item()}
    return rows


def table(rows):
    """The rows of a comparison in Markdown: mean ± standard deviation where there are several seeds."""
    digits = dict(gap=4) if "gap" in rows[0] else dict(bound=2, nll=2)
    digits |= dict(var_log_p_hat=3, covariance_part=4, correlation=4, ess=2, ms_per_step=2)
    lines = [["proposal", "seeds", *digits], ["---"] * (len(digits) + 2)]
    for row in rows:
        cells = [f"{row[x]:.{n}f}" + f" ± {row[x + '_std']:.{n}f}" * (row["seeds"] > 1) for x, n in digits.items()]
        lines.append([row["name"], str(row["seeds"]), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(path, rows):
    """Bound and NLL, of a density gap and Var(log p_hat): over k, if there are several, or over the steps."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    names = ("gap", "var_log_p_hat") if "gap" in rows[0] else ("bound", "nll")
    growth = len({row["k"] for row in rows}) > 1
    for ax, name in zip(figure.subplots(1, 2), names):
        for arm in dict.fromkeys(row["arm"] for row in rows):
            points = [row for row in rows if row["arm"] == arm]
            points = points if growth else points[0]["curve"]
            x, y, error = zip(*((p["k" if growth else "step"], p[name], p.get(f"{name}_std", 0)) for p in points))
            ax.errorbar(x, y, error, label=arm)
        ax.set(xlabel="k" if growth else "step", ylabel=name, yscale="log" if "gap" in names else "linear")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


@torch.no_grad()
def draw(path, args, model, x):
    """Of a plane density samples of each q_j, coloured by |z0|; of images x twenty, reconstructed, and twenty new."""
    from matplotlib import figure, image
    _, (z0, z), _ = log_weights(model, x.new_zeros(3000, 0) if model.target else x[:20], args)
    if not model.target:
        means = model.decoder(torch.cat([z[:, 0], torch.randn_like(z[:, 0])])).sigmoid()
        rows = torch.cat([x[:20], means]).view(3, 20, 28, 28).transpose(1, 2).reshape(3 * 28, 20 * 28)
        return image.imsave(path, rows.cpu(), cmap="gray_r")
    axis = torch.linspace(-5, 5, 200)
    density = model.target(torch.cartesian_prod(axis, axis)).exp().view(200, 200).T
    picture = figure.Figure(figsize=(3 * z.shape[1], 3.2), layout="constrained")
    for j, ax in enumerate(picture.subplots(1, z.shape[1], squeeze=False)[0]):
        ax.contour(axis, axis, density, colors="black", linewidths=0.5)
        ax.scatter(*z[:, j].T.cpu(), c=z0.expand(-1, z.shape[1], -1)[:, j].norm(dim=-1).cpu(), s=1, cmap="viridis")
        ax.set(title=f"proposal {j + 1}", xlim=(-5, 5), ylim=(-5, 5), aspect="equal")
    picture.savefig(path, dpi=150)


# -------- Arguments

def fail(message, status=2):
    print(f"ERROR: {message}", file=sys.stderr)
    raise SystemExit(status)


def parse(argv):
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    parser = argparse.ArgumentParser(description="Hierarchical importance weighted autoencoder (arXiv 1905.04866).",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail
    groups = map(parser.add_argument_group, ("data", "model", "optimisation", "run"))
    data, model, optimisation, run = (group.add_argument for group in groups)
    data("--task", choices=("density", "images"), default="density" if there[0] == "cpu" else "images", help="to model")
    data("--target", choices=TARGETS, default="u2", help="density")
    data("--data", choices=("mnist", "glyphs"), help="images; None is mnist, or glyphs where that can't be had")
    data("--test_images", type=int, default=10_000, help="of the test set, from its start")
    model("--proposal", choices=("joint", "independent", "iid", "gaussian"), default="joint", help="of samples")
    model("--weights", choices=POWERS, default="uniform", help="of samples; balance or power heuristic")
    model("--k", type=int, nargs="+", help="samples; several only with --compare")
    optimisation("--grad", choices=("plain", "dreg"), default="plain", help="estimator of the gradient")
    optimisation("--steps", type=int, help="optimiser steps of a run")
    optimisation("--batch", type=int, help="images, or draws of z0, a step")
    optimisation("--lr", type=float, help="learning rate of Adam")
    run("--compare", nargs="*", choices=ARMS, metavar="ARM", help=f"some of {', '.join(ARMS)}; none is all")
    run("--seeds", type=int, default=1, help="with --compare: runs an arm")
    run("--seed", type=int, default=1337, help="of weights, batches and noise")
    run("--nll_samples", type=int, help="importance samples an image of the final evaluation")
    run("--plot", metavar="FILE.png", help="draw proposals or images, with --compare bound and variance")
    run("--out_dir", default="out/hier_iwae", help="for checkpoint.pt, log.jsonl, metrics.json")
    run("--resume", action="store_true", help="go on from out_dir, bit for bit; with --compare, run by run")
    run("--device", choices=there, default=there[0], help="of what this machine has")
    parser.set_defaults(**DEFAULTS[parser.get_default("task")])
    args = parser.parse_args(argv)
    name = "loggamma" if args.task == "density" and args.target == "loggamma" else args.task
    parser.set_defaults(**DEFAULTS[name] | DEFAULTS.get(f"{args.task} on {args.device}", {}))
    args = parser.parse_args(argv)  # once more, now that it is known what suits the run
    args.compare = ARMS if args.compare == [] else args.compare
    lowest = dict(steps=1, batch=1, seeds=1, seed=0, lr=0, nll_samples=4 * max(args.k), test_images=40)
    for wrong, message in (
            *((not low <= getattr(args, name) < math.inf, f"--{name} {getattr(args, name)}; allowed: {low} or more")
              for name, low in lowest.items()),
            (min(args.k) < 1 or len(args.k) > 1 and not args.compare,
             f"--k {' '.join(map(str, args.k))}; allowed: 1 or more, several only with --compare"),
            (args.grad == "dreg" and (args.weights != "uniform" or args.proposal in ("iid", "independent")),
             "--grad dreg; allowed: with uniform weights and a joint or gaussian proposal, where it is unbiased"),
            (args.resume and not args.compare and not Path(args.out_dir, "checkpoint.pt").exists(),
             f"--out_dir {args.out_dir} holds no checkpoint.pt\nHINT: train first, without --resume"),
            (args.plot and not args.compare and args.latent == 1, "--plot; allowed: images, plane densities, compare"),
            (args.plot and not (Path(args.plot).absolute().parent.is_dir() and importlib.util.find_spec("matplotlib")),
             f"--plot {args.plot}; allowed: a file in a folder that is there, and pip install matplotlib")):
        if wrong:
            fail(message)
    return args


def main(argv=None):
    """Train or compare, as the flags say; returns what is in metrics.json."""
    signal.signal(signal.SIGINT, lambda *_: fail("interrupted; --resume goes on", status=130))
    warnings.filterwarnings("ignore", "Initializing zero-element tensors")
    args = parse(argv)
    out_dir, device = Path(args.out_dir), torch.device(args.device)
    data = [torch.zeros(args.batch, 0, device=device)] * 3
    if args.task == "images":
        try:
            images, test, args.data = load_digits(args.data)
        except (OSError, ValueError) as error:
            fail(f"--data: {error}")
        images, val = images.to(device).tensor_split([len(images) * 5 // 6])
        data = images, binarised(val[:args.test_images // 5], 1), binarised(test[:args.test_images].to(device), 2)
    dataset = args.data if args.task == "images" else args.target
    machine = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    args.about = dict(device=machine, dataset=dataset, torch=str(torch.__version__))
    print(f"{machine}, float32 (TF32 in convolutions, where there are tensor cores), {dataset}, "
          f"{sum(p.numel() for p in HIWAE(args).parameters()):,} parameters, PyTorch kernels")
    if args.compare:
        result = dict(rows=compare(args, data, device, out_dir), seed=args.seed, steps=args.steps, **args.about)
        (out_dir / "metrics.json").write_text(json.dumps(result, indent=1))
        print(table(result["rows"]))
    else:
        model, result = train(args, *data, device, out_dir)
        print("\n".join(f"{key:24}{value}" for key, value in result.items()))
    if args.plot:
        plot(args.plot, result["rows"]) if args.compare else draw(args.plot, args, model, data[2])
    return result


if __name__ == "__main__":
    main()
