"""
BYOL whose weights know what they don't know ("Bootstrap Your Own Variance", BYOV, arXiv 2312.03213).

Bootstrap Your Own Latent (BYOL) learns from two views of an image, without labels: the online network predicts, from
one view, what a slowly moving average of it, the target, makes of the other. Bayes by Backprop (BBB) puts a Gaussian on
every weight and learns its mean and its width. BYOV does both at once:

    w ~ q = N(mu, softplus(rho)^2)      loss = 2 - 2 cos(p1, t2) + 2 - 2 cos(p2, t1) + lambda KL(q || N(0, prior_std^2))

p1 and p2 come from two draws of the online weights, t1 and t2 from the target, an average of mu. The KL is a sum over
weights; lambda = weight_decay * prior_std^2 makes its gradient on mu plain weight decay, and mu gets no other.

    python byov.py                trains BYOV, then measures a linear probe, on clean and corrupted images
    python byov.py --compare      BYOL, BYOV, supervised, BBB; controls: BYOL with untrained noise, BYOL ensemble

On a GPU the data are CIFAR-10, on a CPU drawn digits. Of the paper only the abstract was known: the rest is our choice.
"""
import argparse
import copy
import importlib.util
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data.augment import augment
from data.cifar10 import load_cifar10
from data.corruptions import CORRUPTIONS, corrupt
from data.glyphs import load_glyphs

DEFAULTS = {
    "glyphs": dict(encoder="conv", width=16, hidden=256, batch=128, steps=300, lr=0.1, weight_decay=5e-4, samples=16,
                   prior_std=0.05, probe_labels=300, corruptions=["salt_and_pepper"],
                   views=dict(crop=0.4, flip=0.0, hue=0.0, grey=0.0)),
    "cifar10": dict(encoder="resnet18", width=64, hidden=1024, batch=512, steps=15600, lr=0.06, weight_decay=2e-3,
                    samples=32, prior_std=0.005, probe_labels=0,
                    corruptions=[*CORRUPTIONS], views=dict(crop=0.08, flip=0.5, hue=0.1, grey=0.2)),
}
ARMS = {"BYOL": ("byol", False), "BYOV": ("byol", True), "supervised": ("supervised", False),
        "BBB": ("supervised", True)}
ARCHITECTURE = "data encoder width hidden objective bayes".split()
COLUMNS = "knn_acc linear_acc nll brier ece ece_scaled salt_and_pepper_ece salt_and_pepper_brier".split()


# -------- Bayesian layers: every weight has its own N(weight, softplus(rho)^2); biases and norms are plain.

class BayesConv2d(nn.Conv2d):
    """In training one draw of the weights a pass, shared by batch and positions; else the weights in `drawn`."""

    def forward(self, x):
        if not self.training:
            return self._conv_forward(x, self.drawn, self.bias)
        return self._conv_forward(x, self.weight + F.softplus(self.rho) * torch.randn_like(self.weight), self.bias)


class BayesLinear(nn.Linear):
    """In training by local reparameterisation (arXiv 1506.02557): each row of x as if it had drawn its own weights."""

    def forward(self, x):
        if not self.training:
            return F.linear(x, self.drawn, self.bias)
        mean = F.linear(x, self.weight, self.bias)
        variance = F.linear(x.square(), F.softplus(self.rho).square())
        return mean + variance.clamp(min=1e-20).sqrt() * torch.randn_like(mean)


def set_sigma(layer, sigma):
    """rho such that softplus(rho) = sigma, a scalar tensor."""
    layer.rho.data.fill_(sigma + torch.log(-torch.expm1(-sigma)))


def make_bayesian(net, alpha, skip=""):
    """In place, each convolution and linear layer of net but `skip` gets sigma = alpha * the std of its weights."""
    for name, layer in net.named_modules():
        if name != skip and type(layer) in (nn.Conv2d, nn.Linear):
            layer.__class__ = BayesConv2d if type(layer) is nn.Conv2d else BayesLinear
            layer.rho = nn.Parameter(torch.empty_like(layer.weight))
            set_sigma(layer, alpha * layer.weight.detach().std())


def bayesian_layers(net):
    return [layer for layer in net.modules() if hasattr(layer, "rho")]


def kl_divergence(net, prior_std):
    """KL(q || N(0, prior_std^2)) in nats, a scalar: the sum over all Bayesian weights, in closed form."""
    total = 0.0
    for layer in bayesian_layers(net):
        ratio = F.softplus(layer.rho) / prior_std
        total = total + (ratio.square() / 2 + (layer.weight / prior_std).square() / 2 - ratio.log() - 0.5).sum()
    return total


@torch.no_grad()
def draw(net, seed=None):
    """Fix the weights of evaluation: one draw from q, the same for every image; with no seed, the means."""
    generator = torch.Generator(next(net.parameters()).device).manual_seed(seed or 0)
    for layer in bayesian_layers(net):
        layer.drawn = layer.weight.detach()
        if seed is not None:
            eps = torch.randn(layer.rho.shape, generator=generator, device=layer.rho.device)
            layer.drawn = layer.weight + F.softplus(layer.rho) * eps


# -------- Model. B batch, C channels; an encoder maps (B, 3, 32, 32) to (B, 8 width).

def convolution(c_in, c_out, stride, size=3):
    return nn.Sequential(nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=False), nn.BatchNorm2d(c_out))


class Residual(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.main = nn.Sequential(convolution(c_in, c_out, stride), nn.ReLU(), convolution(c_out, c_out, 1))
        self.skip = nn.Identity() if c_in == c_out else convolution(c_in, c_out, stride, 1)

    def forward(self, x):
        return F.relu(self.main(x) + self.skip(x))


def make_head(c_in, hidden, c_out):
    return nn.Sequential(nn.Linear(c_in, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, c_out))


class Network(nn.Module):
    """Encoder, projector, predictor, and a classifier: a probe that watches BYOL train, or what supervision trains."""

    def __init__(self, args):
        super().__init__()
        C = args.width
        layers = [convolution(3, C, 1), nn.ReLU()]  # for small images: 3 x 3, no pooling
        for c_in, c_out, stride in ((C, C, 1), (C, 2 * C, 2), (2 * C, 4 * C, 2), (4 * C, 8 * C, 2)):
            layers += [Residual(c_in, c_out, stride), Residual(c_out, c_out, 1)]
        if args.encoder == "conv":
            channels = (3, C, 2 * C, 4 * C, 8 * C)
            layers = [nn.Sequential(convolution(*pair, 2), nn.ReLU()) for pair in zip(channels, channels[1:])]
        self.encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        for layer in self.encoder.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        self.classifier = nn.Linear(8 * C, 10)
        if args.objective == "byol":
            self.projector, self.predictor = make_head(8 * C, args.hidden, 256), make_head(256, args.hidden, 256)


def make_networks(args, device):
    """(online, target): the target starts as a copy, has no posterior and never gets a gradient."""
    online = Network(args).to(device, memory_format=torch.channels_last)
    target = copy.deepcopy(online).requires_grad_(False)
    if args.bayes:
        make_bayesian(online, args.alpha, skip="classifier" if args.objective == "byol" else "")
    return online, target


def normalise(x):
    """Images in [0, 1] to about mean 0 and std 1."""
    return ((x - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)


# -------- Loss

def loss_terms(online, target, view1, view2, labels):
    """(loss, loss of the watching probe, embedding (B, D)). BYOL's loss: 0 to 8, both directions summed, the mean over
    the batch. Without a projector, cross-entropy of view 1."""
    h1 = online.encoder(view1)                                                              # (B, 8 width)
    if not hasattr(online, "projector"):
        return F.cross_entropy(online.classifier(h1).float(), labels), h1.new_zeros(()), h1.detach().float()
    z1, z2 = online.projector(h1), online.projector(online.encoder(view2))                  # (B, 256)
    with torch.no_grad():
        t1, t2 = (target.projector(target.encoder(view)) for view in (view1, view2))
    cos1, cos2 = (F.cosine_similarity(online.predictor(z).float(), t.float()) for z, t in ((z1, t2), (z2, t1)))
    probe = F.cross_entropy(online.classifier(h1.detach()).float(), labels)
    return (4 - 2 * cos1 - 2 * cos2).mean(), probe, z1.detach().float()


@torch.no_grad()
def update_target(online, target, tau):
    """target <- tau target + (1 - tau) online for every parameter, mu where there is a posterior."""
    sources = dict(online.named_parameters())
    for name, average in target.named_parameters():
        average.lerp_(sources[name], 1 - tau)


# -------- Evaluation. N images, S draws of the weights, K classes; probs (N, K).

def measure(probs, labels):
    """Accuracy; NLL in nats; Brier score sum_k (p_k - y_k)^2, 0 to 2, and the same over K; ECE of the largest
    probability with 15 bins of equal width, and of equal mass."""
    (N, K), (confidence, guess) = probs.shape, probs.max(1)
    right = (guess == labels).float()
    brier = (probs - F.one_hot(labels, K)).square().sum(1).mean().item()

    def ece(bins):
        return (torch.zeros(15, device=bins.device).index_add(0, bins, right - confidence).abs().sum() / N).item()

    return dict(linear_acc=right.mean().item(), nll=F.nll_loss(probs.clamp(min=1e-12).log(), labels).item(),
                brier=brier, brier_per_class=brier / K, ece=ece((15 * confidence).long().clamp(max=14)),
                ece_adaptive=ece(confidence.argsort().argsort() * 15 // N))


def temperature_scale(probs, val_probs, val_labels):
    """probs at the temperature, of 141 from 0.2 to 5, with the least NLL on the validation images."""
    logits, val_logits = probs.clamp(min=1e-12).log(), val_probs.clamp(min=1e-12).log()
    temperatures = torch.logspace(-0.7, 0.7, 141, device=probs.device)
    best = torch.stack([F.cross_entropy(val_logits / t, val_labels) for t in temperatures]).argmin()
    return (logits / temperatures[best]).softmax(-1)


@torch.no_grad()
def features(net, images, autocast):
    """The encoder on images (N, 3, 32, 32) uint8, with the weights that `draw` fixed: (N, D) float32."""
    net.eval()
    with autocast:
        return torch.cat([net.encoder(normalise(some.float() / 255)).float() for some in images.split(1000)])


def knn_accuracy(bank, bank_labels, queries, labels):
    """A vote of the 200 nearest by cosine, weighted by exp(cosine / 0.1)."""
    cosine, nearest = (F.normalize(queries) @ F.normalize(bank).T).topk(200)                # (N, 200)
    votes = torch.zeros(len(queries), 10, device=bank.device).scatter_add(1, bank_labels[nearest], (cosine / 0.1).exp())
    return (votes.argmax(1) == labels).float().mean().item()


@torch.enable_grad()
def fit_probe(draws, labels, l2):
    """The linear layer, as a function of features (N, D), with the least mean cross-entropy + l2 / 2 |W|^2 over
    draws (S, N, D), standardised features of the same N images under S draws of the weights."""
    mean, std = draws.mean((0, 1)), draws.std((0, 1)) + 1e-6
    x, y = ((draws - mean) / std).flatten(0, 1), labels.repeat(len(draws))
    probe = nn.Linear(x.shape[1], 10, device=x.device)
    nn.init.zeros_(probe.weight)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(x), y) + l2 / 2 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda h: probe((h - mean) / std)


@torch.no_grad()
def evaluate(net, data, args, autocast):
    """(metrics, found). The probe is fitted to train, the temperature to val, all else measured on test. found holds
    probs {("clean", 0) or (corruption, severity): (N, K)}, those of val, and std (N,): that of the predicted class's
    probability over draws. Uses draws of its own, whatever training drew."""
    (train_x, train_y), (val_x, val_y), (test_x, test_y) = (data[part] for part in ("train", "val", "test"))
    draw(net)
    bank, queries = (features(net, images, autocast) for images in (train_x, test_x))
    metrics = dict(knn_acc=knn_accuracy(bank, train_y, queries, test_y))
    seeds = [args.seed + s for s in range(args.samples)] if bayesian_layers(net) else [None]
    head, some = net.classifier, args.probe_labels or len(train_y)

    def each_draw(images):
        for seed in seeds:
            draw(net, seed)
            yield features(net, images, autocast)

    if hasattr(net, "projector"):
        draws = [h for h, _ in zip(each_draw(train_x[:some]), range(4))]
        head = fit_probe(torch.stack(draws), train_y[:some], args.probe_l2)

    def predict(images):
        return torch.stack([head(h).softmax(-1) for h in each_draw(images)])        # (S, N, K)

    samples, val = predict(test_x), predict(val_x).mean(0)
    probs = {("clean", 0): samples.mean(0)}
    for name in args.corruptions:
        probs |= {(name, i): predict(corrupt(test_x, name, i)).mean(0) for i in range(1, 6)}
    metrics |= summarise(probs, val, data)
    std = samples.std(0, correction=min(1, len(seeds) - 1))
    std = std.gather(1, probs["clean", 0].argmax(1, keepdim=True))[:, 0]
    if len(seeds) > 1:
        draw(net)
        fewer = {f"{s}_draws": samples[:s].mean(0) for s in (1, 4, 8, 16) if s < len(seeds)}
        for name, p in (fewer | dict(mean_weights=head(features(net, test_x, autocast)).softmax(-1))).items():
            metrics |= {f"{key}_{name}": value for key, value in measure(p, test_y).items()}
        metrics["predictive_std"] = std.mean().item()
    return metrics, dict(probs=probs, val=val, std=std)


def summarise(probs, val, data):
    """Metrics of probs, as `evaluate` finds them, before and after temperature scaling: clean, each severity, and the
    mean of a corruption's five."""
    metrics = {}
    for (name, severity), p in probs.items():
        scaled = measure(temperature_scale(p, val, data["val"][1]), data["test"][1])
        found = measure(p, data["test"][1]) | {f"{key}_scaled": value for key, value in scaled.items()}
        metrics |= {key if name == "clean" else f"{name}_{severity}_{key}": value for key, value in found.items()}
        if severity == 5:
            metrics |= {f"{name}_{key}": sum(metrics[f"{name}_{i}_{key}"] for i in range(1, 6)) / 5 for key in found}
    return metrics


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


def train(args, data, device, autocast, out_dir):
    """Train one network on data["train"]; checkpoint.pt and log.jsonl go to out_dir. Returns (network, metrics).

    Ctrl-C saves and exits; an embedding that has collapsed stops the run."""
    began, first, path = time.time(), 0, out_dir / "checkpoint.pt"
    images, labels = data["train"]
    torch.manual_seed(args.seed)
    online, target = make_networks(args, device)
    on_gpu = device.type == "cuda"
    view_of, terms_of, kl_of = (torch.compile(f) if on_gpu else f for f in (augment, loss_terms, kl_divergence))
    means, widths = ([getattr(layer, name) for layer in bayesian_layers(online)] for name in ("weight", "rho"))
    bayesian = {id(p) for p in means + widths}
    plain = [p for p in online.parameters() if id(p) not in bayesian]
    groups = [dict(params=[p for p in plain if p.dim() > 1], weight_decay=args.weight_decay),
              dict(params=[p for p in plain if p.dim() == 1] + means, weight_decay=0.0)]  # the KL decays the means
    parts = dict(online=online, target=target, sgd=torch.optim.SGD(groups, args.lr, momentum=0.9, fused=on_gpu))
    if args.bayes:
        parts["adam"] = torch.optim.Adam(widths, args.lr_rho, fused=on_gpu)
    optimizers = [*parts.values()][2:]
    if args.resume and (path.exists() or not args.compare):
        saved = load_checkpoint(path, device, args)
        first = saved["step"]
        if first > args.steps:
            fail(f"--resume: {out_dir} is at step {first}; allowed: --steps {first} or more")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    out_dir.mkdir(parents=True, exist_ok=True)
    log = open(out_dir / "log.jsonl", "a" if first else "w", buffering=1)
    log.write(json.dumps(dict(config=vars(args), device=str(device), torch=torch.__version__)) + "\n")
    stop = []  # Ctrl-C lets the step in progress end; a second one does not wait
    previous = signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if stop else stop.append(True))
    seconds, counted, tick = 0.0, 0, None  # the clock of images/s leaves out compilation and evaluation
    bar = tqdm(total=args.steps, initial=first, desc=out_dir.name, mininterval=1)
    for step in range(first, args.steps):
        warmup = args.steps // 10  # then a cosine to zero
        cosine = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (args.steps - warmup))
        for optimizer, lr in zip(optimizers, (args.lr, args.lr_rho)):
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / max(1, warmup), cosine)
        torch.manual_seed(1_000_003 * args.seed + step)  # nothing else decides batch, views, draws: resuming is exact
        batch = torch.randint(len(images), (args.batch,), device=device)
        views = [normalise(view_of(images[batch], **args.views, solarised=share)) for share in (0.0, 0.2)]
        online.train()
        with autocast:
            fit, probe, embedding = terms_of(online, target, *views, labels[batch])
        kl = kl_of(online, args.prior_std) if args.bayes else torch.zeros(())
        loss = fit + probe + args.weight_decay * args.prior_std ** 2 * kl
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        update_target(online, target, 1 - (1 - args.tau) * (1 + math.cos(math.pi * step / args.steps)) / 2)
        bar.update()
        due = step + 1 == args.steps or (step + 1) % args.eval_interval == 0 or bool(stop)
        if due or (step + 1) % 10 == 0:
            if not math.isfinite(loss.item()):  # waits for the device, so that the clock tells the truth
                bar.close()
                fail(f"loss {loss.item()} at step {step}, learning rate {optimizers[0].param_groups[0]['lr']:.2e}", 1)
            if tick:
                seconds, counted = seconds + time.time() - tick[0], counted + step - tick[1]
            tick = time.time(), step
            spread = F.normalize(embedding).std(0).mean().item() * embedding.shape[1] ** 0.5  # healthy: near 1
            bar.set_postfix(fit=f"{fit.item():.3f}", spread=f"{spread:.2f}", refresh=False)
        if due:
            draw(online)
            bank, queries = (features(online, some, autocast) for some in (images[:10_000], data["val"][0]))
            share = torch.linalg.svdvals(queries - queries.mean(0)).square()
            share = share / share.sum()
            record = dict(step=step + 1, fit=fit.item(), probe=probe.item(), kl=kl.item(), spread=spread,
                          effective_rank=torch.special.entr(share).sum().exp().item(),
                          val_knn_acc=knn_accuracy(bank, labels[:10_000], queries, data["val"][1]))
            if args.bayes:
                record["sigma_over_mu"] = (sum(F.softplus(rho).sum() for rho in widths)
                                           / sum(mu.abs().sum() for mu in means)).item()
            log.write(json.dumps(record) + "\n")
            bar.write("  ".join(f"{key} {value:.4g}" for key, value in record.items()))
            save_checkpoint(path, dict({name: part.state_dict() for name, part in parts.items()}, args=vars(args),
                                       step=step + 1))
            tick = None
            if spread < 0.1:
                bar.close()
                fail(f"step {step + 1}: the embedding has collapsed, a dimension has {spread:.3f} of the std of a "
                     "healthy one\nHINT: a smaller --lr, a larger --tau or a smaller --prior_std", 1)
        if stop:
            bar.close()
            fail(f"interrupted at step {step + 1}; {path} is saved, --resume goes on", 130)
    bar.close()
    signal.signal(signal.SIGINT, previous)
    return online, dict(images_per_s=counted * args.batch / max(seconds, 1e-9), seconds=time.time() - began)


# -------- The paper's claims

def gaussian_fit(x):
    """Moments of x (N,), Kolmogorov-Smirnov distance to the normal of its mean and std, R^2 of the Q-Q line."""
    z = ((x - x.mean()) / x.std()).double().cpu().sort().values
    normal, grid = torch.distributions.Normal(0.0, 1.0), (torch.arange(len(z)).double() + 0.5) / len(z)
    return dict(mean=x.mean().item(), std=x.std().item(), skewness=(z ** 3).mean().item(),
                excess_kurtosis=(z ** 4).mean().item() - 3, ks=(normal.cdf(z) - grid).abs().max().item(),
                qq_r2=torch.corrcoef(torch.stack([z, normal.icdf(grid)]))[0, 1].item() ** 2)


def compare(args, data, device, autocast, out_dir):
    """Every arm with equal seeds, data and budget, and the controls. Returns (result, {arm: found of each seed})."""
    runs, founds = {}, {}
    for seed in range(args.seed, args.seed + args.seeds):
        nets = {}
        for name in args.arms:
            arm = argparse.Namespace(**vars(args) | dict(objective=ARMS[name][0], bayes=ARMS[name][1], seed=seed))
            nets[name] = train(arm, data, device, autocast, out_dir / f"{name}_seed_{seed}")
        if {"BYOL", "BYOV"} <= set(nets):  # control: noise of the size, layer by layer, that BYOV learned
            noisy = copy.deepcopy(nets["BYOL"][0])
            make_bayesian(noisy, args.alpha, skip="classifier")
            for layer, learned in zip(bayesian_layers(noisy), bayesian_layers(nets["BYOV"][0])):
                set_sigma(layer, F.softplus(learned.rho.detach()).square().mean().sqrt())
            nets["BYOL + noise"] = noisy, {}
        for name, (net, trained) in nets.items():
            metrics, found = evaluate(net, data, argparse.Namespace(**vars(args) | dict(seed=seed)), autocast)
            runs.setdefault(name, []).append(trained | metrics)
            founds.setdefault(name, []).append(found)
    if args.seeds > 1 and "BYOL" in runs:
        probs, val = [found["probs"] for found in founds["BYOL"]], [found["val"] for found in founds["BYOL"]]
        probs = {key: torch.stack([p[key] for p in probs]).mean(0) for key in probs[0]}
        runs[f"BYOL ensemble, {args.seeds}"] = [summarise(probs, torch.stack(val).mean(0), data)]
    result = dict(rows=[dict(name=name, seeds=len(found), **mean_and_std(found)) for name, found in runs.items()])
    if {"BYOL", "BYOV"} <= set(runs):
        pairs = [{key: b[key] - a[key] for key in a} for a, b in zip(runs["BYOL"], runs["BYOV"])]
        result["BYOV - BYOL"] = mean_and_std(pairs)
    if {"BYOV", "BBB"} <= set(runs):  # the paper's "predictive std of BYOV vs. BBB" admits several readings
        ours, theirs = (founds[name][0]["std"] for name in ("BYOV", "BBB"))
        readings = {"difference": ours - theirs, "BYOV": ours, "BBB": theirs, "log BYOV": ours.clamp(min=1e-9).log(),
                    "log BBB": theirs.clamp(min=1e-9).log()}
        if args.seeds > 1:
            readings["difference of two BBB seeds"] = theirs - founds["BBB"][1]["std"]
        result["predictive_std"] = {name: gaussian_fit(x) for name, x in readings.items()}
        result["predictive_std"]["correlation"] = torch.corrcoef(torch.stack([ours, theirs]))[0, 1].item()
    return result, founds


def mean_and_std(runs):
    values = {key: torch.tensor([run[key] for run in runs], dtype=torch.float64) for key in runs[0]}
    return {key: x.mean().item() for key, x in values.items()} | {
        f"{key}_std": x.std(correction=min(1, len(x) - 1)).item() for key, x in values.items()}


def plot(path, founds, labels):
    """Reliability, clean and at the strongest corruption; ECE against severity; the predictive std, BYOV - BBB."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    *reliability, severities, stds = figure.subplots(1, 4)
    names, keys = [name for name in founds if name in ("BYOL", "BYOV")], [*next(iter(founds.values()))[0]["probs"]]
    for axis, key in zip(reliability, (keys[0], keys[5])):
        for name in names:
            confidence, guess = torch.cat([found["probs"][key] for found in founds[name]]).cpu().max(1)
            right = (guess == labels.cpu().repeat(len(founds[name]))).float()
            bins = [(15 * confidence).long() == i for i in range(15)]
            points = [(confidence[some].mean(), right[some].mean()) for some in bins if some.sum() >= 10]
            axis.plot(*zip(*points), marker=".", label=name)
        axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axis.set(xlabel="confidence", ylabel="accuracy", title=f"{key[0]} {key[1] or ''}".replace("_", " "))
    reliability[0].legend(frameon=False)
    for name, runs in founds.items():
        ece = [sum(100 * measure(run["probs"][key], labels)["ece"] for run in runs) / len(runs) for key in keys[:6]]
        severities.plot(range(6), ece, marker=".", label=name)
    severities.set(xlabel="severity", ylabel="ECE, %", title=keys[1][0].replace("_", " "))
    severities.legend(frameon=False, fontsize="small")
    stds.set_visible("BYOV" in founds and "BBB" in founds)
    if stds.get_visible():
        x = (founds["BYOV"][0]["std"] - founds["BBB"][0]["std"]).cpu()
        stds.hist(x, 60, density=True)
        grid, gaussian = torch.linspace(x.min(), x.max(), 200), torch.distributions.Normal(x.mean(), x.std())
        stds.plot(grid, gaussian.log_prob(grid).exp(), label="Gaussian fit")
        stds.set(xlabel="predictive std, BYOV - BBB", ylabel="density")
        stds.legend(frameon=False)
    figure.savefig(path, dpi=150)


# -------- Arguments

def fail(message, status=2):
    print(f"ERROR: {message}", file=sys.stderr)
    raise SystemExit(status)


def load_data(name):
    """({"train", "val", "test": (images, labels)}, name)."""
    if name == "cifar10":
        return load_cifar10()
    images, labels = load_glyphs(14_000, size=32)
    images = images.expand(-1, 3, -1, -1)  # grey: in colour, what two views share is the colour, not the digit
    ends = dict(train=(0, 8000), val=(8000, 10_000), test=(10_000, 14_000))
    return {part: (images[a:b], labels[a:b]) for part, (a, b) in ends.items()}, "glyphs"


def parse(argv):
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    parser = argparse.ArgumentParser(description="BYOL + Bayes by Backprop (arXiv 2312.03213).",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail
    data = parser.add_argument_group("data").add_argument
    data("--data", choices=tuple(DEFAULTS), default="glyphs" if there[0] == "cpu" else "cifar10", help="images")
    model = parser.add_argument_group("model").add_argument
    model("--objective", choices=("byol", "supervised"), default="byol", help="what trains the encoder")
    model("--bayes", action=argparse.BooleanOptionalAction, default=True, help="a posterior over weights")
    model("--encoder", choices=("resnet18", "conv"), help="for 3 x 32 x 32")
    model("--width", type=int, help="channels of the first layer; an encoder gives 8 times as many")
    model("--hidden", type=int, help="width of projector and predictor")
    model("--alpha", type=float, default=0.02, help="first sigma over the std of a layer's weights")
    model("--prior_std", type=float, help="of the prior, and the most that sigma grows to")
    optimisation = parser.add_argument_group("optimisation").add_argument
    optimisation("--steps", type=int, help="optimiser steps of a run")
    optimisation("--batch", type=int, help="images a step")
    optimisation("--lr", type=float, help="peak learning rate of SGD")
    optimisation("--lr_rho", type=float, default=1e-2, help="peak learning rate of Adam, for rho")
    optimisation("--weight_decay", type=float, help="of matrices; lambda is this * prior_std^2")
    optimisation("--tau", type=float, default=0.99, help="first share that the target keeps a step; ends at 1")
    evaluation = parser.add_argument_group("evaluation").add_argument
    evaluation("--samples", type=int, help="draws of the weights, averaged")
    evaluation("--probe_l2", type=float, default=1e-4, help="weight decay of the linear probe")
    evaluation("--probe_labels", type=int, help="labels that the probe sees, 0 for all")
    evaluation("--corruptions", nargs="+", choices=tuple(CORRUPTIONS), help="each at five severities")
    run = parser.add_argument_group("run").add_argument
    run("--seeds", type=int, default=1, help="with --compare: runs an arm")
    run("--seed", type=int, default=1337, help="of weights, batches, views and draws")
    run("--plot", metavar="FILE.png", help="draw reliability, ECE and predictive std")
    run("--out_dir", default="out/byov", help="for checkpoint.pt, log.jsonl, metrics.json")
    run("--resume", action="store_true", help="go on from out_dir/checkpoint.pt, bit for bit; or from each run's")
    run("--eval_interval", type=int, default=500, help="steps between evaluations, each with a checkpoint")
    run("--compare", action="store_true", help="all of --arms and the controls, in one table")
    run("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), help="with --compare")
    run("--device", choices=there, default=there[0], help="of what this machine has")
    parser.set_defaults(**DEFAULTS[parser.parse_args(argv).data])
    args = parser.parse_args(argv)
    lowest = dict(steps=1, batch=2, width=1, hidden=1, seeds=1, samples=1, eval_interval=1, seed=0, lr=0, lr_rho=0,
                  weight_decay=0, probe_l2=0, probe_labels=0, alpha=1e-12, prior_std=1e-6, tau=0)
    for wrong, message in (
            *((not low <= getattr(args, name) < math.inf, f"--{name} {getattr(args, name)}; allowed: {low} or more")
              for name, low in lowest.items()),
            (args.tau > 1, f"--tau {args.tau}; allowed: up to 1"),
            (args.plot and not Path(args.plot).absolute().parent.is_dir(), f"--plot {args.plot}: no such folder"),
            (args.plot and not importlib.util.find_spec("matplotlib"), "--plot needs: pip install matplotlib")):
        if wrong:
            fail(message)
    return args


def main(argv=None):
    """Train and measure, or compare, as the flags say; returns what is in metrics.json."""
    args = parse(argv)
    out_dir, device = Path(args.out_dir), torch.device(args.device)
    try:
        data, dataset = load_data(args.data)
    except (OSError, ValueError) as error:
        given = sys.argv[1:] if argv is None else [*argv]
        if "--data" in given or isinstance(error, ValueError):
            fail(f"--data {args.data}: {error}")
        print(f"CIFAR-10: no download ({error.__cause__}), so --data glyphs, drawn digits")
        return main([*given, "--data", "glyphs"])
    data = {part: tuple(x.to(device) for x in pair) for part, pair in data.items()}
    bf16 = args.device == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=bf16)
    name = torch.cuda.get_device_name(device) if args.device == "cuda" else args.device
    print(f"{name}, {'bfloat16 (capability 8.0 or more)' if bf16 else 'float32 (no fast bfloat16)'}, {dataset}, "
          f"{sum(p.numel() for p in Network(args).parameters()):,} parameters")
    if args.compare:
        result, founds = compare(args, data, device, autocast, out_dir)
        print(f"\nmean ± std, seeds: {args.seeds}; all but nll in %")
        rows = result["rows"]
    else:
        net, trained = train(args, data, device, autocast, out_dir)
        metrics, found = evaluate(net, data, args, autocast)
        result = trained | metrics
        founds = {"BYOV" if args.bayes else "BYOL": [found]}
        rows = [dict(result, name=[*founds][0])]
    unit = dict.fromkeys(COLUMNS, 100) | dict(nll=1)
    for row in rows:
        cells = [(key, unit[key] * row[key], unit[key] * row.get(f"{key}_std", 0)) for key in COLUMNS if key in row]
        print(f"{row['name']:20}" + "  ".join(f"{key} {mean:.2f} ± {std:.2f}" for key, mean, std in cells))
    result.update(device=name, dataset=dataset, seed=args.seed, steps=args.steps, torch=torch.__version__)
    (out_dir / "metrics.json").write_text(json.dumps(result, indent=1))
    if args.plot:
        plot(args.plot, founds, data["test"][1])
    return result


if __name__ == "__main__":
    main()
