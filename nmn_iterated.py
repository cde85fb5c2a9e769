"""
Neural module networks, in the manner of "Iterated Learning for Emergent Systematicity in VQA" (arXiv 2105.01119).

A generator says a program z for a question q. An engine runs z on the image x, a neural module a token, and answers y.
They learn jointly, with z* the few programs that are given, r = 1 where a well-formed program got the right answer, and
b the moving average of r:

    L_engine = -log p(y | x, z), z ~ p(z | q)        L_generator = -(r - b) log p(z | q) - mean of log p(z* | q)

That makes answers right, not programs systematic. So there are generations: the generator's language is sampled, a new
generator learns it in few steps, a new engine learns to run what that one says, and these two learn jointly in turn.

    python nmn_iterated.py                the language, generation by generation
    python nmn_iterated.py --compare      beside no generations, at equal interactions and at equal steps in all

Differs from the paper: its sizes, rates, phase lengths, stem and Tensor-FiLM equations were not known to us, so these
are ours; images are drawn anew, 600 a question, where its data have 56.
"""
import argparse
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

from data.shapes_questions import QUESTIONS, TOKENS, WORDS, english, question_tensors
from data.shapes_symmetries import symmetries, transform
from data.shapes_syget import load_shapes
from data.summary import T95

END, SCENE, AND, START, LENGTH = 0, 1, len(TOKENS) - 1, len(TOKENS), 8  # the longest program, 7, and its <end>
SEEN = 135  # the first questions are those of training, the rest those of Val-OOD
SCORES = ["val_iid_acc", "val_iid_program_acc", "val_ood_acc", "val_ood_program_acc"]
REPORTED = [*SCORES, "train_acc", "program_acc", "seconds"]
FREE = "generations seeds plot out_dir resume eval_interval compare device equal".split()  # may change with --resume


# -------- The program generator. B questions, T words or tokens, V tokens, H hidden units.

class Generator(nn.Module):
    """A bidirectional LSTM reads; an LSTM with additive attention, fed its last context, writes."""
    def __init__(self, H):
        super().__init__()
        self.words, self.tokens = nn.Embedding(len(WORDS), H), nn.Embedding(START + 1, H)
        self.forwards, self.backwards = (nn.LSTM(H, H, batch_first=True) for _ in range(2))
        self.cell = nn.LSTMCell(3 * H, H)
        self.key, self.query, self.score = nn.Linear(2 * H, H), nn.Linear(H, H, bias=False), nn.Linear(H, 1, bias=False)
        self.out = nn.Linear(3 * H, len(TOKENS))

    def read(self, words, lengths):
        """words (B, T), lengths (B,) -> what `write` attends to, and its first state."""
        x, t = self.words(words), torch.arange(words.shape[1], device=words.device)             # (B, T, H)
        turned = ((lengths[:, None] - 1 - t) % words.shape[1])[..., None].expand_as(x)  # the words, last first
        memory = torch.cat([self.forwards(x)[0], self.backwards(x.gather(1, turned))[0].gather(1, turned)], -1)
        h, c = x.new_zeros(2, len(x), self.cell.hidden_size)
        return (memory, self.key(memory), t >= lengths[:, None]), (h, c, torch.zeros_like(memory[:, 0]))

    def write(self, memory, state, token):
        """One step: the last token (B,) -> logits (B, V) of the next, and the new state."""
        memory, keys, padding = memory
        h, c = self.cell(torch.cat([self.tokens(token), state[2]], -1), state[:2])
        scores = self.score(torch.tanh(keys + self.query(h)[:, None]))[..., 0].masked_fill(padding, -math.inf)
        context = (scores.softmax(-1)[:, None] @ memory)[:, 0]                                  # (B, 2H)
        return self.out(torch.cat([h, context], -1)), (h, c, context)


def speak(generator, data, questions, forced=None, sampled=False):
    """Programs (B, T) int64 for questions (B,), sampled or token by token the likeliest, and log p (B,) of each. Where
    forced (B, T) is not -1, it is said instead. After <end> everything is <end> and counts for nothing."""
    noise = torch.zeros(len(questions), LENGTH, len(TOKENS), device=questions.device)
    if sampled:  # the largest of logits + Gumbel noise is a sample of their softmax
        noise = -noise.exponential_().log()
    if forced is not None:
        others = forced[:, :LENGTH, None] != torch.arange(len(TOKENS), device=questions.device)
        noise = noise.masked_fill(others & (forced[:, :LENGTH, None] >= 0), -math.inf)
    memory, state = generator.read(data.words[questions], data.lengths[questions])
    token = torch.full_like(questions, START)
    said = []
    for t in range(LENGTH):
        logits, state = generator.write(memory, state, token)
        token = (logits + noise[:, t]).argmax(-1)
        said.append((logits, token))
    logits, tokens = (torch.stack(x, 1) for x in zip(*said))                                    # (B, T, V), (B, T)
    ended = (tokens == END).cumsum(1) - (tokens == END).long() > 0
    log_p = logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    return tokens.masked_fill(ended, END), log_p.masked_fill(ended, 0).sum(1)


# -------- Execution engines. A batch of programs runs from right to left, a position of all of them at once. The state
# of a token is D = width numbers in each of 9 cells, zero for <end> and missing operands.

def parse(programs):
    """programs (B, T) in prefix order -> where the second operand of each token begins (B, T), T if there is none, and
    whether a program is one whole expression (B,). A first operand begins next to its token."""
    place = torch.arange(programs.shape[1] + 1, device=programs.device)                         # 0 to T
    length = (programs != END).long().cumprod(1).sum(1, keepdim=True)                           # (B, 1)
    arity = (programs > SCENE).long() + (programs == AND)
    wanted = F.pad(((arity - 1) * (place[:-1] < length)).cumsum(1), (1, 0))  # (B, T + 1): operands, by what is before
    closed = (wanted[:, None] == wanted[:, :-1, None] - 1) & (place > place[:-1, None])         # (B, T, T + 1)
    ends = torch.where(closed, place, len(place)).amin(2)  # where the expression that begins at a token ends
    second = F.pad(ends[:, 1:], (0, 1), value=len(place))
    return torch.where((programs == AND) & (second < length), second, place[-1]), ends[:, 0] == length[:, 0]


class Conv(nn.Module):
    """A zero-padded 3 x 3 convolution of 3 x 3 cells, (B, 9C) -> (B, 9D), with weights for each of V tokens."""
    def __init__(self, C, D, V=1, spectral_norm=False):
        super().__init__()
        bound = (9 * C) ** -0.5
        self.weight = nn.Parameter(torch.empty(V, 9, C, D).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(V, D).uniform_(-bound, bound))
        steps = [(3 * (y - r) + x - c + 4 if abs(y - r) < 2 and abs(x - c) < 2 else 9)  # from cell (y, x) to (r, c)
                 for y in range(3) for x in range(3) for r in range(3) for c in range(3)]
        self.register_buffer("steps", torch.tensor(steps), persistent=False)
        self.register_buffer("u", F.normalize(torch.randn(V, 9 * D, 1), dim=1) if spectral_norm else None)

    def matrices(self):
        """The weights as V matrices (9C, 9D), side by side (9C, V 9D) on CUDA; to be made once a batch. With spectral
        norm, each over its largest singular value, which a power iteration follows from step to step."""
        padded = torch.cat([self.weight, torch.zeros_like(self.weight[:, :1])], 1)
        spread = padded.index_select(1, self.steps).unflatten(1, (9, 9))                        # (V, 9, 9, C, D)
        W = spread.transpose(2, 3).flatten(3).flatten(1, 2)                                     # (V, 9C, 9D)
        if self.u is not None:
            if torch.is_grad_enabled():
                self.u.copy_(F.normalize(W.mT @ F.normalize(W @ self.u, dim=1), dim=1).detach())
            W = W / (W @ self.u.clone()).norm(dim=1, keepdim=True)
        return W.transpose(0, 1).flatten(1) if W.is_cuda or len(W) == 1 else W.unbind()

    def forward(self, x, matrices, token=None):
        """token (B,) chooses the weights, if there are several."""
        bias = self.bias.repeat(1, 9)                                                           # (V, 9D)
        if isinstance(matrices, tuple):
            order, counts = token.argsort(), token.bincount(minlength=len(bias)).tolist()
            parts = enumerate(zip(x.index_select(0, order).split(counts), matrices, bias))
            y = [torch.addmm(b, part, W) if v > END and len(part) else part for v, (part, W, b) in parts]
            return torch.cat(y).index_select(0, order.argsort())
        y = torch.addmm(bias.flatten(), x, matrices)  # every token's for every example: no wait for how many each has
        if token is None:
            return y
        return y.unflatten(1, bias.shape).gather(1, token.view(-1, 1, 1).expand(-1, 1, bias.shape[1]))[:, 0]


class Modules(nn.Module):
    """R_w(x) = ReLU(x + conv_w(ReLU(conv_w(x)))) of the scene, an operand, or, for `and`, two joined. Tensor-NMN has
    weights for each token w; Tensor-FiLM-NMN, in our form, the same for all, and w scales and shifts their input."""
    def __init__(self, D, film, spectral_norm):
        super().__init__()
        self.convs = nn.ModuleList(Conv(D, D, 1 if film else len(TOKENS), spectral_norm) for _ in range(2))
        self.join = nn.Linear(2 * D, D)
        self.films = nn.ModuleList(nn.Embedding(len(TOKENS), 2 * D) for _ in self.convs) if film else None

    def conv(self, i, x, token, matrices):
        if self.films is None:
            return self.convs[i](x, matrices[i], token)
        scale, shift = self.films[i](token)[:, None].chunk(2, 2)                                # (B, 1, D) each
        return self.convs[i](((1 + 2 * torch.tanh(scale)) * x.unflatten(1, (9, -1)) + shift).flatten(1), matrices[i])

    def forward(self, scene, first, second, token, matrices):
        x = torch.where((token == SCENE)[:, None], scene, first)
        if second is not None:
            pair = torch.cat([first.unflatten(1, (9, -1)), second.unflatten(1, (9, -1))], -1)   # (B, 9, 2D)
            x = torch.where((token == AND)[:, None], F.relu(self.join(pair)).flatten(1), x)
        return F.relu(x + self.conv(1, F.relu(self.conv(0, x, token, matrices)), token, matrices))


class Engine(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(300, 64), nn.ReLU(), nn.Linear(64, args.width), nn.ReLU())
        self.cells = Modules(args.width, args.modules == "film", args.spectral_norm)
        self.classifier = nn.Sequential(nn.Linear(args.width, 128), nn.ReLU(), nn.Linear(128, 2))

    def forward(self, images, programs):
        """images (B, 9, 300) uint8, programs (B, T) -> logits (B, 2) of no and yes, if they are well-formed (B,)."""
        second, wellformed = parse(programs)
        scene = self.stem(images / 255.0).flatten(1)                                            # (B, 9D)
        matrices = [conv.matrices() for conv in self.cells.convs]
        states = [torch.zeros_like(scene)]  # of position T, then T - 1, ...
        seen = self.cells(scene, states[0], None, torch.full_like(programs[:, 0], SCENE), matrices)
        for t, token in reversed(list(enumerate(programs.unbind(1)))):
            operand = None
            if token.is_cuda or (token == AND).any():
                index = (programs.shape[1] - second[:, t]).view(-1, 1, 1).expand(-1, 1, scene.shape[1])
                operand = torch.stack(states, 1).gather(1, index)[:, 0]
            state = self.cells(scene, states[-1], operand, token.masked_fill(token == SCENE, END), matrices)
            states.append(torch.where((token == SCENE)[:, None], seen, state.masked_fill((token == END)[:, None], 0)))
        return self.classifier(states[-1].unflatten(1, (9, -1)).amax(1)), wellformed


# -------- Loss

def loss_of(phase, generator, engine, data, rows, given, baseline, transmitted, args):
    """(loss, right (B,)) of a batch: rows (B,) of the training set, or, in phase "generator", of what was transmitted.

    "generator": cross-entropy of programs, transmitted and given ones; "engine": of answers to what the generator says;
    "interacting": of answers and of given programs, and REINFORCE. Every generation knows the given programs."""
    if phase == "generator":
        questions, forced = (x[rows] for x in transmitted)
    else:
        images, questions, answers = (x[rows] for x in data.train)
        forced = data.programs[questions] if args.true_programs else torch.full_like(data.programs[questions], -1)
        images, forced = transform(images, forced, data) if args.symmetries else (images, forced)
    given = given[:0] if phase == "engine" else given
    asked, forced = torch.cat([questions, given]), torch.cat([forced, data.programs[given]])
    with torch.set_grad_enabled(phase != "engine"):
        programs, log_p = speak(generator, data, asked, forced, sampled=True)
    said, supervised = log_p.tensor_split([len(rows)])
    supervised = -supervised.sum() / max(1, len(given))
    if phase == "generator":
        return supervised - said.mean(), torch.zeros_like(said)
    logits, wellformed = engine(images, programs[:len(rows)])
    right = ((logits.argmax(1) == answers) & wellformed).float()
    policy = -((right - baseline) * said).mean() if phase == "interacting" else 0.0
    return F.cross_entropy(logits, answers) + policy + supervised, right


# -------- Evaluation

@torch.no_grad()
def evaluate(generator, engine, data, transmitted):
    """What is right on Val-IID and Val-OOD, of greedy programs; without a generator, of true ones."""
    questions = torch.arange(len(QUESTIONS), device=data.words.device)
    programs = data.programs if generator is None else speak(generator, data, questions)[0]
    found = {}
    if generator is not None:
        torch.manual_seed(0)  # every step of training sets its own
        found["entropy"] = -speak(generator, data, questions[:SEEN].repeat(16), sampled=True)[1].mean().item()  # nats
    right, valid = (programs == data.programs).all(1).float(), parse(programs)[1].float()
    for split, part in (("val_iid", slice(SEEN)), ("val_ood", slice(SEEN, None))):
        batches = zip(*(x.split(2048) for x in getattr(data, split)))
        answers = torch.cat([engine(images, programs[asked])[0].argmax(1) == y for images, asked, y in batches])
        scores = dict(acc=answers.float(), program_acc=right[part], valid=valid[part])
        found |= {f"{split}_{name}": score.mean().item() for name, score in scores.items()}
    found["program_acc"] = found["val_iid_program_acc"]
    if transmitted is not None:
        found["agreement"] = (programs[transmitted[0]] == transmitted[1]).all(1).float().mean().item()
    found["said"] = [f"{english(QUESTIONS[i])}: {' '.join(TOKENS[token] for token in programs[i] if token)}"
                     for i in (0, 147, 190, 217)]
    return found


# -------- Training

def replayed(step, device):
    """On CUDA, `step` as a graph from its fourth call on: launching kernels this small takes longer than they do."""
    if device.type != "cuda":
        return step
    side, graph, results = torch.cuda.Stream(), torch.cuda.CUDAGraph(), []

    def call():
        if len(results) < 3:  # warm, on a side stream, as capturing wants it
            torch.cuda.synchronize()
            with torch.cuda.stream(side):
                results.append(step())
            torch.cuda.synchronize()
            return results[-1]
        if len(results) == 3:
            with torch.cuda.graph(graph):
                results.append(step())
        graph.replay()
        return results[-1]

    return call


def save_checkpoint(path, state):
    """Write another file, then rename it: a kill in between leaves the old checkpoint whole."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def load_checkpoint(path, device, args):
    if not path.exists():
        fail(f"--out_dir {path.parent} holds no {path.name}\nHINT: train first, without --resume")
    state = torch.load(path, map_location=device, weights_only=True)
    if differing := [f"{x} {there} there, {vars(args)[x]} here" for x, there in state["args"].items()
                     if x not in FREE and there != vars(args)[x]]:
        fail(f"--resume: {path} is another run: {'; '.join(differing)}")
    return state


def new_agent(kind, args, device):
    """A fresh generator or engine, and an optimiser that knows nothing of the one before."""
    agent = (Engine(args) if kind == "engine" else Generator(args.hidden)).to(device)
    return agent, torch.optim.AdamW(agent.parameters(), args.lr, weight_decay=args.weight_decay, fused=True,
                                    capturable=device.type == "cuda")


def train(args, data, device, out_dir):
    """All phases of all generations: (metrics of the end, a record an evaluation, agents). Ctrl-C saves and exits."""
    began = time.time()
    given = torch.randperm(SEEN, generator=torch.Generator().manual_seed(args.seed))[:args.given].to(device)
    phases = dict(interacting=args.interact_steps, generator=args.generator_steps, engine=args.engine_steps)
    schedule = [(g, phase, steps) for g in range(args.generations) for phase, steps in phases.items()
                if phase == "interacting" or steps and g + 1 < args.generations]  # the last generation has no heirs
    schedule = [(0, "engine", args.interact_steps)] if args.true_programs else schedule
    torch.manual_seed(1_000_003 * args.seed)
    agents = {kind: new_agent(kind, args, device) for kind in ("generator", "engine")}
    number, done, records, transmitted = 0, 0, [], None
    baseline = torch.zeros((), device=device)
    if args.resume:
        state = load_checkpoint(out_dir / "checkpoint.pt", device, args)
        number, done, records, transmitted = state["number"], state["done"], state["records"], state["transmitted"]
        began -= records[-1]["seconds"]
        baseline.copy_(state["baseline"])
        for kind, saved in state["agents"].items():
            for part, content in zip(agents[kind], saved):
                part.load_state_dict(content)
    out_dir.mkdir(parents=True, exist_ok=True)
    log = open(out_dir / "log.jsonl", "a" if args.resume else "w", buffering=1)
    log.write(json.dumps(dict(config=vars(args), device=str(device), torch=torch.__version__)) + "\n")
    stop = []  # Ctrl-C lets the step in progress end; a second one does not wait
    previous = signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if stop else stop.append(True))
    before = [sum(steps for *_, steps in schedule[:i]) for i in range(len(schedule) + 1)]
    bar = tqdm(total=before[-1], initial=before[number] + done, desc=out_dir.name, mininterval=1)
    for number in range(number, len(schedule)):
        generation, phase, steps = schedule[number]
        interactions = sum(n for _, name, n in schedule[:number] if name == "interacting")
        torch.manual_seed(1_000_003 * args.seed + 500_000 + number)
        if not done and phase == "generator":  # the old one speaks for the last time
            questions = torch.randint(SEEN, (args.transmitted,), device=device)
            transmitted = questions, speak(agents["generator"][0], data, questions, sampled=True)[0]
        if not done and (phase == "generator" or phase == "engine" and not args.keep_engine):
            agents[phase] = new_agent(phase, args, device)
        generator, engine = agents["generator"][0], agents["engine"][0]
        learning = [optimizer for kind, (_, optimizer) in agents.items() if phase in (kind, "interacting")]

        def step():
            known = transmitted if phase == "generator" else data.train
            rows = torch.randint(len(known[0]), (args.batch,), device=device)
            loss, right = loss_of(phase, generator, engine, data, rows, given, baseline, transmitted, args)
            if phase == "interacting":
                baseline.lerp_(right.mean(), 0.1)
            loss.backward()
            for optimizer in learning:
                optimizer.step()
                optimizer.zero_grad()
            return loss.detach(), right.mean()

        take = replayed(step, device)
        for t in range(done, steps):
            torch.manual_seed(1_000_003 * args.seed + before[number] + t)  # all chance of a step: resuming is exact
            loss, right = take()
            bar.update()
            last = t + 1 == steps or bool(stop)
            if last or (t + 1) % 50 == 0:
                if not math.isfinite(loss.item()):
                    bar.close()
                    fail(f"loss {loss.item()} at step {before[number] + t}, learning rate {args.lr:.2e}", status=1)
                bar.set_postfix(generation=generation, phase=phase, loss=f"{loss.item():.3f}", refresh=False)
            if last or (t + 1) % args.eval_interval == 0 or t + 1 == args.equal:
                found = evaluate(None if args.true_programs else generator, engine, data, transmitted)
                records.append(dict(generation=generation, phase=phase, step=before[number] + t + 1, end=t + 1 == steps,
                                    interactions=interactions + (t + 1) * (phase == "interacting"),
                                    seconds=time.time() - began, train_acc=right.item(), **found))
                log.write(json.dumps(records[-1]) + "\n")
                if last:
                    numbers = "  ".join(f"{key} {value:.3f}" for key, value in found.items() if key != "said")
                    bar.write("\n    ".join([f"{generation} {phase:12}{numbers}", *found["said"]]))
                saved = {kind: [part.state_dict() for part in agent] for kind, agent in agents.items()}
                state = dict(args=vars(args), number=number, done=t + 1, records=records, transmitted=transmitted)
                save_checkpoint(out_dir / "checkpoint.pt", state | dict(agents=saved, baseline=baseline))
            if stop:
                bar.close()
                fail(f"interrupted; {out_dir / 'checkpoint.pt'} is saved, --resume goes on", status=130)
        done = 0
    bar.close()
    signal.signal(signal.SIGINT, previous)
    return {key: value for key, value in records[-1].items() if isinstance(value, float)}, records, agents


def compare(args, device, out_dir):
    """Both arms from the same images, weights and given programs: (metrics, {name: records of each seed}, the last data
    and agents). Without generations, as many steps are taken in all; what was there after as many interactions counts,
    too. A run has its folder; with --resume it goes on there, or is read, if it had ended."""
    steps = args.equal + (args.generations - 1) * (args.generator_steps + args.engine_steps)
    curves, rows = {"no generations": [], "iterated": []}, []
    for seed in range(args.seed, args.seed + args.seeds):
        data = load(args, seed, device)
        for name, changes in zip(curves, (dict(generations=1, interact_steps=steps), {})):
            folder = out_dir / f"{name} seed {seed}".replace(" ", "_")
            resume = args.resume and (folder / "checkpoint.pt").exists()
            arm = argparse.Namespace(**vars(args) | changes | dict(seed=seed, resume=resume))
            _, records, agents = train(arm, data, device, folder)
            curves[name].append(records)
    long, iterated = curves.values()
    runs = {"no generations, equal interactions": [next(r for r in run if r["step"] == args.equal) for run in long],
            "no generations, equal steps": [run[-1] for run in long], "iterated": [run[-1] for run in iterated]}
    runs = {name: torch.tensor([[record[key] for key in REPORTED] for record in run], dtype=torch.float64)
            for name, run in runs.items()}                                                      # (seeds, metrics)
    for name in list(runs)[:2]:
        runs[name.replace("no generations", "difference")] = runs["iterated"] - runs[name]
    for name, run in runs.items():
        rows.append(dict(name=name, seeds=args.seeds, runs=dict(zip(REPORTED, run.T.tolist()))))
        for key, mean, std in zip(REPORTED, run.mean(0).tolist(), run.std(0, correction=args.seeds > 1).tolist()):
            rows[-1].update({key: mean, f"{key}_std": std})
    return dict(rows=rows), curves, data, agents


def table(rows):
    """The Markdown table of a comparison: mean ± std of seeds; for paired differences, mean and 95 % interval."""
    n = rows[0]["seeds"]
    lines = [[f"seeds: {n}", "Val-IID answers", "Val-IID programs", "Val-OOD answers", "Val-OOD programs"], ["---"] * 5]
    for row in rows:
        lines.append([row["name"]])
        for key in SCORES:
            mean, std = row[key], row[f"{key}_std"]
            half = T95[min(n, len(T95)) - 1] * std / n ** 0.5
            paired = f"{mean:+.3f}" + f" ({mean - half:+.3f} to {mean + half:+.3f})" * (n > 1)
            lines[-1].append(paired if row["name"].startswith("difference") else f"{mean:.3f} ± {std:.3f}")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@torch.no_grad()
def plot(path, curves, agents, data):
    """Answers and programs against interactions, each seed and the mean; a vertical step is what learning anew did.
    Below, an image of Val-OOD, and over it, as each module of the program returns it, how large a cell's state is."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3.6, 1.6))
    for axis, what in zip(top.subplots(1, 2), ("acc", "program_acc")):
        for colour, (name, runs) in enumerate(curves.items()):
            steps = [r["interactions"] for r in runs[0]]
            for split, style in (("iid", ":"), ("ood", "-")):
                values = torch.tensor([[r[f"val_{split}_{what}"] for r in records] for records in runs])
                if split == "ood" and len(runs) > 1:
                    axis.plot(steps, values.T, color=f"C{colour}", linewidth=0.5, alpha=0.4)
                axis.plot(steps, values.mean(0), style, color=f"C{colour}", label=f"{name}, Val-{split.upper()}")
            for end in {r["interactions"] for r in runs[0] if r["end"] and r["phase"] == "interacting"}:
                axis.axvline(end, color="0.85", zorder=0)
        axis.set(xlabel="interaction steps", ylabel="right programs" if "program" in what else "right answers")
    top.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    image, asked, _ = (x[-1:] for x in data.val_ood)
    engine = agents["engine"][0]
    states = []
    engine.cells.register_forward_hook(lambda *call: states.append(call[-1].view(3, 3, -1).norm(dim=2).cpu()))
    program, _ = speak(agents["generator"][0], data, asked)
    answer = engine(image, program)[0].argmax()  # the states are the scene's, and the tokens', from right to left
    bottom.suptitle(f"{english(QUESTIONS[asked])}: {('no', 'yes')[answer]}", fontsize=10)
    picture = image.view(3, 3, 10, 10, 3).transpose(1, 2).reshape(30, 30, 3).cpu()
    for t, (token, axis) in enumerate(zip(program[0].tolist(), bottom.subplots(1, LENGTH))):
        axis.imshow(picture)
        axis.imshow(states[0 if token == SCENE else LENGTH - t], "gray", alpha=0.6, extent=(-0.5, 29.5, 29.5, -0.5))
        axis.set_title(TOKENS[token], fontsize=9)
        axis.set(xticks=[], yticks=[], visible=token != END)
    figure.savefig(path, dpi=150)


# -------- Arguments

def fail(message, status=2):
    print(f"ERROR: {message}", file=sys.stderr)
    raise SystemExit(status)


def parse_flags(argv):
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    parser = argparse.ArgumentParser(description="Iterated learning of module networks (arXiv 2105.01119).",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail
    groups = map(parser.add_argument_group, ("data", "model", "optimisation", "run"))
    data, model, optimisation, run = (group.add_argument for group in groups)
    data("--data", choices=("generated", "published"), default="generated", help="images drawn anew, or the files")
    data("--images", type=int, default=600, help="to draw for each training question")
    data("--given", type=int, default=20, help="training questions, of 135, whose programs are given")
    model("--modules", choices=("tensor", "film"), default="tensor", help="Tensor-NMN or Tensor-FiLM-NMN")
    model("--width", type=int, default=32, help="channels of the engine")
    model("--hidden", type=int, default=64, help="units of the generator")
    model("--spectral_norm", action="store_true", help="of the engine's convolutions")
    optimisation("--generations", type=int, default=3, help="1: no iterated learning, nothing but interaction")
    optimisation("--interact_steps", type=int, default=1000, help="in which both agents learn together")
    optimisation("--transmitted", type=int, default=2000, help="programs that the old generator says to the new one")
    optimisation("--generator_steps", type=int, default=150, help="in which the new one learns them: the bottleneck")
    optimisation("--engine_steps", type=int, default=2000, help="in which a new engine learns to run its programs")
    optimisation("--keep_engine", action="store_true", help="renew the generator alone")
    optimisation("--true_programs", action="store_true", help="no generator: the engine learns with true programs")
    optimisation("--symmetries", action="store_true", help="with true programs: turn, mirror and recolour both alike")
    optimisation("--batch", type=int, default=128, help="images, or programs, a step")
    optimisation("--lr", type=float, default=1e-3, help="learning rate of AdamW")
    optimisation("--weight_decay", type=float, default=0.0, help="of AdamW")
    run("--seeds", type=int, default=1, help="with --compare: runs an arm")
    run("--seed", type=int, default=0, help="of images, given programs, weights and samples")
    run("--plot", metavar="FILE.png", help="draw answers and programs against interactions")
    run("--out_dir", default="out/nmn_iterated", help="for checkpoint.pt, log.jsonl, metrics.json")
    run("--resume", action="store_true", help="go on from out_dir/checkpoint.pt, on a CPU bit for bit")
    run("--eval_interval", type=int, default=500, help="steps of a phase between evaluations, each with a checkpoint")
    run("--compare", action="store_true", help="iterated learning and none, in one table")
    run("--device", choices=there, default=there[0], help="of what this machine has")
    args = parser.parse_args(argv)
    args.generations = 1 if args.true_programs else args.generations
    args.equal = args.generations * args.interact_steps  # where --compare looks at the run without generations, too
    lowest = dict(images=1, given=0, width=1, hidden=1, generations=1, interact_steps=1, transmitted=1, batch=1, lr=0,
                  weight_decay=0, generator_steps=0, engine_steps=0, seeds=1, seed=0, eval_interval=1)
    for wrong, message in (
            *((not low <= getattr(args, name) < math.inf, f"--{name} {getattr(args, name)}; allowed: {low} or more")
              for name, low in lowest.items()),
            (args.given > SEEN, f"--given {args.given}; allowed: {SEEN} or fewer"),
            (args.symmetries and not args.true_programs, "--symmetries goes with --true_programs"),
            (args.compare and args.generations < 2, f"--compare --generations {args.generations}; allowed: 2 or more"),
            (args.plot and args.true_programs, "--plot draws interactions, so not with --true_programs"),
            (args.plot and not (Path(args.plot).absolute().parent.is_dir() and importlib.util.find_spec("matplotlib")),
             f"--plot {args.plot}; allowed: a file in a folder that is there, and pip install matplotlib")):
        if wrong:
            fail(message)
    return args


def load(args, seed, device):
    """On the device: train, val_iid, val_ood, each images (N, 9, 300) uint8, questions, answers; the tables."""
    try:
        splits = load_shapes(args.data, args.images, seed)
    except (OSError, ValueError) as error:
        fail(f"--data {args.data}: {error}\nHINT: put shapes_syget of github.com/ankitkv/SHAPES-SyGeT into data/cache")
    for name, (images, *rest) in splits.items():
        cells = images.unflatten(1, (3, 10)).unflatten(3, (3, 10)).transpose(2, 3).reshape(-1, 9, 300)
        splits[name] = [x.to(device) for x in (cells, *rest)]
    tables = question_tensors() | symmetries()
    return argparse.Namespace(**splits, **{name: x.to(device) for name, x in tables.items()})


def main(argv=None):
    """Train or compare, as the flags say; returns what is in metrics.json."""
    args = parse_flags(argv)
    out_dir, device = Path(args.out_dir), torch.device(args.device)
    name = torch.cuda.get_device_name(device) if args.device == "cuda" else args.device
    sizes = [sum(p.numel() for p in new_agent(kind, args, device)[0].parameters()) for kind in ("generator", "engine")]
    print(f"{name}, float32 (bfloat16 would not pay), {args.data} images, {sizes[0]:,} + {sizes[1]:,} parameters")
    torch.set_float32_matmul_precision("high" if args.device == "cuda" else "highest")
    if args.compare:
        result, curves, data, agents = compare(args, device, out_dir)
        print("\n" + table(result["rows"]))
    else:
        data = load(args, args.seed, device)
        result, records, agents = train(args, data, device, out_dir)
        curves = {f"{args.generations} generations": [records]}
        print("\n".join(f"{key:26}{value:,.4f}" for key, value in result.items()))
    for split in ("val_iid", "val_ood"):  # so that an accuracy can be read
        _, questions, answers = getattr(data, split)
        rates = torch.stack([answers[questions == i].float().mean() for i in questions.unique()])
        print(f"{split}: the best blind answer to each question is right in {rates.maximum(1 - rates).mean():.3f}")
    result.update(device=name, dataset=args.data, seed=args.seed, torch=torch.__version__)
    (out_dir / "metrics.json").write_text(json.dumps(result, indent=1))
    if args.plot:
        plot(args.plot, curves, agents, data)
    return result


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: fail("interrupted", status=130))
    main()
