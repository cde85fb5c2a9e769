"""
BYOL whose weights know what they don't know ("Bootstrap Your Own Variance", BYOV, arXiv 2312.03213).

Bootstrap Your Own Latent (BYOL) learns from two views of an image, without labels and without negatives: the online
network predicts, from one view, what a slowly moving average of it, the target, makes of the other. Bayes by Backprop
(BBB) puts a Gaussian on every weight and learns its mean and its width. BYOV does both at once:

    w ~ q = N(mu, sigma^2)    sigma = softplus(rho)    loss = 2 - 2 cos(p1, t2) + 2 - 2 cos(p2, t1) + lambda KL(q || p)

p1 and p2 come from two draws of the online weights, t1 and t2 from the target, p is N(0, prior_std^2), the KL a sum over
all weights. lambda = weight_decay * prior_std^2 makes its gradient on mu plain weight decay, which mu gets no more of.
A linear probe on the frozen encoder, averaged over draws of the weights, then gives accuracy and calibration.

    python byov.py                 trains BYOV, reports accuracy, NLL, Brier and ECE, clean and corrupted
    python byov.py --compare       BYOL, BYOV, supervised, supervised BBB; controls: untrained noise, BYOL ensemble

On a GPU the data are CIFAR-10, on a CPU drawn digits. What the paper's abstract states is built and put to the test
here; encoder, prior, schedules, probe and corruptions are this file's choice: the paper may differ in each of them.
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
    "glyphs": dict(encoder="conv", width=16, hidden=256, batch=128, steps=1000, lr=0.1, weight_decay=5e-4, crop=0.4,
                   flip=0.0, hue=0.5, grey=0.5, corruptions=["salt_and_pepper"]),
    "cifar10": dict(encoder="resnet18", width=64, hidden=1024, batch=512, steps=15600, lr=0.06, weight_decay=2e-3,
                    crop=0.08, flip=0.5, hue=0.1, grey=0.2, corruptions=None),
}
ARCHITECTURE = "data encoder width hidden objective bayes target".split()
ARMS = {"BYOL": ("byol", False), "BYOV": ("byol", True), "supervised": ("supervised", False),
        "BBB": ("supervised", True)}
COLUMNS = "knn_acc linear_acc nll brier ece ece_scaled salt_and_pepper_ece salt_and_pepper_brier".split()


# -------- Bayesian layers: the posterior of each weight is N(weight, softplus(rho)^2); biases and norms are plain.

class BayesConv2d(nn.Conv2d):
    """In training a fresh draw of the weights a pass, shared by batch and positions; else the weights in `drawn`."""

    def forward(self, x):
        if not self.training:
            return self._conv_forward(x, self.drawn, self.bias)
        weight = self.weight + F.softplus(self.rho) * torch.randn_like(self.weight)
        return self._conv_forward(x, weight, self.bias)


class BayesLinear(nn.Linear):
    """In training by local reparameterisation (arXiv 1506.02557): each row of x as if it had drawn its own weights."""

    def forward(self, x):
        if not self.training:
            return F.linear(x, self.drawn, self.bias)
        mean = F.linear(x, self.weight, self.bias)
        variance = F.linear(x.square(), F.softplus(self.rho).square())
        return mean + variance.clamp(min=1e-20).sqrt() * torch.randn_like(mean)


def inverse_softplus(sigma):
    return sigma + torch.log(-torch.expm1(-sigma))


def bayesian(net, alpha, skip=""):
    """Turn every convolution and linear layer of net but `skip`, in place, Bayesian: sigma = alpha * std of its weights."""
    for name, layer in net.named_modules():
        if name != skip and type(layer) in (nn.Conv2d, nn.Linear):
            layer.__class__ = BayesConv2d if type(layer) is nn.Conv2d else BayesLinear
            sigma = alpha * layer.weight.detach().std()
            layer.rho = nn.Parameter(torch.full_like(layer.weight, inverse_softplus(sigma).item()))
            layer.drawn = layer.weight.detach()


def bayesian_layers(net):
    return [layer for layer in net.modules() if hasattr(layer, "rho")]


def kl_divergence(net, prior_std):
    """KL(q || N(0, prior_std^2)) in nats, a scalar: summed over all Bayesian weights, in closed form."""
    total = 0.0
    for layer in bayesian_layers(net):
        sigma = F.softplus(layer.rho)
        square = (sigma.square() + layer.weight.square()) / prior_std ** 2
        total = total + (square / 2 - 0.5 - torch.log(sigma / prior_std)).sum()
    return total


@torch.no_grad()
def draw(net, seed=None):
    """Fix what evaluation uses: one draw of all weights, the same for every image; with no seed, the mean weights."""
    for layer in bayesian_layers(net):
        layer.drawn = layer.weight.detach()
    if seed is not None:
        generator = torch.Generator(next(net.parameters()).device).manual_seed(seed)
        for layer in bayesian_layers(net):
            eps = torch.randn(layer.weight.shape, generator=generator, device=layer.weight.device)
            layer.drawn = layer.weight + F.softplus(layer.rho) * eps


# -------- Model. B batch, C channels, Encoders map (B, 3, 32, 32) to (B, width * 8).

def convolution(c_in, c_out, stride, size=3):
    return nn.Sequential(nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=False), nn.BatchNorm2d(c_out))


class Residual(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.main = nn.Sequential(convolution(c_in, c_out, stride), nn.ReLU(), convolution(c_out, c_out, 1))
        self.skip = nn.Identity() if c_in == c_out else convolution(c_in, c_out, stride, 1)

    def forward(self, x):
        return F.relu(self.main(x) + self.skip(x))


def make_encoder(args):
    C = args.width
    if args.encoder == "conv":
        layers = [nn.Sequential(convolution(c_in, c_out, 2), nn.ReLU())
                  for c_in, c_out in ((3, C), (C, 2 * C), (2 * C, 4 * C), (4 * C, 8 * C))]
    else:
        layers = [convolution(3, C, 1), nn.ReLU()]  # the stem for small images: 3 x 3, no pooling
        for c_in, c_out, stride in ((C, C, 1), (C, 2 * C, 2), (2 * C, 4 * C, 2), (4 * C, 8 * C, 2)):
            layers += [Residual(c_in, c_out, stride), Residual(c_out, c_out, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def make_head(c_in, hidden, c_out):
    return nn.Sequential(nn.Linear(c_in, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, c_out))


class Network(nn.Module):
    """Encoder, projector, predictor; classifier is the probe that watches BYOL train, or what supervision trains."""

    def __init__(self, args):
        super().__init__()
        self.encoder = make_encoder(args)
        for layer in self.encoder.modules():
            if type(layer) is nn.Conv2d:
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        self.classifier = nn.Linear(8 * args.width, 10)
        if args.objective == "byol":
            self.projector = make_head(8 * args.width, args.hidden, 256)
            self.predictor = make_head(256, args.hidden, 256)

    def project(self, x):
        return self.projector(self.encoder(x))


def make_networks(args, device):
    """(online, target). The target starts as a copy; it never gets a gradient; with --target mean it is never drawn."""
    online = Network(args).to(device, memory_format=torch.channels_last)
    target = copy.deepcopy(online).requires_grad_(False)
    for net in [online] * args.bayes + [target] * (args.bayes and args.target == "posterior"):
        bayesian(net, args.alpha, skip="classifier" if args.objective == "byol" else "")  # there it only watches
    return online, target.requires_grad_(False)


def normalise(x):
    """Views (B, 3, 32, 32) in [0, 1] to about mean 0 and std 1."""
    return ((x - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)


# -------- Loss

def byol_loss(online, target, view1, view2, labels):
    """(loss, 0 to 8: both directions summed, mean over the batch; loss of the probe; embedding z1 (B, 256))."""
    h1, h2 = online.encoder(view1), online.encoder(view2)                                   # (B, 8 width)
    z1, z2 = online.projector(h1), online.projector(h2)                                     # (B, 256)
    with torch.no_grad():
        t1, t2 = (target.projector(target.encoder(view)) for view in (view1, view2))
    cos1, cos2 = (F.cosine_similarity(online.predictor(z).float(), t.float()) for z, t in ((z1, t2), (z2, t1)))
    probe = F.cross_entropy(online.classifier(h1.detach()).float(), labels)
    return (4 - 2 * cos1 - 2 * cos2).mean(), probe, z1.detach().float()


def supervised_loss(online, target, view1, view2, labels):
    h = online.encoder(view1)
    loss = F.cross_entropy(online.classifier(h).float(), labels)
    return loss, torch.zeros_like(loss), h.detach().float()


@torch.no_grad()
def update_target(online, target, tau):
    """target <- tau target + (1 - tau) online, every parameter; the width of a posterior in sigma, not in rho."""
    sources = dict(online.named_parameters())
    for name, average in target.named_parameters():
        if name.endswith("rho"):
            average.copy_(inverse_softplus(F.softplus(average).lerp(F.softplus(sources[name]), 1 - tau)))
        else:
            average.lerp_(sources[name], 1 - tau)


# -------- Evaluation. N images, S draws of the weights, K classes; probs (N, K).

def ece_and_brier(probs, labels, counts):
    """(R, 2): ECE with 15 bins of equal width, and Brier score sum_k (p_k - y_k)^2, 0 to 2, of R weighted data sets:
    counts (R, N) says how often each holds each image."""
    confidence, guess = probs.max(1)
    bins = F.one_hot((15 * confidence).long().clamp(max=14), 15)                            # (N, 15)
    gaps = bins * ((guess == labels).float() - confidence)[:, None]
    brier = (probs - F.one_hot(labels, probs.shape[1])).square().sum(1)
    return torch.stack([(counts @ gaps).abs().sum(1), counts @ brier], 1) / counts.sum(1, keepdim=True)


def measure(probs, labels):
    """Accuracy, NLL in nats, Brier, Brier / K, ECE with 15 bins of equal width and of equal mass; and the area under
    the ROC curve of confidence as a detector of errors."""
    confidence, guess = probs.max(1)
    right, N = (guess == labels).float(), len(labels)
    ece, brier = ece_and_brier(probs, labels, torch.ones_like(probs[:1, :1]).expand(1, N))[0].tolist()
    ranks = confidence.argsort().argsort()
    gaps = torch.zeros_like(right[:15]).index_add(0, ranks * 15 // N, right - confidence)
    above = ranks[right > 0].double().mean() - (right.sum() - 1) / 2  # errors below a right answer, on average
    return dict(linear_acc=right.mean().item(), nll=F.nll_loss(probs.clamp(min=1e-12).log(), labels).item(),
                brier=brier, brier_per_class=brier / probs.shape[1], ece=ece,
                ece_adaptive=(gaps.abs().sum() / N).item(), error_auroc=(above / (1 - right).sum()).item())


def temperature_scale(probs, val_probs, val_labels):
    """probs (N, K) at the temperature, of 141 from 0.2 to 5, with the least NLL on the validation images."""
    temperatures = torch.logspace(-0.7, 0.7, 141, device=probs.device)
    logits, val_logits = probs.clamp(min=1e-12).log(), val_probs.clamp(min=1e-12).log()
    nll = torch.stack([F.cross_entropy(val_logits / t, val_labels) for t in temperatures])
    return (logits / temperatures[nll.argmin()]).softmax(-1)


@torch.no_grad()
def features(net, images):
    """What the encoder makes of images (N, 3, 32, 32) uint8 with the weights that `draw` fixed: (N, D) float32."""
    net.eval()
    return torch.cat([net.encoder(normalise(some.float() / 255)).float() for some in images.split(1000)])


def knn_accuracy(bank, bank_labels, queries, labels, k=200):
    """Weighted vote of the k nearest by cosine, weights exp(cosine / 0.1)."""
    cosine, nearest = (F.normalize(queries) @ F.normalize(bank).T).topk(min(k, len(bank)))  # (N, k)
    votes = torch.zeros(len(queries), 10, device=bank.device).scatter_add(1, bank_labels[nearest], (cosine / 0.1).exp())
    return (votes.argmax(1) == labels).float().mean().item()


@torch.enable_grad()
def fit_probe(draws, labels, l2):
    """The linear layer, as a function of features (N, D), with the least mean cross-entropy + l2 / 2 |W|^2 over
    draws (M, N, D): features of the same N images under M draws of the weights, standardised."""
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
def evaluate(net, data, args):
    """(metrics, found): the probe is fitted to train, temperature to val, all else is measured on test. found has
    probs, {(corruption or "clean", severity): (N, K)}, and std (N,), of the predicted class's probability over draws.
    Draws no random numbers but its own."""
    (train_x, train_y), (val_x, val_y), (test_x, test_y) = (data[part] for part in ("train", "val", "test"))
    draw(net)
    bank = features(net, train_x)
    metrics = dict(knn_acc=knn_accuracy(bank, train_y, features(net, test_x), test_y))
    S = args.samples if bayesian_layers(net) else 1
    head, N = net.classifier, args.probe_labels or len(train_y)
    if hasattr(net, "projector"):
        draws = []
        for s in range(min(S, 4)):
            draw(net, args.seed + s if S > 1 else None)
            draws.append(features(net, train_x[:N]))
        head = fit_probe(torch.stack(draws), train_y[:N], args.probe_l2)

    def predict(images):
        samples = []
        for s in range(S):
            draw(net, args.seed + 1000 + s if S > 1 else None)
            samples.append(head(features(net, images)).float().softmax(-1))
        return torch.stack(samples)                                                         # (S, N, K)

    samples, val = predict(test_x), predict(val_x).mean(0)
    probs = {("clean", 0): samples.mean(0)}
    for name in args.corruptions:
        for severity in range(1, 6):
            probs[name, severity] = predict(corrupt(test_x, name, severity)).mean(0)
    for s in (1, 4, 8, 16):
        if s < S:
            metrics |= {f"{key}_{s}_draws": value for key, value in measure(samples[:s].mean(0), test_y).items()}
    if S > 1:
        draw(net)
        mean = head(features(net, test_x)).softmax(-1)
        metrics |= {f"{key}_mean_weights": value for key, value in measure(mean, test_y).items()}
        metrics["sigma_over_mu"] = torch.cat([(F.softplus(layer.rho) / layer.weight.abs()).flatten()[::100]
                                              for layer in bayesian_layers(net)]).median().item()
    std = samples.std(0, correction=min(1, S - 1)).gather(1, probs["clean", 0].argmax(1, keepdim=True))[:, 0]
    return metrics | summarise(probs, val, data), dict(probs=probs, val=val, std=std)


def summarise(probs, val, data):
    """Metrics of probs {(name, severity): (N, K)}: clean, each severity, their mean; plain and temperature-scaled."""
    labels, metrics = data["test"][1], {}
    for (name, severity), p in probs.items():
        scaled = measure(temperature_scale(p, val, data["val"][1]), labels)
        found = measure(p, labels) | {f"{key}_scaled": value for key, value in scaled.items()}
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

    Ctrl-C saves and exits; a collapsed embedding stops the run."""
    began, first = time.time(), 0
    images, labels = data["train"]
    torch.manual_seed(args.seed)
    online, target = make_networks(args, device)
    loss_of, kl_of = byol_loss if args.objective == "byol" else supervised_loss, kl_divergence
    if device.type == "cuda":
        loss_of, kl_of = torch.compile(loss_of), torch.compile(kl_of)
    layers = bayesian_layers(online)
    means, widths = [layer.weight for layer in layers], [layer.rho for layer in layers]
    plain = [p for p in online.parameters() if all(p is not other for other in means + widths)]
    groups = [dict(params=[p for p in plain if p.dim() > 1], weight_decay=args.weight_decay),
              dict(params=[p for p in plain if p.dim() == 1] + means, weight_decay=0.0)]  # the KL decays the means
    optimizers = [torch.optim.SGD(groups, args.lr, momentum=0.9, fused=device.type != "mps")]
    optimizers += [torch.optim.Adam(widths, args.lr_rho, fused=device.type != "mps")] if widths else []
    state = dict(online=online, target=target) | {f"optimizer{i}": one for i, one in enumerate(optimizers)}
    path = out_dir / "checkpoint.pt"
    if args.resume and (path.exists() or not args.compare):
        saved = load_checkpoint(path, device, args)
        first = saved["step"]
        for key, part in state.items():
            part.load_state_dict(saved[key])
    out_dir.mkdir(parents=True, exist_ok=True)
    log = open(out_dir / "log.jsonl", "a" if first else "w", buffering=1)
    log.write(json.dumps(dict(config=vars(args), device=str(device), torch=torch.__version__)) + "\n")
    stop = []  # Ctrl-C lets the step in progress end; a second one does not wait
    previous = signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if stop else stop.append(True))
    seconds, counted, tick = 0.0, 0, None  # the clock of images/s leaves out compilation and evaluation
    bar = tqdm(total=args.steps, initial=first, desc=out_dir.name, mininterval=1)
    warmup = args.steps // 10
    for step in range(first, args.steps):
        progress = max(0, step - warmup) / max(1, args.steps - warmup)
        schedule = min((step + 1) / max(1, warmup), (1 + math.cos(math.pi * progress)) / 2)
        for optimizer, lr in zip(optimizers, (args.lr, args.lr_rho)):
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule
        torch.manual_seed(1_000_003 * args.seed + step)  # batch, views and draws depend on nothing else: resume is exact
        batch = torch.randint(len(images), (args.batch,), device=device)
        views = [normalise(augment(images[batch], args.crop, args.flip, args.hue, args.grey, args.blur[i], (0, 0.2)[i]))
                 for i in range(2)]
        online.train()
        with autocast:
            fit, probe, embedding = loss_of(online, target, *views, labels[batch])
        loss = fit + probe
        if layers:
            kl = kl_of(online, args.prior_std)
            loss = loss + args.weight_decay * args.prior_std ** 2 * kl
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        tau = 1 - (1 - args.tau) * (1 + math.cos(math.pi * step / args.steps)) / 2
        update_target(online, target, tau)
        bar.update()
        last = step + 1 == args.steps or bool(stop)
        if last or (step + 1) % 10 == 0:
            spread = F.normalize(embedding).std(0).mean().item() * embedding.shape[1] ** 0.5  # waits for the device
            if not math.isfinite(loss.item()):
                bar.close()
                fail(f"loss {loss.item()} at step {step}, learning rate {args.lr * schedule:.2e}", status=1)
            if tick:
                seconds, counted = seconds + time.time() - tick[0], counted + step - tick[1]
            tick = time.time(), step
            bar.set_postfix(fit=f"{fit.item():.3f}", spread=f"{spread:.2f}", refresh=False)
        if last or (step + 1) % args.eval_interval == 0:
            draw(online)
            with autocast:
                bank, queries = features(online, images[:10_000]), features(online, data["val"][0])
            energy = torch.linalg.svdvals(queries - queries.mean(0)).square()
            share = energy / energy.sum()
            record = dict(step=step + 1, fit=fit.item(), probe=probe.item(), spread=spread,
                          effective_rank=share.clamp(min=1e-12).log().mul(-share).sum().exp().item(),
                          val_knn_acc=knn_accuracy(bank, labels[:10_000], queries, data["val"][1]))
            if layers:
                record |= dict(kl=kl.item(), sigma=torch.cat([F.softplus(rho).flatten() for rho in widths]).mean().item())
            log.write(json.dumps(record) + "\n")
            bar.write("  ".join(f"{key} {value:.4g}" for key, value in record.items()))
            save_checkpoint(path, dict({key: part.state_dict() for key, part in state.items()}, args=vars(args),
                                       step=step + 1))
            tick = None
            if spread < 0.1:
                bar.close()
                fail(f"the embedding has collapsed: its std a dimension is {spread:.3f} of a healthy one's at step "
                     f"{step + 1}\nHINT: a smaller --lr, a larger --tau, or a smaller --prior_std", status=1)
        if stop:
            bar.close()
            fail(f"interrupted at step {step + 1}; {path} is saved, --resume goes on", status=130)
    bar.close()
    signal.signal(signal.SIGINT, previous)
    return online, dict(images_per_s=counted * args.batch / max(seconds, 1e-9), seconds=time.time() - began)


# -------- The paper's claims

def gaussian_fit(x):
    """How Gaussian x (N,) is: moments, Kolmogorov-Smirnov distance to, and R^2 of a Q-Q line with, the fitted normal."""
    x = x.double().cpu().sort().values
    z, normal = (x - x.mean()) / x.std(), torch.distributions.Normal(0.0, 1.0)
    grid = (torch.arange(len(x)) + 0.5) / len(x)
    ks = (normal.cdf(z) - grid).abs().max() + 0.5 / len(x)
    r2 = torch.corrcoef(torch.stack([z, normal.icdf(grid.double())]))[0, 1] ** 2
    return dict(mean=x.mean().item(), std=x.std().item(), skewness=(z ** 3).mean().item(),
                excess_kurtosis=(z ** 4).mean().item() - 3, ks=ks.item(), qq_r2=r2.item())


def add_noise(net, learned):
    """A copy of BYOL's net whose weights get untrained noise, of the root mean square size, layer by layer, of learned's."""
    noisy = copy.deepcopy(net)
    bayesian(noisy, 0.02, skip="classifier")
    for layer, other in zip(bayesian_layers(noisy), bayesian_layers(learned)):
        sigma = F.softplus(other.rho.detach()).square().mean().sqrt()
        layer.rho.data.fill_(inverse_softplus(sigma))
    return noisy


def compare(args, data, device, autocast, out_dir):
    """Every arm with equal seeds, data and budget, then the controls. Returns (result, {arm: found of each seed})."""
    runs, founds = {}, {}
    for seed in range(args.seed, args.seed + args.seeds):
        nets = {}
        for name in args.arms:
            arm = argparse.Namespace(**vars(args) | dict(objective=ARMS[name][0], bayes=ARMS[name][1], seed=seed))
            nets[name] = train(arm, data, device, autocast, out_dir / f"{name}_seed_{seed}")
        if "BYOL" in nets and "BYOV" in nets:
            nets["BYOL + noise"] = add_noise(nets["BYOL"][0], nets["BYOV"][0]), {}
        for name, (net, trained) in nets.items():
            with autocast:
                metrics, found = evaluate(net, data, argparse.Namespace(**vars(args) | dict(seed=seed)))
            runs.setdefault(name, []).append(trained | metrics)
            founds.setdefault(name, []).append(found)
    if args.seeds > 1 and "BYOL" in runs:
        mean = {key: sum(found["probs"][key] for found in founds["BYOL"]) / args.seeds for key in found["probs"]}
        val = sum(found["val"] for found in founds["BYOL"]) / args.seeds
        runs[f"BYOL ensemble of {args.seeds}"] = [summarise(mean, val, data)]
    rows = []
    for name, found in runs.items():
        rows.append(dict(name=name, seeds=len(found)))
        for key in found[0]:
            values = torch.tensor([run[key] for run in found], dtype=torch.float64)
            spread = values.std(correction=min(1, len(values) - 1)).item()
            rows[-1] |= {key: values.mean().item(), f"{key}_std": spread}
    result = dict(rows=rows)
    if "BYOL" in runs and "BYOV" in runs:
        result["BYOV - BYOL"] = paired(founds["BYOV"], founds["BYOL"], data["test"][1])
    if "BYOV" in runs and "BBB" in runs:
        ours, theirs = (founds[name][0]["std"] for name in ("BYOV", "BBB"))
        readings = dict(difference=ours - theirs, BYOV=ours, BBB=theirs, log_BYOV=ours.log(), log_BBB=theirs.log())
        if args.seeds > 1:
            readings["BBB, two seeds"] = theirs - founds["BBB"][1]["std"]
        result["predictive_std"] = {name: gaussian_fit(x) for name, x in readings.items()}
        result["predictive_std"]["correlation"] = torch.corrcoef(torch.stack([ours, theirs]))[0, 1].item()
    return result, founds


def paired(ours, theirs, labels):
    """ECE and Brier, ours - theirs, mean over seeds, with 95 % bootstrap intervals over the test images (not seeds):
    {corruption: {metric: [low, difference, high]}}, a corruption's five severities averaged."""
    generator = torch.Generator(labels.device).manual_seed(0)
    counts = torch.poisson(torch.ones(1001, len(labels), device=labels.device), generator=generator)
    counts[0] = 1  # the data set itself, then 1,000 resamples
    found = {}
    for name in {name: None for name, _ in ours[0]["probs"]}:
        keys = [key for key in ours[0]["probs"] if key[0] == name]
        pairs = [(a["probs"][key], b["probs"][key]) for a, b in zip(ours, theirs) for key in keys]
        gain = sum(ece_and_brier(a, labels, counts) - ece_and_brier(b, labels, counts) for a, b in pairs) / len(pairs)
        low, high = gain[1:].quantile(torch.tensor([0.025, 0.975], device=labels.device), 0)
        found[name] = {metric: [low[i].item(), gain[0, i].item(), high[i].item()]
                       for i, metric in enumerate(("ece", "brier"))}
    return found


def plot(path, founds, labels):
    """Reliability, clean and at the strongest corruption; ECE against severity; the predictive std, BYOV - BBB."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    *reliability, severities, stds = figure.subplots(1, 4)
    names, keys = [name for name in founds if name.startswith("BYO")] or list(founds), list(founds[[*founds][0]][0]["probs"])
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
    if "BYOV" in founds and "BBB" in founds:
        x = (founds["BYOV"][0]["std"] - founds["BBB"][0]["std"]).cpu()
        stds.hist(x, 60, density=True)
        grid = torch.linspace(x.min(), x.max(), 200)
        stds.plot(grid, torch.distributions.Normal(x.mean(), x.std()).log_prob(grid).exp(), label="Gaussian fit")
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
    images, labels = load_glyphs(14_000, size=32, channels=3)
    ends = dict(train=(0, 8000), val=(8000, 10_000), test=(10_000, 14_000))
    return {part: (images[a:b], labels[a:b]) for part, (a, b) in ends.items()}, "glyphs"


def parse(argv):
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    parser = argparse.ArgumentParser(description="BYOL + Bayes by Backprop (arXiv 2312.03213).",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail
    data = parser.add_argument_group("data").add_argument
    data("--data", choices=tuple(DEFAULTS), default="glyphs" if there[0] == "cpu" else "cifar10", help="images")
    data("--crop", type=float, help="least area of a crop")
    data("--flip", type=float, help="probability")
    data("--hue", type=float, help="largest turn of the hue, 0.5 is all")
    data("--grey", type=float, help="probability")
    data("--blur", type=float, nargs=2, default=(0.0, 0.0), metavar="P", help="probabilities, view 1 and view 2")
    model = parser.add_argument_group("model").add_argument
    model("--objective", choices=("byol", "supervised"), default="byol", help="what trains the encoder")
    model("--bayes", action=argparse.BooleanOptionalAction, default=True, help="a posterior over weights")
    model("--encoder", choices=("resnet18", "conv"), help="for 3 x 32 x 32")
    model("--width", type=int, help="channels of the first layer")
    model("--hidden", type=int, help="width of projector and predictor")
    model("--alpha", type=float, default=0.02, help="first sigma over the std of a layer's weights")
    model("--prior_std", type=float, default=0.1, help="of the prior; sigma grows in proportion")
    model("--target", choices=("mean", "posterior"), default="mean", help="weights of the target: average mu, or draws")
    optimisation = parser.add_argument_group("optimisation").add_argument
    optimisation("--steps", type=int, help="optimiser steps of a run")
    optimisation("--batch", type=int, help="images a step")
    optimisation("--lr", type=float, help="peak learning rate of SGD")
    optimisation("--lr_rho", type=float, default=1e-2, help="peak learning rate of Adam, for rho")
    optimisation("--weight_decay", type=float, help="of matrices; lambda is this * prior_std^2")
    optimisation("--tau", type=float, default=0.99, help="first share that the target keeps a step; ends at 1")
    evaluation = parser.add_argument_group("evaluation").add_argument
    evaluation("--samples", type=int, default=32, help="draws of the weights, averaged")
    evaluation("--probe_l2", type=float, default=1e-4, help="weight decay of the linear probe")
    evaluation("--probe_labels", type=int, default=0, help="labels that the probe sees, 0 for all")
    evaluation("--corruptions", nargs="+", choices=tuple(CORRUPTIONS), help="None is all of them")
    run = parser.add_argument_group("run").add_argument
    run("--seeds", type=int, default=1, help="with --compare: runs an arm")
    run("--seed", type=int, default=1337, help="of weights, batches, views and draws")
    run("--plot", metavar="FILE.png", help="draw reliability, ECE and predictive std")
    run("--out_dir", default="out/byov", help="for checkpoint.pt, log.jsonl, metrics.json")
    run("--resume", action="store_true", help="go on from out_dir/checkpoint.pt, bit for bit; a finished run is measured")
    run("--eval_interval", type=int, default=500, help="steps between evaluations, each with a checkpoint")
    run("--compare", action="store_true", help="all of --arms and the controls, in one table")
    run("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), help="with --compare")
    run("--device", choices=there, default=there[0], help="of what this machine has")
    parser.set_defaults(**DEFAULTS[parser.parse_args(argv).data])
    args = parser.parse_args(argv)
    args.corruptions = args.corruptions or list(CORRUPTIONS)
    lowest = dict(steps=1, batch=2, width=1, hidden=1, seeds=1, samples=1, eval_interval=1, seed=0, lr=0, lr_rho=0,
                  weight_decay=0, probe_l2=0, probe_labels=0, alpha=1e-12, prior_std=1e-6, tau=0, crop=0.01, flip=0,
                  grey=0, hue=0)
    for wrong, message in (
            *((not low <= getattr(args, name) < math.inf, f"--{name} {getattr(args, name)}; allowed: {low} or more")
              for name, low in lowest.items()),
            *((getattr(args, name) > 1, f"--{name} {getattr(args, name)}; allowed: up to 1")
              for name in ("tau", "crop", "flip", "grey", "hue")),
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
        fail(f"--data {args.data}: {error}")
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
        with autocast:
            metrics, found = evaluate(net, data, args)
        result = trained | metrics
        founds = {"BYOV" if args.bayes else "BYOL": [found]}
        rows = [dict(result, name=[*founds][0])]
    for row in rows:
        numbers = (f"{key} {row[key] * (1 if key == 'nll' else 100):.2f} ± {100 * row.get(key + '_std', 0):.2f}"
                   for key in COLUMNS if key in row)
        print(f"{row['name']:20}" + "  ".join(numbers))
    result.update(device=name, dataset=dataset, seed=args.seed, steps=args.steps, torch=torch.__version__)
    (out_dir / "metrics.json").write_text(json.dumps(result, indent=1))
    if args.plot:
        plot(args.plot, founds, data["test"][1])
    return result


if __name__ == "__main__":
    main()
