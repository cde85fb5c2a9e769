"""
BYOL whose weights know what they don't know ("Bootstrap Your Own Variance", BYOV, arXiv 2312.03213).

Bootstrap Your Own Latent (BYOL) learns from two views of an image, without labels: the online network predicts, from
one view, what a slowly moving average of it, the target, makes of the other. Bayes by Backprop (BBB) puts a Gaussian on
every weight and learns its mean and its width. BYOV does both at once:

    w ~ q = N(mu, softplus(rho)^2)      loss = 2 - 2 cos(p1, t2) + 2 - 2 cos(p2, t1) + lambda KL(q || N(0, prior_std^2))

p1 and p2 come from drawn online weights, t1 and t2 from the target, an average of mu. The KL is a sum over weights;
lambda = weight_decay * prior_std^2 makes its gradient on mu plain weight decay, which the optimiser does, as for BYOL.

    python byov.py                trains BYOV, then measures a linear probe, on clean and corrupted images
    python byov.py --compare      BYOL, BYOV, BYOL with untrained noise of equal size on its weights, and supervision

On a GPU the data are CIFAR-10, on a CPU drawn digits. Of the paper only its abstract was known: the rest is our choice.
"""
import argparse
import copy
import functools
import importlib.util
import json
import math
import signal
import sys
import time
from itertools import product, repeat
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data.augment import normalise, two_views
from data.calibration import calibration, gaussianity, measure_all, predictive_std
from data.cifar10 import load_images
from data.corruptions import CORRUPTIONS, conditions
from data.probes import fit_probe, knn_accuracy, temperature_scale
from data.summary import summarise, table
from flashsigmoid import sigmoid_attention

DEFAULTS = {
    "glyphs": dict(encoder="conv", width=16, steps=300, prior_std=0.05, probe_labels=[300]),
    "cifar10": dict(encoder="resnet18", width=64, steps=20_000, prior_std=0.002, probe_labels=[0, 400]),
}
ARMS = "BYOL", "BYOV", "BYOL+noise", "supervised", "supervised BBB"
VIT = dict(width=32, lr=1e-3, weight_decay=0.05)  # instead, and AdamW instead of SGD
TRAINING = "data arm encoder attn width steps batch lr weight_decay tau prior_std".split()


# -------- Bayesian layers: every weight has its own N(weight, softplus(rho)^2); biases and norms are plain.

class BayesConv2d(nn.Conv2d):
    def forward(self, x):
        """In training one draw of the weights a pass, shared by batch and positions; else the weights in `drawn`."""
        w = self.weight + F.softplus(self.rho) * torch.randn_like(self.weight) if self.training else self.drawn
        return self._conv_forward(x, w, self.bias)


class BayesLinear(nn.Linear):
    def forward(self, x):
        """In training by local reparameterisation (arXiv 1506.02557): as if each row of x had drawn its own weights."""
        if not self.training:
            return F.linear(x, self.drawn, self.bias)
        mean = F.linear(x, self.weight, self.bias)
        variance = F.linear(x.square(), F.softplus(self.rho).square())
        return mean + variance.clamp(min=1e-20).sqrt() * torch.randn_like(mean)


def bayesian_layers(net):
    return [layer for layer in net.modules() if hasattr(layer, "rho")]


def make_bayesian(net, ratios=repeat(0.02)):
    """In place, all convolutions and linear layers but a classifier; sigma = ratio * standard deviation of weights."""
    kinds = {nn.Conv2d: BayesConv2d, nn.Linear: BayesLinear}
    layers = [layer for name, layer in net.named_modules() if type(layer) in kinds and name != "classifier"]
    for layer, ratio in zip(layers, ratios):
        layer.__class__ = kinds[type(layer)]
        sigma = ratio * layer.weight.detach().std()
        layer.rho = nn.Parameter(torch.ones_like(layer.weight) * (sigma + torch.log(-torch.expm1(-sigma))))


def relative_sigmas(net):
    """For each Bayesian layer, sigma (root mean square) by the standard deviation of the weights."""
    return [(F.softplus(one.rho).square().mean().sqrt() / one.weight.std()).item() for one in bayesian_layers(net)]


def kl_divergence(net, prior_std):
    """KL(q || N(0, prior_std^2)) in nats, the sum over all Bayesian weights; no gradient on mu but weight decay."""
    pairs = [(F.softplus(layer.rho) / prior_std, layer.weight.detach() / prior_std) for layer in bayesian_layers(net)]
    return sum((sigma.square() / 2 + mu.square() / 2 - sigma.log() - 0.5).sum() for sigma, mu in pairs)


@torch.no_grad()
def draw(net, seed=None):
    """Fix the weights of evaluation: one draw from q, the same for every image; with no seed, the means."""
    generator = torch.Generator(next(net.parameters()).device).manual_seed(seed or 0)
    for layer in bayesian_layers(net):
        eps = 0.0 if seed is None else torch.randn(layer.rho.shape, generator=generator, device=layer.rho.device)
        layer.drawn = layer.weight + F.softplus(layer.rho) * eps


# -------- Model. B batch, C channels; an encoder maps (B, 3, 32, 32) to (B, 8 width).

def convolution(c_in, c_out, stride, size=3):
    layer = nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    return nn.Sequential(layer, nn.BatchNorm2d(c_out))


class Residual(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.main = nn.Sequential(convolution(c_in, c_out, stride), nn.ReLU(), convolution(c_out, c_out, 1))
        self.skip = nn.Identity() if c_in == c_out else convolution(c_in, c_out, stride, 1)

    def forward(self, x):
        return F.relu(self.main(x) + self.skip(x))


class Block(nn.Module):
    """Of a vision transformer: attention, then an MLP, each of normalised x (B, T, D) and scaled (LayerScale)."""
    def __init__(self, D, attention):
        super().__init__()
        self.attention = dict(sigmoid=sigmoid_attention, softmax=F.scaled_dot_product_attention)[attention]
        self.qkv = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
        self.scale = nn.ParameterList(torch.full((D,), 0.1) for _ in range(2))

    def forward(self, x):
        qkv = self.qkv(F.rms_norm(x, x.shape[2:])).unflatten(2, (3, -1, 32))                # heads of 32 channels
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                                # (B, H, T, 32)
        q, k = F.rms_norm(q, (32,)), F.rms_norm(k, (32,))
        x = x + self.scale[0] * self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.scale[1] * self.mlp(F.rms_norm(x, x.shape[2:]))


class ViT(nn.Module):
    """Patches of 4 x 4, six blocks, the mean over tokens; sigmoid attention (arXiv 2409.04431) has b = -log T."""
    def __init__(self, D, attention):
        super().__init__()
        self.patches = nn.Conv2d(3, D, 4, 4)
        self.positions = nn.Parameter(0.02 * torch.randn(64, D))
        self.blocks = nn.Sequential(*(Block(D, attention) for _ in range(6)))

    def forward(self, x):
        x = self.blocks(self.patches(x).flatten(2).mT + self.positions)                     # (B, 64, D)
        return F.rms_norm(x, x.shape[2:]).mean(1)


def make_network(args):
    """Encoder, projector and predictor; supervised, encoder and classifier."""
    C = args.width
    layers = [convolution(3, C, 1), nn.ReLU()]  # for small images: 3 x 3, no pooling
    for c_in, c_out, stride in ((C, C, 1), (C, 2 * C, 2), (2 * C, 4 * C, 2), (4 * C, 8 * C, 2)):
        layers += [Residual(c_in, c_out, stride), Residual(c_out, c_out, 1)]
    if args.encoder == "conv":
        channels = (3, C, 2 * C, 4 * C, 8 * C)
        layers = [nn.Sequential(convolution(*pair, 2), nn.ReLU()) for pair in zip(channels, channels[1:])]
    encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if args.encoder == "vit":
        encoder = ViT(8 * C, args.attn)
    net = nn.ModuleDict(dict(encoder=encoder))
    if "supervised" in args.arm:
        net["classifier"] = nn.Linear(8 * C, 10)
    else:
        for name, D in (("projector", 8 * C), ("predictor", 256)):
            net[name] = nn.Sequential(nn.Linear(D, 16 * C), nn.BatchNorm1d(16 * C), nn.ReLU(), nn.Linear(16 * C, 256))
    return net


# -------- Loss

def loss_terms(online, target, views, labels, args):
    """(loss, KL, embedding (2B, D)) of views (2B, 3, 32, 32), first all first views. BYOL's loss, from 0 to 8, is the
    sum of both directions and the mean over images; the supervised loss is cross-entropy."""
    h = online.encoder(views)                                                               # (2B, 8 width)
    kl = kl_divergence(online, args.prior_std)
    if "supervised" in args.arm:
        return F.cross_entropy(online.classifier(h).float(), labels.repeat(2)), kl, h.detach().float()
    z = online.projector(h)                                                                 # (2B, 256)
    with torch.no_grad():
        t = target.projector(target.encoder(views)).roll(len(z) // 2, 0)  # each row that of the other view
    cosine = F.cosine_similarity(online.predictor(z).float(), t.float())
    return 4 - 4 * cosine.mean(), kl, z.detach().float()


# -------- Evaluation. N images, S draws of the weights, K classes; probs (N, K).

@torch.no_grad()
def features(net, images, autocast, seeds=(None,)):
    """The encoder on images (N, 3, 32, 32) uint8 under a draw of the weights for each seed: (S, N, D)."""
    net.eval()
    draws = []
    for seed in seeds:
        draw(net, seed)
        with autocast:
            draws.append(torch.cat([net.encoder(normalise(some.float() / 255)) for some in images.split(4000)]))
    return torch.stack(draws)


@torch.no_grad()
def evaluate(net, data, args, autocast):
    """On test: metrics, predictions {(condition, variant): probs (N, K)}, predictive_std of clean images. Conditions
    are [COUNT_labels_][CORRUPTION_SEVERITY_]; variants "", _scaled (temperature for val), _S_draws, _mean_weights."""
    (train_x, train_y), (val_x, val_y), (test_x, test_y) = (data[part] for part in ("train", "val", "test"))
    seeds = range(args.seed, args.seed + args.samples) if bayesian_layers(net) else [None]
    bank, queries = (features(net, images, autocast)[0] for images in (train_x, test_x))
    val_h = features(net, val_x, autocast, seeds)
    if "supervised" in args.arm:
        heads = {"": lambda h: net.classifier(h.float())}
    else:
        heads = {f"{n}_labels_" if i else "":
                 fit_probe(features(net, train_x[:n or None], autocast, seeds), train_y[:n or None])
                 for i, n in enumerate(args.probe_labels)}
    predictions, stds = {}, {}
    val = {prefix: head(val_h).softmax(-1).mean(0) for prefix, head in heads.items()}
    strange = [] if args.data == "glyphs" else [("strange_", load_images("glyphs")[0]["test"][0].to(test_x.device))]
    for condition, images in [*conditions(test_x, args.corruptions), *strange]:
        h = features(net, images, autocast, seeds)
        for prefix, head in heads.items():
            draws = head(h).softmax(-1)                                                         # (S, N, K)
            variants = {"": draws.mean(0), "_scaled": temperature_scale(draws.mean(0), val[prefix], val_y)}
            if not condition:
                variants |= {f"_{s}_draws": draws[:s].mean(0) for s in (1, 4, 8) if s < len(seeds)}
                variants["_mean_weights"] = head(queries).softmax(-1)
                stds = stds or (predictive_std(draws) if len(draws) > 1 else {})
            predictions |= {(prefix + condition, variant): probs for variant, probs in variants.items()}
    metrics = dict(knn_acc=knn_accuracy(bank, train_y, queries, test_y)) | measure_all(predictions, test_y)
    return metrics | gaussianity(stds), predictions, stds


# -------- Training

def train(args, data, device, autocast, out_dir):
    """Train on data["train"]; checkpoint.pt and log.jsonl go to out_dir. Returns (network, seconds)."""
    first, seconds = 0, 0.0
    path = out_dir / "checkpoint.pt"
    images, labels = data["train"]
    torch.manual_seed(args.seed)
    online = make_network(args).to(device, memory_format=torch.channels_last)
    target = copy.deepcopy(online).requires_grad_(False)  # of the means: it has no posterior
    if args.arm in ("BYOV", "supervised BBB"):
        make_bayesian(online)
    on_gpu = device.type == "cuda"
    views_of, terms_of = map(torch.compile, (two_views, loss_terms)) if on_gpu else (two_views, loss_terms)
    means = {name: p for name, p in online.named_parameters() if not name.endswith("rho")}
    sources, averages = [*means.values()], [*target.parameters()]
    groups = [dict(params=[p for name, p in means.items() if (p.dim() > 1, "predictor" in name) == (matrix, quick)],
                   weight_decay=args.weight_decay * matrix, peak=args.lr * (10 if quick else 1))
              for matrix, quick in product((False, True), repeat=2)]
    rhos = dict(params=[layer.rho for layer in bayesian_layers(online)], peak=0.01)
    kind = functools.partial(torch.optim.SGD, momentum=0.9) if args.encoder != "vit" else torch.optim.AdamW
    optimizers = [kind(groups, fused=on_gpu), torch.optim.Adam([rhos], fused=on_gpu)]
    parts = dict(online=online, target=target, **{type(o).__name__: o for o in optimizers})
    if args.resume and path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        pairs = [(key, saved["args"].get(key), getattr(args, key)) for key in TRAINING]
        if differing := [f"{key} {then} there, {now} here" for key, then, now in pairs if then != now]:
            fail(f"--resume: {path} is of another run: {'; '.join(differing)}")
        first, seconds = saved["step"], saved["seconds"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    out_dir.mkdir(parents=True, exist_ok=True)
    log = open(out_dir / "log.jsonl", "a" if first else "w", buffering=1)
    log.write(json.dumps(dict(config=vars(args), device=str(device), torch=torch.__version__)) + "\n")

    terms = []

    def backward():
        """The gradients for a drawn batch, in place of the last ones; terms become (fit, KL, embedding)."""
        online.train().zero_grad()
        batch = torch.randint(len(images), (args.batch,), device=device)
        views = views_of(images[batch], args.data)
        with autocast:
            fit, kl, embedding = terms_of(online, target, views, labels[batch], args)
        (fit + args.weight_decay * args.prior_std ** 2 * kl).backward()
        terms[:] = fit.detach(), torch.as_tensor(kl).detach(), embedding

    stop = []  # Ctrl-C lets the step in progress end; a second one does not wait
    previous = signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if stop else stop.append(True))
    began = time.time() - seconds
    bar = tqdm(range(first, args.steps), out_dir.name, args.steps, initial=first, mininterval=1)
    for step in bar:
        warmup = args.steps // 10  # then a cosine to zero
        cosine = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (args.steps - warmup))
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = group["peak"] * min((step + 1) / max(1, warmup), cosine)
        torch.manual_seed(1_000_003 * args.seed + step)  # nothing else decides batch, views, draws: resuming is exact
        if on_gpu and step == first + 3:  # all is compiled by now: hundreds of launches become one
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                backward()
            backward = graph.replay  # which fills the same tensors anew
        backward()
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():  # target <- tau target + (1 - tau) online, and tau rises to 1
            torch._foreach_lerp_(averages, sources, (1 - args.tau) * (1 + math.cos(math.pi * step / args.steps)) / 2)
        due = step + 1 == args.steps or (step + 1) % args.eval_interval == 0 or stop
        if not due and (step + 1) % 10:
            continue
        fit, kl, embedding = terms
        spread = 16 * F.normalize(embedding).std(0).mean().item()  # of 256 dimensions; healthy: near 1
        bar.set_postfix(fit=f"{fit.item():.3f}", spread=f"{spread:.2f}", refresh=False)
        if spread < 0.1 or not math.isfinite((fit + kl).item()):
            fail(f"step {step + 1}: {'collapsed' if spread < 0.1 else 'diverged'}, loss {fit.item()}, KL {kl.item()}, "
                 f"learning rate {group['lr']:.2e}\nHINT: a smaller --lr, a larger --tau or a smaller --prior_std", 1)
        if due:
            bank, queries = (features(online, some, autocast)[0] for some in (images[:10_000], data["val"][0]))
            covariance, ratios, seconds = queries.float().T.cov(), relative_sigmas(online), time.time() - began
            record = dict(step=step + 1, seconds=seconds, fit=fit.item(), kl=kl.item(), spread=spread,
                          sigma_over_mu=sum(ratios) / max(1, len(ratios)),
                          effective_rank=(covariance.trace() ** 2 / covariance.square().sum()).item(),
                          val_knn_acc=knn_accuracy(bank, labels[:10_000], queries, data["val"][1]))
            log.write(json.dumps(record) + "\n")
            bar.write("  ".join(f"{key} {value:.4g}" for key, value in record.items()))
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save(dict(args=vars(args), step=step + 1, seconds=seconds, **state), path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)  # so that a kill leaves the old checkpoint whole
        if stop:
            fail(f"interrupted at step {step + 1}; {path} is saved, --resume goes on", 130)
    signal.signal(signal.SIGINT, previous)
    return online, seconds


# -------- The paper's claims

def compare(args, data, device, autocast, out_dir):
    """Trains each arm with each seed, for equal steps: {arm: [what evaluate returns, for each seed]}."""
    nets, runs = {}, {}
    for seed, name in product(range(args.seed, args.seed + args.seeds), args.compare):
        arm = argparse.Namespace(**vars(args) | dict(arm=name, seed=seed))
        if name == "BYOL+noise":  # of the size, relative to the weights of a layer, that BYOV learned there
            nets[name], seconds = nets["BYOL"], 0.0
            make_bayesian(nets[name], relative_sigmas(nets["BYOV"]))
        else:
            nets[name], seconds = train(arm, data, device, autocast, out_dir / f"{name}_seed_{seed}".replace(" ", "_"))
        metrics, *rest = evaluate(nets[name], data, arm, autocast)
        runs.setdefault(name, []).append((dict(seconds=seconds) | metrics, *rest))
    return runs


def plot(path, rows, runs, labels, corruption):
    """ECE and Brier score against severity, mean ± std over seeds; reliability; how sure two models are, compared."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(14, 6), layout="constrained")
    above, below = figure.subplots(2, 3)
    for axis, metric, label in zip(above, ("ece", "brier"), ("ECE, %", "Brier score, %")):
        keys = [metric, *(f"{corruption}_{i}_{metric}" for i in range(1, 6))]
        for row in [row for row in rows if metric in row and " - " not in row["name"]]:
            axis.errorbar(range(6), [100 * row[key] for key in keys], [100 * row.get(f"{key}_std", 0) for key in keys],
                          capsize=2, label=row["name"])
        axis.set(xlabel=f"severity of {corruption}", ylabel=label)
    figure.legend(*above[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    for axis, condition in zip(below, ("", f"{corruption}_3_", f"{corruption}_5_")):
        for some in runs.values():
            probs = torch.cat([predictions[condition, ""] for _, predictions, _ in some])
            share, confidence, accuracy = calibration(probs, labels.repeat(len(some))).cpu()
            axis.plot(confidence[share > 1e-3], (accuracy - confidence)[share > 1e-3], ".-")
        axis.set(xlabel=f"confidence, {condition.strip('_') or 'clean'}", ylabel="accuracy - confidence")
    if {"BYOV", "supervised BBB"} <= runs.keys():
        pairs = zip(runs["BYOV"], runs["supervised BBB"])
        x = torch.cat([a["std"] - b["std"] for (*_, a), (*_, b) in pairs]).sort().values.cpu()
        above[2].hist(x, 100, density=True, color="0.8")
        above[2].plot(x, torch.distributions.Normal(x.mean(), x.std()).log_prob(x).exp(), "k")
        above[2].set(xlabel="predictive std, BYOV less supervised BBB", ylabel="density, and a Gaussian fit")
    figure.savefig(path, dpi=150)


# -------- Arguments

def fail(message, status=2):
    tqdm.write(f"ERROR: {message}", file=sys.stderr)  # clear of a progress bar
    raise SystemExit(status)


def parse(argv):
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    parser = argparse.ArgumentParser(description="BYOV", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail
    groups = map(parser.add_argument_group, ("data", "model", "optimisation", "evaluation", "run"))
    data, model, optimisation, evaluation, run = (group.add_argument for group in groups)
    data("--data", choices=tuple(DEFAULTS), default="glyphs" if there[0] == "cpu" else "cifar10", help="images")
    model("--encoder", choices=("resnet18", "vit", "conv"), help="for 3 x 32 x 32")
    model("--attn", choices=("sigmoid", "softmax"), default="sigmoid", help="of vit")
    model("--width", type=int, help="channels of the first layer; an encoder gives 8 times as many")
    model("--prior_std", type=float, help="of the prior, and the most that sigma grows to")
    optimisation("--steps", type=int, help="optimiser steps of a run")
    optimisation("--batch", type=int, default=128, help="images a step")
    optimisation("--lr", type=float, default=0.1, help="peak learning rate of SGD")
    optimisation("--weight_decay", type=float, default=5e-4, help="of matrices; lambda is this * prior_std^2")
    optimisation("--tau", type=float, default=0.97, help="first share that the target keeps a step; ends at 1")
    evaluation("--samples", type=int, default=16, help="draws of the weights, averaged")
    evaluation("--probe_labels", type=int, nargs="+", help="labels that a probe sees, 0 for all; a probe for each")
    evaluation("--corruptions", nargs="+", choices=CORRUPTIONS, default=["salt_and_pepper"], help="of the test images")
    run("--compare", nargs="*", choices=ARMS, metavar="ARM", help=f"some of {', '.join(ARMS)}; none is all")
    run("--seeds", type=int, default=1, help="runs of each arm, up to 10")
    run("--seed", type=int, default=1337, help="of weights, batches, views and draws")
    run("--plot", metavar="FILE.png", help="draw calibration, and predictive stds")
    run("--out_dir", default="out/byov", help="for metrics.json, and a folder for each arm and seed")
    run("--resume", action="store_true", help="go on from the checkpoints in out_dir, bit for bit")
    run("--eval_interval", type=int, default=2500, help="steps between evaluations, each with a checkpoint")
    run("--device", choices=there, default=there[0], help="of what this machine has")
    parser.set_defaults(**DEFAULTS[parser.get_default("data")], arm="BYOV")
    chosen = parser.parse_args(argv)
    parser.set_defaults(**DEFAULTS[chosen.data] | (VIT if chosen.encoder == "vit" else {}))
    args = parser.parse_args(argv)
    args.compare = [*ARMS] if args.compare == [] else args.compare or ["BYOV"]
    allowed = dict(width=(1, 1e4), prior_std=(1e-6, 1e3), steps=(1, 1e9), batch=(2, 1e6), lr=(1e-9, 1e3), tau=(0, 1),
                   weight_decay=(0, 1), samples=(1, 1e4), seeds=(1, 10), seed=(0, 1e9), eval_interval=(1, 1e9))
    for name, (low, high) in allowed.items():
        if not low <= getattr(args, name) <= high:
            fail(f"--{name} {getattr(args, name)}; allowed: {low} to {high:g}")
    if "BYOL+noise" in args.compare and args.compare[:2] != ["BYOL", "BYOV"]:
        fail("--compare: BYOL+noise only after BYOL BYOV")
    if args.encoder == "vit" and args.width % 4:
        fail(f"--width {args.width}; allowed with --encoder vit: multiples of 4, for heads of 32 channels")
    if args.plot and not (Path(args.plot).absolute().parent.is_dir() and importlib.util.find_spec("matplotlib")):
        fail(f"--plot {args.plot}; allowed: a file in a folder that is there, and pip install matplotlib")
    return args


def main(argv=None):
    """Train and measure, or compare, as the flags say; returns what is in metrics.json."""
    signal.signal(signal.SIGINT, lambda *_: fail("interrupted", 130))
    args = parse(argv)
    out_dir, device = Path(args.out_dir), torch.device(args.device)
    try:
        data, dataset = load_images(args.data)
    except (OSError, ValueError) as error:
        given = sys.argv[1:] if argv is None else argv
        if "--data" in given or isinstance(error, ValueError):
            fail(f"--data {args.data}: {error}")
        print(f"CIFAR-10: no download ({error.__cause__}), so --data glyphs, drawn digits")
        return main([*given, "--data", "glyphs"])
    data = {part: tuple(x.to(device) for x in pair) for part, pair in data.items()}
    torch.backends.cudnn.benchmark = True
    bf16 = args.device == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=bf16)
    name = torch.cuda.get_device_name(device) if args.device == "cuda" else args.device
    print(f"{name}, {'bfloat16 (capability 8.0 or more)' if bf16 else 'float32 (no fast bfloat16)'}, {dataset}, "
          f"{sum(p.numel() for p in make_network(args).parameters()):,} parameters")
    runs = compare(args, data, device, autocast, out_dir)
    rows = summarise(runs, data["test"][1])
    print(table(rows))
    result = dict(rows=rows) if len(rows) > 1 else rows[0]
    result.update(device=name, dataset=dataset, seed=args.seed, steps=args.steps, torch=torch.__version__)
    (out_dir / "metrics.json").write_text(json.dumps(result, indent=1))
    if args.plot:
        plot(args.plot, rows, runs, data["test"][1], args.corruptions[0])
    return result


if __name__ == "__main__":
    main()
