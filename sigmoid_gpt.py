"""
GPT with sigmoid self-attention ("Theory, Analysis, and Best Practices for Sigmoid Self-Attention", arXiv 2409.04431).

    softmax(Q K^T / sqrt d) V   becomes   sigmoid(Q K^T / sqrt d + b - slope * |i - j|) V     with b = -log(context)

What makes it train, in the paper: keep the attention output small early on, by b and ALiBi; normalise q and k; at
scale, normalise what each branch adds ("hybrid norm"). Each is a flag. Tokens are bytes; the loss is in nats per byte.

    python sigmoid_gpt.py                 trains on tiny shakespeare and writes a sample; 2-core CPU: 1.62 in 4 minutes
    python sigmoid_gpt.py --compare       softmax, sigmoid, and sigmoid without its bias: loss, norms, speed, memory
    python sigmoid_gpt.py --sample --prompt "ROMEO:"          torchrun --nproc_per_node 2 sigmoid_gpt.py

Differs from the paper in size, steps, data, tokens and learning rate, and on a GPU in dropout and weight decay.
"""
import argparse
import importlib.util
import json
import math
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data.text import load_text
from flashsigmoid import KERNEL_DEVICES, sigmoid_attention

DEFAULTS = dict(
    cpu=dict(layers=4, channels=128, heads=4, context=64, dropout=0, batch=16, steps=2500, lr=3e-3, weight_decay=1e-4),
    gpu=dict(layers=6, channels=384, heads=6, context=256, dropout=0.4, batch=64, steps=4000, lr=1e-3, weight_decay=2))
MODEL = "attn attn_bias pos norm qk_norm layers channels heads context dataset".split()
TRAINING = "dropout steps batch lr warmup weight_decay".split()
LEARNED = dict(val_loss=3, best_val_loss=3, repeat_loss=3, repeat_loss_beyond=3, attention_rms_init=2,
               attention_rms_early=2)  # what tables show of a run, with so many decimals
COST = dict(tokens_per_s=0, peak_gib=1, seconds=0)


# -------- Model. B batch, T tokens, C channels, H heads, D = C / H.

def alibi_slopes(heads):
    """(H,) geometric series 2^(-8/H), 2^(-16/H), ... (arXiv 2108.12409); if H is no power of two, two such series."""
    power = 2 ** int(math.log2(heads))
    return 2 ** (-8 / power * torch.tensor([h + 1 if h < power else h - power + 0.5 for h in range(heads)]))


def rotate(x, turn):
    """RoPE (arXiv 2104.09864) of x (B, T, H, D): dimensions d and d + D/2 turn by the angle of turn[:, t, d]."""
    cos, sin = turn[:, :x.shape[1], None]                                                   # each (T, 1, D/2)
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.qkv = nn.Linear(args.channels, 3 * args.channels, bias=False)
        self.out = nn.Linear(args.channels, args.channels, bias=False)
        D = args.channels // args.heads
        self.q_norm, self.k_norm = (nn.RMSNorm(D, eps=1e-5) if args.qk_norm else nn.Identity() for _ in range(2))
        t = torch.arange(2 * args.context)  # beyond the context, too, for repeat_loss_beyond
        angle = t[:, None] * 10000 ** (-torch.arange(D // 2) / (D // 2))                    # (2 * context, D/2)
        turn = torch.stack([angle.cos(), angle.sin()]) if args.pos == "rope" else None
        self.register_buffer("turn", turn, persistent=False)
        self.register_buffer("slopes", alibi_slopes(args.heads) if args.pos == "alibi" else None, persistent=False)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.args.heads, -1).unbind(2)                  # each (B, T, H, D)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if self.args.pos == "rope":
            q, k = rotate(q, self.turn), rotate(k, self.turn)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))                                    # views (B, H, T, D)
        if self.args.attn == "sigmoid":
            y = sigmoid_attention(q, k, v, bias=self.args.attn_bias, is_causal=True, alibi_slopes=self.slopes)
        elif self.slopes is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # softmax takes ALiBi as a tensor (H, T, T), -inf for the future
            t = torch.arange(float(T), device=x.device)
            distance = (t[:, None] - t).masked_fill(t > t[:, None], math.inf)
            y = F.scaled_dot_product_attention(q, k, v, (-self.slopes[:, None, None] * distance).to(q.dtype))
        if not self.training:
            self.rms = y.float().square().mean().sqrt()
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):  # x + post(attention(pre(x))), then x + post(SwiGLU(pre(x))); --norm pre has no post
    def __init__(self, args):
        super().__init__()
        C, width = args.channels, math.ceil(8 / 3 * args.channels / 256) * 256
        self.attn = Attention(args)
        self.up, self.down = nn.Linear(C, 2 * width, bias=False), nn.Linear(width, C, bias=False)
        self.pre = nn.ModuleList(nn.RMSNorm(C, eps=1e-5) for _ in range(2))
        self.post = nn.ModuleList(nn.RMSNorm(C, eps=1e-5) if args.norm == "hybrid" else nn.Identity() for _ in range(2))
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x):
        x = x + self.dropout(self.post[0](self.attn(self.pre[0](x)))).to(x.dtype)
        gate, y = self.up(self.pre[1](x)).chunk(2, -1)
        return x + self.dropout(self.post[1](self.down(F.silu(gate) * y))).to(x.dtype)


class GPT(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.bf16 = args.bf16
        self.embed = nn.Embedding(256, args.channels)
        self.positions = nn.Embedding(args.context, args.channels) if args.pos == "learned" else None
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.layers))
        self.norm = nn.RMSNorm(args.channels, eps=1e-5)
        self.head = nn.Linear(args.channels, 256, bias=False)
        for matrix in [p for p in self.parameters() if p.dim() > 1]:  # variance 1 / fan in; an embedding, 1 / fan out
            nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5)

    def forward(self, windows):
        """windows (B, T + 1) of bytes -> (B, T) nats: each byte from those before it."""
        logits = self.logits(windows[:, :-1].long()).float()
        return F.cross_entropy(logits.transpose(1, 2), windows[:, 1:].long(), reduction="none")

    def logits(self, tokens):
        """tokens (B, T) int64 -> (B, T, 256)."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.embed(tokens).to(torch.bfloat16 if self.bf16 else torch.float32)       # (B, T, C)
            if self.positions is not None:
                x = x + self.positions.weight[:tokens.shape[1]].to(x.dtype)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))


# -------- Evaluation

@torch.no_grad()
def evaluate(model, windows, first=0):
    """Of windows (N, T + 1): the mean loss in nats from position `first` on, and the root mean square of the attention
    output, before its projection, in its largest layer, over the last batch. Draws no random numbers."""
    model.eval()
    losses = [model(some)[:, first:].mean(1).double() for some in windows.split(1 + 2 ** 15 // windows.shape[1])]
    model.train()
    return torch.cat(losses).mean().item(), max(block.attn.rms.item() for block in model.blocks)


@torch.no_grad()
def sample(args, length=500, temperature=0.8):
    """The prompt and `length` bytes by the model in out_dir, each drawn from what it makes of the context before."""
    state = load(Path(args.out_dir) / "checkpoint.pt", args)
    model = GPT(argparse.Namespace(**state["args"] | dict(bf16=args.bf16))).to(args.device).eval()
    model.load_state_dict(state["model"])
    torch.manual_seed(args.seed)
    text = torch.tensor([list(args.prompt.encode() or b"\n")], device=args.device)                # (1, T)
    for _ in range(length):
        logits = model.logits(text[:, -state["args"]["context"]:])[:, -1].float() / temperature   # (1, 256)
        text = torch.cat([text, torch.multinomial(logits.softmax(-1), 1)], 1)
    return bytes(text[0].tolist()).decode(errors="replace")


# -------- Training

def save_checkpoint(path, state):
    """Write another file, then rename it: a kill in between leaves the old checkpoint whole."""
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load(path, args):
    """A checkpoint or metrics; with --resume only of the same model and data, and, to compare, the same training."""
    if not path.exists():
        fail(f"--out_dir {path.parent} holds no {path.name}\nHINT: train first, without --resume and --sample")
    state = json.loads(path.read_text()) if path.suffix == ".json" else torch.load(path, args.device, weights_only=True)
    there = state.get("args", state)
    same = ["seed", *MODEL, *(TRAINING if args.compare else [])] if args.resume else []
    differing = [f"{x} {there[x]} there, {getattr(args, x)} here" for x in same if there[x] != getattr(args, x)]
    if differing:
        fail(f"--resume: {path} is another run: {'; '.join(differing)}")
    return state


def train(args, tokens, out_dir):
    """Train on nine tenths of tokens (N,) uint8, validate on the next 2^17 at most. Ctrl-C saves and exits."""
    began, done = time.time(), out_dir / "metrics.json"
    if args.resume and done.exists() and (metrics := load(done, args))["steps"] >= args.steps:
        return metrics
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    train_tokens, val_tokens = tokens.to(args.device).tensor_split([len(tokens) * 9 // 10])
    windows = train_tokens.unfold(0, args.context + 1, 1)                                   # (N - T, T + 1), a view
    val_windows = val_tokens[:2 ** 17].unfold(0, args.context + 1, args.context)  # adjoining; a rest is left out
    torch.manual_seed(args.seed)
    gpt = model = GPT(args).to(args.device)
    if args.device == "cuda":
        torch.compiler.reset()  # forget the run before
        torch.cuda.reset_peak_memory_stats()
        model = torch.compile(gpt, mode="reduce-overhead" if world == 1 else None)  # CUDA graphs
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    groups = [dict(params=[p for p in gpt.parameters() if p.dim() > 1], weight_decay=args.weight_decay),
              dict(params=[p for p in gpt.parameters() if p.dim() == 1], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=args.device != "mps")
    state = load(out_dir / "checkpoint.pt", args) if args.resume else dict(step=0)
    first = state["step"]
    if first > 0:
        gpt.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    out_dir.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    log = open(out_dir / "log.jsonl" if rank == 0 else os.devnull, "a" if args.resume else "w", buffering=1)
    print(json.dumps(dict(config=vars(args), torch=torch.__version__)), file=log)
    stop = []  # Ctrl-C lets the step in progress end; a second one does not wait
    previous = signal.signal(signal.SIGINT, lambda *_: fail("interrupted", 130) if stop else stop.append(True))
    speeds, tick = [], None  # steps/s, mostly of ten steps each, without the evaluations
    bar = tqdm(range(first, args.steps), out_dir.name, initial=first, total=args.steps, disable=rank > 0, mininterval=1)
    for step in bar:
        if rank == 0 and step < 200 and step % 10 == 0:
            print(json.dumps(dict(step=step, attention_rms=evaluate(gpt, val_windows[:8])[1])), file=log)
        tick = tick or (time.time(), step)
        progress = max(0, step - args.warmup) / max(1, args.steps - args.warmup)  # warm-up, then a cosine to a tenth
        lr = args.lr * min((step + 1) / max(1, args.warmup), 0.55 + 0.45 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(1_000_003 * args.seed + step)  # batch and dropout depend on nothing else: resuming is exact
        starts = torch.randint(len(windows), (args.batch,), device=args.device)[rank::world]
        loss = model(windows[starts]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        evaluating = stop or step + 1 == args.steps or (step + 1) % args.eval_interval == 0
        if evaluating or (step + 1) % 10 == 0:
            if world > 1:
                dist.all_reduce(loss.detach())
            train_loss = loss.item() / world  # waits for the device, so that the clock tells the truth
            if not math.isfinite(train_loss):
                bar.close()
                fail(f"loss {train_loss} at step {step}, learning rate {lr:.2e}", status=1)
            speeds.append((step + 1 - tick[1]) / (time.time() - tick[0]))
            tick = None
            bar.set_postfix(loss=f"{train_loss:.3f}", refresh=False)
        if rank == 0 and evaluating:
            val_loss, _ = evaluate(gpt, val_windows)
            print(json.dumps(dict(step=step + 1, train_loss=train_loss, val_loss=val_loss)), file=log)
            bar.write(f"step {step + 1}/{args.steps}  train {train_loss:.4f}  val {val_loss:.4f}")
            state = dict(args=vars(args), model=gpt.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            save_checkpoint(out_dir / "checkpoint.pt", state)
        if stop and step + 1 < args.steps:
            bar.close()
            fail(f"interrupted at step {step + 1}; {out_dir / 'checkpoint.pt'} is saved, --resume goes on", status=130)
    signal.signal(signal.SIGINT, previous)
    if world > 1:
        dist.destroy_process_group()
        if rank > 0:
            raise SystemExit
    losses, norms = history(out_dir)
    metrics = vars(args) | dict(
        val_loss=val_loss, best_val_loss=min(losses.values()), train_loss=train_loss, attention_rms_init=norms[0],
        attention_rms_early=max(norms.values()),
        tokens_per_s=torch.tensor(speeds).median().item() * args.batch * args.context, seconds=time.time() - began,
        peak_gib=torch.cuda.max_memory_allocated() / 2 ** 30, device=args.machine, torch=torch.__version__)
    for key, n in (("repeat_loss", args.context // 2), ("repeat_loss_beyond", args.context)):  # text that came before
        if 2 * n <= args.context or args.pos != "learned":
            metrics[key] = evaluate(gpt, val_windows[:64, :n].repeat(1, 2), first=n)[0]
    done.write_text(json.dumps(metrics, indent=1))
    return metrics


def history(folder):
    """{step: validation loss} and {step: RMS of the attention output} of the run in folder."""
    records = [json.loads(line) for line in open(folder / "log.jsonl")]
    return [{r["step"]: r[key] for r in records if key in r} for key in ("val_loss", "attention_rms")]


def compare(args, tokens, out_dir):
    """(rows, {name: folder of its last run}) of softmax, sigmoid, and sigmoid without its bias, on equal batches."""
    rows, folders, b = [], {}, args.attn_bias
    for name, bias in (("softmax", b), (f"sigmoid, b = {b:.2f}", b), ("sigmoid, b = 0", 0.0)):
        runs = []
        for seed in range(args.seed, args.seed + args.seeds):
            folders[name] = folder = out_dir / f"{name} seed {seed}".replace(" ", "_")
            arm = argparse.Namespace(**vars(args) | dict(attn=name.split(",")[0], attn_bias=bias, seed=seed))
            arm.resume = args.resume and any((folder / file).exists() for file in ("checkpoint.pt", "metrics.json"))
            runs.append(train(arm, tokens, folder))
        row = {key: runs[0][key] for key in [*MODEL, *TRAINING, "device", "torch"]} | dict(name=name, seeds=len(runs))
        for key in [key for key in LEARNED | COST if key in runs[0]]:
            values = torch.tensor([run[key] for run in runs], dtype=torch.float64)
            row[key], row[f"{key}_std"] = values.mean().item(), values.std(correction=min(1, len(runs) - 1)).item()
        rows.append(row)
    return rows, folders


def table(rows, metrics=LEARNED):
    """The rows of comparisons, or the metrics of single runs, in Markdown. Flags that differ get a column."""
    flags = [key for key in MODEL[2:] + TRAINING if len({str(row[key]) for row in rows}) > 1]
    columns = {key: digits for key, digits in metrics.items() if all(key in row for row in rows)}
    lines = [[*flags, "attention", *columns], ["---"] * (len(flags) + 1 + len(columns))]
    for row in rows:
        numbers = [f"{row[key]:,.{n}f}" + (f" ± {row[key + '_std']:,.{n}f}" if row.get("seeds", 1) > 1 else "")
                   for key, n in columns.items()]
        lines.append([*(str(row[key]) for key in flags), row.get("name", row["attn"]), *numbers])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(path, folders):
    """Validation loss and RMS of the attention output against steps, a line a run."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, folder in folders.items():
        for axis, curve in zip(axes, history(folder)):
            axis.plot(*zip(*sorted(curve.items())), label=name, marker=".")
    axes[0].set(xlabel="step", ylabel="validation loss, nats per byte")
    axes[1].set(xlabel="step, early", ylabel="RMS of the attention output", yscale="log")
    axes[0].legend(frameon=False)
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
    groups = map(parser.add_argument_group, ("data", "model", "optimisation", "run"))
    data, model, optimisation, run = (group.add_argument for group in groups)
    data("--data", nargs="+", metavar="NAME", help="shakespeare, python, or files and folders; None is what can be had")
    model("--attn", choices=("sigmoid", "softmax"), default="sigmoid", help="attention")
    model("--attn_bias", type=float, help="b of sigmoid attention; None is -log of the context")
    model("--pos", choices=("alibi", "rope", "learned", "none"), default="alibi", help="position embedding")
    model("--norm", choices=("pre", "hybrid"), default="hybrid", help="before each branch, or before and after")
    model("--qk_norm", action=argparse.BooleanOptionalAction, default=True, help="RMSNorm of q and k")
    model("--layers", type=int, help="blocks")
    model("--channels", type=int, help="width")
    model("--heads", type=int, help="attention heads, of 16 to 256 channels each")
    model("--context", type=int, help="bytes a window")
    model("--dropout", type=float, help="after each branch")
    optimisation("--steps", type=int, help="optimiser steps of a run")
    optimisation("--batch", type=int, help="windows a step, over all processes")
    optimisation("--lr", type=float, help="peak learning rate of AdamW")
    optimisation("--warmup", type=int, default=100, help="steps of linear warm-up")
    optimisation("--weight_decay", type=float, help="decoupled, of matrices")
    run("--compare", action="store_true", help="softmax, sigmoid, and sigmoid with b = 0, in one table")
    run("--seeds", type=int, default=1, help="with --compare: runs an arm")
    run("--seed", type=int, default=1337, help="of weights, batches, dropout and sample")
    run("--plot", metavar="FILE.png", help="draw losses and attention norms")
    run("--out_dir", default="out/sigmoid_gpt", help="for checkpoint.pt, log.jsonl, metrics.json")
    run("--resume", action="store_true", help="go on from out_dir/checkpoint.pt, same batches; --compare: run by run")
    run("--sample", action="store_true", help="no training: write a sample from out_dir/checkpoint.pt")
    run("--prompt", default="\n", help="text that the sample continues")
    run("--eval_interval", type=int, default=250, help="steps between evaluations, each with a checkpoint")
    run("--device", choices=there, default=there[0], help="of what this machine has")
    args = parser.parse_args(argv)
    if args.device == "cpu":  # once more, now that it is known what suits the run: three arms in the time of one
        parser.set_defaults(**DEFAULTS["cpu"] | (dict(steps=DEFAULTS["cpu"]["steps"] // 3) if args.compare else {}))
        args = parser.parse_args(argv)
    args.attn_bias = -math.log(max(1, args.context)) if args.attn_bias is None else args.attn_bias
    lowest = dict(layers=1, channels=1, heads=1, context=2, steps=1, batch=1, eval_interval=1, seeds=1, seed=0, lr=0,
                  warmup=0, weight_decay=0, dropout=0, attn_bias=-1e3)
    D, world = args.channels / max(1, args.heads), int(os.environ.get("WORLD_SIZE", 1))
    for wrong, message in (
            *((not low <= getattr(args, name) < math.inf, f"--{name} {getattr(args, name)}; allowed: {low} or more")
              for name, low in lowest.items()),
            (args.dropout >= 1, f"--dropout {args.dropout}; allowed: below 1"),
            (D % 2 or not 16 <= D <= 256, f"--heads {args.heads}: a head has {D:g} channels; allowed: even, 16 to 256"),
            (args.compare and world > 1, "--compare; allowed: in one process"),
            (args.batch % world, f"--batch {args.batch} on {world} processes; allowed: a multiple"),
            (args.plot and not (Path(args.plot).absolute().parent.is_dir() and importlib.util.find_spec("matplotlib")),
             f"--plot {args.plot}; allowed: a file in a folder that is there, and pip install matplotlib")):
        if wrong:
            fail(message)
    args.bf16 = args.device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    args.machine = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    return args


def main(argv=None):
    """Train, compare or sample, as the flags say; returns what is in metrics.json."""
    args = parse(argv)
    out_dir = Path(args.out_dir)
    warnings.filterwarnings("ignore", "Mismatch dtype")  # eager RMSNorm of bf16 by weights in fp32, in evaluation
    if args.sample:
        return print(sample(args))
    if "RANK" in os.environ:  # started by torchrun
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    try:
        tokens, args.dataset = load_text(args.data, 100 * args.context)
    except (OSError, ValueError) as error:
        fail(f"--data: {error}")
    if os.environ.get("RANK", "0") == "0":
        print(f"{args.machine}, {'bfloat16 (capability >= 8.0)' if args.bf16 else 'float32 (no fast bfloat16)'}, "
              f"{args.dataset}, {sum(p.numel() for p in GPT(args).parameters()):,} parameters, "
              f"{'Triton' if args.device in KERNEL_DEVICES and args.attn == 'sigmoid' else 'PyTorch'} attention")
    if args.compare:
        rows, folders = compare(args, tokens, out_dir)
        result = dict(rows=rows, seed=args.seed) | {key: rows[0][key] for key in "device dataset steps torch".split()}
        (out_dir / "metrics.json").write_text(json.dumps(result, indent=1))
        print(f"\n{table(rows)}\n\n{table(rows, COST)}\n\nmean ± std, seeds: {args.seeds}")
    else:
        result, folders = train(args, tokens, out_dir), {args.attn: out_dir}
        print(sample(args), "", *(f"{key:26}{result[key]:,.4f}" for key in LEARNED | COST if key in result), sep="\n")
    if args.plot:
        plot(args.plot, folders)
    return result


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: fail("interrupted", status=130))
    main()
