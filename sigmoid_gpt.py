"""
GPT with sigmoid self-attention ("Theory, Analysis, and Best Practices for Sigmoid Self-Attention", arXiv 2409.04431).

    softmax(Q K^T / sqrt d) V   becomes   sigmoid(Q K^T / sqrt d + b - slope * |i - j|) V     with b = -log(context)

What makes it train, in the paper and its released language-model configurations: keep the attention output small early
on, by b = -log n and ALiBi; normalise q and k; at scale, normalise what each branch adds, too ("hybrid norm"). Each of
these is a flag. Tokens are bytes, so any file is a data set; the loss is in nats per byte.

    python sigmoid_gpt.py                 trains on tiny shakespeare and writes a sample; 2-core CPU: 1.62 in 3 minutes
    python sigmoid_gpt.py --compare       softmax, sigmoid, and sigmoid without its bias: loss, norms, speed
    python sigmoid_gpt.py --sample --prompt "ROMEO:"          torchrun --nproc_per_node 2 sigmoid_gpt.py

Differs from the paper in size, steps and data; in its tokens (the paper's are 32,768 byte pairs); in dropout and weight
decay on a GPU, where a small text is seen many times; in the learning rate, tuned for this size.
"""
import argparse
import importlib.util
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.text import load_text
from flashsigmoid import KERNEL_DEVICES, sigmoid_attention

DEFAULTS = {
    "cpu": dict(layers=4, channels=128, heads=4, context=64, dropout=0.0, batch=16, steps=2500, lr=3e-3,
                weight_decay=1e-4),
    "gpu": dict(layers=6, channels=384, heads=6, context=256, dropout=0.4, batch=64, steps=4000, lr=1e-3,
                weight_decay=2.0),
}
ARCHITECTURE = "attn attn_bias pos norm qk_norm layer_scale layers channels heads context".split()


# -------- Model. B batch, T tokens, C channels, H heads, D = C / H.

def alibi_slopes(heads):
    """(H,) geometric series 2^(-8/H), 2^(-16/H), ... (arXiv 2108.12409); if H is no power of two, two such series."""
    power = 2 ** int(math.log2(heads))
    return torch.tensor([2 ** (-8 * (h + 1) / power) if h < power else 2 ** (-8 * (h - power + 0.5) / power)
                         for h in range(heads)])


def rotate(x, positions):
    """RoPE (arXiv 2104.09864) of x (B, H, T, D): at position t, dimensions d and d + D/2 turn by t * 10000^(-2d/D)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * 10000 ** (-torch.arange(half, device=x.device) / half)     # (T, D/2)
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.qkv = nn.Linear(args.channels, 3 * args.channels, bias=False)
        self.out = nn.Linear(args.channels, args.channels, bias=False)
        if args.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(args.channels // args.heads, eps=1e-5) for _ in range(2))
        self.register_buffer("slopes", alibi_slopes(args.heads) if args.pos == "alibi" else None, persistent=False)

    def forward(self, x, positions, cache):
        """x (B, T, C), positions (T,); cache, when generating, is a dict of the keys and values of earlier tokens."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.args.heads, -1).permute(2, 0, 3, 1, 4)     # each (B, H, T, D)
        if self.args.qk_norm:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if self.args.pos == "rope":
            q, k = rotate(q, positions), rotate(k, positions)
        if cache is not None:  # sigmoid attention renormalises nothing: a new key just adds its term to the sum
            k, v = (torch.cat([*old, new], 2) for old, new in zip(cache.get(self, ((), ())), (k, v)))
            cache[self] = [k], [v]
        if self.args.attn == "sigmoid":
            y = sigmoid_attention(q, k, v, bias=self.args.attn_bias, is_causal=True, alibi_slopes=self.slopes)
        elif self.slopes is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        else:  # softmax takes ALiBi as a tensor (H, Tq, Tk), -inf for the future
            distance = positions[:, None] - torch.arange(k.shape[2], device=x.device)
            mask = (-self.slopes[:, None, None] * distance).masked_fill(distance < 0, -math.inf).to(q.dtype)
            y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """x + post(attention(pre(x))), then x + post(SwiGLU(pre(x))); --norm pre has no post."""

    def __init__(self, args):
        super().__init__()
        C, width = args.channels, math.ceil(8 / 3 * args.channels / 256) * 256
        self.attn = Attention(args)
        self.up, self.down = nn.Linear(C, 2 * width, bias=False), nn.Linear(width, C, bias=False)
        self.pre = nn.ModuleList(nn.RMSNorm(C, eps=1e-5) for _ in range(2))
        self.post = nn.ModuleList(nn.RMSNorm(C, eps=1e-5) if args.norm == "hybrid" else nn.Identity() for _ in range(2))
        scales = [torch.full((C,), args.layer_scale) for _ in range(2)]
        self.scale = nn.ParameterList(scales) if args.layer_scale else None
        self.dropout = nn.Dropout(args.dropout)

    def add(self, x, branch, i):
        y = self.dropout(self.post[i](branch))
        return x + y if self.scale is None else x + self.scale[i] * y

    def forward(self, x, positions, cache):
        x = self.add(x, self.attn(self.pre[0](x), positions, cache), 0)
        gate, y = self.up(self.pre[1](x)).chunk(2, -1)
        return self.add(x, self.down(F.silu(gate) * y), 1)


class GPT(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.embed = nn.Embedding(256, args.channels)
        self.positions = nn.Embedding(args.context, args.channels) if args.pos == "learned" else None
        self.dropout = nn.Dropout(args.dropout)
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.layers))
        self.norm = nn.RMSNorm(args.channels, eps=1e-5)
        self.head = nn.Linear(args.channels, 256, bias=False)
        for module in self.modules():  # variance 1 / fan in; of an embedding, 1 / fan out
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)

    def forward(self, tokens, start=0, cache=None):
        """tokens (B, T) int64 at positions start, start + 1, ... -> logits (B, T, 256)."""
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.embed(tokens)                                                              # (B, T, C)
        if self.positions is not None:
            x = x + self.positions(positions)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, positions, cache)
        return self.head(self.norm(x))


def cross_entropy(model, windows):
    """windows (B, T + 1) of bytes -> (B, T) nats: each byte from those before it."""
    windows = windows.long()
    return F.cross_entropy(model(windows[:, :-1]).float().transpose(1, 2), windows[:, 1:], reduction="none")


# -------- Evaluation

@torch.no_grad()
def evaluate(model, windows):
    """Of windows (N, T + 1): the mean loss in nats, and the root mean square of the attention output, before its
    projection, in the layer where it is largest. Draws no random numbers and knows no batch size."""
    found = []
    hooks = [block.attn.out.register_forward_pre_hook(lambda _, x: found.append(x[0].float().square().mean().sqrt()))
             for block in model.blocks]
    model.eval()
    losses = [cross_entropy(model, some).mean(1).double() for some in windows.split(1 + 2 ** 15 // windows.shape[1])]
    model.train()
    for hook in hooks:
        hook.remove()
    return torch.cat(losses).mean().item(), torch.stack(found).max().item()


@torch.no_grad()
def generate(model, prompt, context, seed, length=500, temperature=0.8):
    """prompt and `length` sampled bytes. When the cache is full, the newest half of it is read again."""
    model.eval()
    device = model.head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    text = torch.tensor([list(prompt.encode())], device=device)                             # (1, T)
    new, cache, start = text[:, -context:], {}, 0
    for _ in range(length):
        if start + new.shape[1] > context:
            new, cache, start = text[:, -(context // 2):], {}, 0
        logits = model(new, start, cache)[:, -1].float() / temperature                      # (1, 256)
        start += new.shape[1]
        new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        text = torch.cat([text, new], 1)
    return bytes(text[0].tolist()).decode(errors="replace")


# -------- Training

def save_checkpoint(path, state):
    """Write another file, then rename it: a kill in between leaves the old checkpoint whole."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def load_checkpoint(path, device, args=None):
    if not path.exists():
        fail(f"--out_dir {path.parent} holds no {path.name}\nHINT: train first, without --resume and --sample")
    state = torch.load(path, map_location=device, weights_only=True)
    differing = [f"{name} {state['args'][name]} there, {getattr(args, name)} here" for name in ARCHITECTURE
                 if args and state["args"][name] != getattr(args, name)]
    if differing:
        fail(f"--resume: {path} is another architecture: {'; '.join(differing)}")
    return state


def train(args, tokens, device, autocast, out_dir):
    """Train on nine tenths of tokens (N,) uint8, validate on the rest; checkpoint.pt and log.jsonl go to out_dir.

    Returns (model, metrics, curves); curves holds "loss" and "norm", lists of (step, value). Ctrl-C saves and exits."""
    began = time.time()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    train_tokens, val_tokens = tokens.to(device).tensor_split([len(tokens) * 9 // 10])
    torch.manual_seed(args.seed)
    gpt = model = GPT(args).to(device)
    if device.type == "cuda":  # CUDA graphs: to launch kernels this small takes longer than to run them
        model = torch.compile(gpt, mode="reduce-overhead" if world == 1 else None)
    if world > 1:
        model = DistributedDataParallel(model)
    matrices, vectors = ([p for p in gpt.parameters() if (p.dim() > 1) == decay] for decay in (True, False))
    groups = [dict(params=matrices, weight_decay=args.weight_decay), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type != "mps")
    first, losses, norms = 0, [], []
    if args.resume:
        state = load_checkpoint(out_dir / "checkpoint.pt", device, args)
        gpt.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, losses, norms = state["step"], state["losses"], state["norms"]
        if first >= args.steps:
            fail(f"--resume: {out_dir} is at step {first}; allowed: --steps above that")
    if rank == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        log = open(out_dir / "log.jsonl", "a" if args.resume else "w", buffering=1)
        log.write(json.dumps(dict(config=vars(args), device=str(device), torch=torch.__version__)) + "\n")
    stop = []  # Ctrl-C lets the step in progress end; a second one does not wait
    previous = signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if stop else stop.append(True))
    offsets = torch.arange(args.context + 1, device=device)
    windows = val_tokens.unfold(0, args.context + 1, args.context)  # adjoining; a rest shorter than one is left out
    seconds, counted, tick = 0.0, 0, None  # the clock of tokens/s leaves out compilation and evaluation
    bar = tqdm(total=args.steps, initial=first, disable=rank > 0, desc=out_dir.name, mininterval=1)
    for step in range(first, args.steps):
        if rank == 0 and step < 200 and step % 10 == 0:
            with autocast:
                norms.append((step, evaluate(gpt, windows[:8])[1]))
        progress = max(0, step - args.warmup) / max(1, args.steps - args.warmup)  # warm-up, then a cosine to a tenth
        lr = args.lr * min((step + 1) / max(1, args.warmup), 0.55 + 0.45 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(1_000_003 * args.seed + step)  # batch and dropout depend on nothing else: resuming is exact
        starts = torch.randint(len(train_tokens) - args.context, (args.batch,), device=device)[rank::world]
        with autocast:
            loss = cross_entropy(model, train_tokens[starts[:, None] + offsets]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        last = step + 1 == args.steps or bool(stop)
        if last or (step + 1) % 10 == 0:
            if world > 1:
                dist.all_reduce(loss.detach())
            train_loss = loss.item() / world  # waits for the device, so that the clock tells the truth
            if not math.isfinite(train_loss):
                bar.close()
                fail(f"loss {train_loss} at step {step}, learning rate {lr:.2e}", status=1)
            if tick:
                seconds, counted = seconds + time.time() - tick[0], counted + step - tick[1]
            tick = time.time(), step
            bar.set_postfix(loss=f"{train_loss:.3f}", refresh=False)
        if rank == 0 and (last or (step + 1) % args.eval_interval == 0):
            with autocast:
                val_loss, rms = evaluate(gpt, windows)
            losses.append((step + 1, val_loss))
            norms.append((step + 1, rms))
            record = dict(step=step + 1, train_loss=train_loss, val_loss=val_loss, attention_rms=rms)
            log.write(json.dumps(record) + "\n")
            bar.write(f"step {step + 1}/{args.steps}  train {train_loss:.4f}  val {val_loss:.4f}")
            state = dict(args=vars(args), model=gpt.state_dict(), optimizer=optimizer.state_dict())
            save_checkpoint(out_dir / "checkpoint.pt", dict(state, step=step + 1, losses=losses, norms=norms))
            tick = None
        if stop:
            bar.close()
            fail(f"interrupted at step {step + 1}; {out_dir / 'checkpoint.pt'} is saved, --resume goes on", status=130)
    bar.close()
    signal.signal(signal.SIGINT, previous)
    if world > 1:
        dist.destroy_process_group()
        if rank > 0:
            raise SystemExit
    metrics = dict(val_loss=val_loss, best_val_loss=min(loss for _, loss in losses), train_loss=train_loss,
                   attention_rms_init=norms[0][1], attention_rms_early=max(rms for step, rms in norms if step < 200),
                   tokens_per_s=counted * args.batch * args.context / max(seconds, 1e-9), seconds=time.time() - began)
    return gpt, metrics, dict(loss=losses, norm=norms)


def compare(args, tokens, device, autocast, out_dir):
    """The paper's claim: softmax, sigmoid, and sigmoid without the bias that keeps its output small, on equal batches.

    Returns (rows, {name: curves of the last seed})."""
    b, rows, curves = args.attn_bias, [], {}
    for name, bias in (("softmax", b), (f"sigmoid, b = {b:.2f}", b), ("sigmoid, b = 0", 0.0)):
        runs = []
        for seed in range(args.seed, args.seed + args.seeds):
            arm = argparse.Namespace(**vars(args) | dict(attn=name.split(",")[0], attn_bias=bias, seed=seed))
            folder = out_dir / f"{name} seed {seed}".replace(" ", "_")
            _, metrics, curves[name] = train(arm, tokens, device, autocast, folder)
            runs.append(metrics)
        row = dict(name=name, seeds=args.seeds)
        for key in runs[0]:
            values = torch.tensor([run[key] for run in runs], dtype=torch.float64)
            row[key], row[f"{key}_std"] = values.mean().item(), values.std(correction=min(1, args.seeds - 1)).item()
        rows.append(row)
    print(f"\nmean ± std, seeds: {args.seeds}")
    for row in rows:
        print(f"{row['name']:18} val loss {row['val_loss']:.4f} ± {row['val_loss_std']:.4f}   attention RMS at start "
              f"{row['attention_rms_init']:.3f}, largest in 200 steps {row['attention_rms_early']:.3f} ± "
              f"{row['attention_rms_early_std']:.3f}   {row['tokens_per_s']:,.0f} tokens/s")
    return rows, curves


def plot(path, curves):
    """Validation loss and RMS of the attention output against steps, a line an arm."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in curves.items():
        left.plot(*zip(*curve["loss"]), label=name, marker=".")
        right.plot(*zip(*curve["norm"]), label=name, marker=".")
    left.set(xlabel="step", ylabel="validation loss, nats per byte")
    right.set(xlabel="step, early", ylabel="RMS of the attention output", yscale="log", xlim=(-5, 205))
    left.legend(frameon=False)
    figure.savefig(path, dpi=150)


# -------- Arguments

def fail(message, status=2):
    print(f"ERROR: {message}", file=sys.stderr)
    raise SystemExit(status)


def parse(argv):
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    parser = argparse.ArgumentParser(description="GPT with sigmoid self-attention (arXiv 2409.04431).",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail
    parser.set_defaults(**DEFAULTS["cpu" if there[0] == "cpu" else "gpu"])
    data = parser.add_argument_group("data").add_argument
    data("--data", nargs="+", metavar="NAME", help="shakespeare, python (the documentation inside Python), or paths of "
         "text files and folders; None is shakespeare, or python where that can't be had")
    model = parser.add_argument_group("model").add_argument
    model("--attn", choices=("sigmoid", "softmax"), default="sigmoid", help="attention")
    model("--attn_bias", type=float, help="b of sigmoid attention; None is -log of the context")
    model("--pos", choices=("alibi", "rope", "learned", "none"), default="alibi", help="position embedding")
    model("--norm", choices=("pre", "hybrid"), default="hybrid", help="before each branch, or before and after")
    model("--qk_norm", action=argparse.BooleanOptionalAction, default=True, help="RMSNorm of q and k")
    model("--layer_scale", type=float, default=0.0, help="initial LayerScale of a branch, 0 for none")
    model("--layers", type=int, help="blocks")
    model("--channels", type=int, help="width")
    model("--heads", type=int, help="attention heads, of 16 to 256 channels each")
    model("--context", type=int, help="bytes a window")
    model("--dropout", type=float, help="after the embedding and each branch")
    optimisation = parser.add_argument_group("optimisation").add_argument
    optimisation("--steps", type=int, help="optimiser steps of a run")
    optimisation("--batch", type=int, help="windows a step, over all processes")
    optimisation("--lr", type=float, help="peak learning rate of AdamW")
    optimisation("--warmup", type=int, default=100, help="steps of linear warm-up")
    optimisation("--weight_decay", type=float, help="decoupled, of matrices")
    run = parser.add_argument_group("run").add_argument
    run("--seeds", type=int, default=1, help="with --compare: runs an arm")
    run("--seed", type=int, default=1337, help="of weights, batches, dropout and sample")
    run("--plot", metavar="FILE.png", help="draw losses and attention norms")
    run("--out_dir", default="out/sigmoid_gpt", help="for checkpoint.pt, log.jsonl, metrics.json")
    run("--resume", action="store_true", help="go on from out_dir/checkpoint.pt, bit for bit")
    run("--sample", action="store_true", help="no training: write a sample from out_dir/checkpoint.pt")
    run("--prompt", default="\n", help="text that the sample continues")
    run("--eval_interval", type=int, default=250, help="steps between evaluations, each with a checkpoint")
    run("--compare", action="store_true", help="softmax, sigmoid, and sigmoid with b = 0, in one table")
    run("--device", choices=there, default=there[0], help="of what this machine has")
    args = parser.parse_args(argv)
    if args.device == "cpu":  # once more, now that it is known what suits the run: three arms in the time of one
        parser.set_defaults(**DEFAULTS["cpu"] | (dict(steps=DEFAULTS["cpu"]["steps"] // 3) if args.compare else {}))
        args = parser.parse_args(argv)
    args.attn_bias = -math.log(args.context) if args.attn_bias is None else args.attn_bias
    lowest = dict(layers=1, channels=1, heads=1, context=2, steps=1, batch=1, eval_interval=1, seeds=1, seed=0, lr=0,
                  warmup=0, weight_decay=0, dropout=0, layer_scale=0, attn_bias=-1e3)
    D, world = args.channels / max(1, args.heads), int(os.environ.get("WORLD_SIZE", 1))
    for wrong, message in (
            *((not low <= getattr(args, name) < math.inf, f"--{name} {getattr(args, name)}; allowed: {low} or more")
              for name, low in lowest.items()),
            (args.dropout >= 1, f"--dropout {args.dropout}; allowed: below 1"),
            (D % 2 or not 16 <= D <= 256, f"--heads {args.heads}: a head has {D:g} channels; allowed: even, 16 to 256"),
            (not args.prompt, "--prompt is empty; allowed: one byte or more"),
            (args.compare and (args.resume or world > 1), "--compare; allowed: without --resume, in one process"),
            (args.batch % world, f"--batch {args.batch} on {world} processes; allowed: a multiple"),
            (args.plot and not Path(args.plot).absolute().parent.is_dir(), f"--plot {args.plot}: no such folder"),
            (args.plot and not importlib.util.find_spec("matplotlib"), "--plot needs: pip install matplotlib")):
        if wrong:
            fail(message)
    return args


def main(argv=None):
    """Train, compare or sample, as the flags say; returns what is in metrics.json."""
    args = parse(argv)
    out_dir, device = Path(args.out_dir), torch.device(args.device)
    if args.sample:
        state = load_checkpoint(out_dir / "checkpoint.pt", device)
        model = GPT(argparse.Namespace(**state["args"])).to(device)
        model.load_state_dict(state["model"])
        return print(generate(model, args.prompt, state["args"]["context"], args.seed))
    if "RANK" in os.environ:  # started by torchrun
        if args.device == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    try:
        tokens, dataset = load_text(args.data)
    except (OSError, ValueError) as error:
        fail(f"--data: {error}")
    if len(tokens) < 100 * args.context:
        fail(f"--data {dataset} holds {len(tokens):,} bytes; allowed: at least 100 windows of --context {args.context}")
    bf16 = args.device == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=bf16)
    name = torch.cuda.get_device_name(device) if args.device == "cuda" else args.device
    if os.environ.get("RANK", "0") == "0":
        print(f"{name}, {'bfloat16 (capability 8.0 or more)' if bf16 else 'float32 (no fast bfloat16)'}, {dataset}: "
              f"{len(tokens):,} bytes, {sum(p.numel() for p in GPT(args).parameters()):,} parameters, "
              f"{'Triton' if args.device in KERNEL_DEVICES and args.attn == 'sigmoid' else 'PyTorch'} attention")
    if args.compare:
        rows, curves = compare(args, tokens, device, autocast, out_dir)
        result = dict(rows=rows)
    else:
        model, result, curves = train(args, tokens, device, autocast, out_dir)
        curves = {args.attn: curves}
        with autocast:
            print(generate(model, args.prompt, args.context, args.seed) + "\n")
        for key, value in result.items():
            print(f"{key:26}{value:,.4f}")
    result.update(device=name, dataset=dataset, seed=args.seed, steps=args.steps, torch=torch.__version__)
    (out_dir / "metrics.json").write_text(json.dumps(result, indent=1))
    if args.plot:
        plot(args.plot, curves)
    return result


if __name__ == "__main__":
    main()
