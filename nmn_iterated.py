"""
Iterated learning of module networks, in the manner of "Iterated Learning for Emergent Systematicity in VQA" (2105.01119).

A program generator reads a question q and says a program z, word by word; an execution engine runs z on the image x, one
neural module a token, and answers y. They learn jointly,

    L_engine = -log p(y | x, z),  z ~ p(z | q)        L_generator = -(r - b) log p(z | q) - mean over given log p(z* | q)

with r = 1 for a right answer of a well-formed program, b its moving average, and z* the few given programs. Nothing
here makes the programs systematic. Iterated learning does: every few thousand steps (a, interacting) the generator's
language is sampled (b, transmitting), a new generator learns it from those samples in few steps (c), and a new engine
learns to run what the new generator says (d). What is not regular is hard to learn again, and gets lost.

    python nmn_iterated.py                trains for some generations and shows how the language changes
    python nmn_iterated.py --compare      beside the same agents without generations

Differs from the paper: TODO
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

from data.shapes_questions import QUESTIONS, TOKENS, english, program
from data.shapes_syget import load_shapes
from flashsigmoid import sigmoid_attention

WORDS = ["<pad>", *sorted({word for question in QUESTIONS for word in english(question).split()})]
END, SCENE, AND, START, LENGTH = 0, 1, len(TOKENS) - 1, len(TOKENS), 8  # the longest program and its end take 8 steps
SEEN = 135  # the first questions are those of training; the rest are Val-OOD's
DEFAULTS = {
    "cpu": dict(batch=128, interact_steps=1000, generator_steps=300, engine_steps=1000, generations=4),
    "gpu": dict(batch=512, interact_steps=1000, generator_steps=300, engine_steps=1000, generations=8),
}
FIXED = "generator modules width hidden spectral_norm interact_steps generator_steps engine_steps transmitted".split()


# -------- Program generators. B questions, T words or tokens, V tokens, H hidden units.

def encode(sentences, vocabulary, length):
    """Lists of words -> (B, length) int64, padded with 0, and how many words each has (B,)."""
    ids = torch.zeros(len(sentences), length, dtype=torch.long)
    for row, sentence in enumerate(sentences):
        ids[row, :len(sentence)] = torch.tensor([vocabulary.index(word) for word in sentence])
    return ids, torch.tensor([len(sentence) for sentence in sentences])


class LSTMGenerator(nn.Module):
    """A bidirectional LSTM reads; an LSTM with additive attention, fed its last context, writes."""

    def __init__(self, args):
        super().__init__()
        H = args.hidden
        self.words, self.tokens = nn.Embedding(len(WORDS), H), nn.Embedding(START + 1, H)
        self.forwards, self.backwards = (nn.LSTM(H, H, batch_first=True) for _ in range(2))
        self.cell = nn.LSTMCell(3 * H, H)
        self.key, self.query, self.score = nn.Linear(2 * H, H), nn.Linear(H, H, bias=False), nn.Linear(H, 1, bias=False)
        self.out = nn.Linear(3 * H, len(TOKENS))

    def read(self, words, lengths):
        """words (B, T), lengths (B,) -> what `write` attends to."""
        x = self.words(words)                                                                   # (B, T, H)
        t = torch.arange(words.shape[1], device=words.device)
        turned = ((lengths[:, None] - 1 - t) % words.shape[1])[..., None].expand_as(x)  # the words, last first
        back = self.backwards(x.gather(1, turned))[0].gather(1, turned)
        memory = torch.cat([self.forwards(x)[0], back], -1)                                     # (B, T, 2H)
        state = x.new_zeros(3, len(x), self.cell.hidden_size)
        return (memory, self.key(memory), t >= lengths[:, None]), (state[0], state[1], memory[:, 0] * 0)

    def write(self, memory, state, token):
        """One step: the last token (B,) -> logits (B, V) of the next, and the new state."""
        memory, keys, padding = memory
        h, c = self.cell(torch.cat([self.tokens(token), state[2]], -1), state[:2])
        scores = self.score(torch.tanh(keys + self.query(h)[:, None]))[..., 0].masked_fill(padding, -math.inf)
        context = (scores.softmax(-1)[:, None] @ memory)[:, 0]                                  # (B, 2H)
        return self.out(torch.cat([h, context], -1)), (h, c, context)


class SigmoidBlock(nn.Module):
    """Pre-norm: self-attention, attention to a memory (in the writer), MLP; each with sigmoid attention."""

    def __init__(self, H, writes):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(H) for _ in range(2 + writes))
        self.queries, self.outs = (nn.ModuleList(nn.Linear(H, H) for _ in range(1 + writes)) for _ in range(2))
        self.pairs = nn.ModuleList(nn.Linear(H, 2 * H) for _ in range(1 + writes))  # keys and values
        self.mlp = nn.Sequential(nn.Linear(H, 4 * H), nn.GELU(), nn.Linear(4 * H, H))

    def attend(self, i, x, source, lengths=None):
        q, k, v = (y.unflatten(-1, (-1, 16)).transpose(1, 2)                                    # (B, heads, T, 16)
                   for y in (self.queries[i](x), *self.pairs[i](source).chunk(2, -1)))
        return self.outs[i](sigmoid_attention(q, k, v, k_lens=lengths).transpose(1, 2).flatten(2))

    def forward(self, x, past, memory=None, lengths=None):
        """x (B, T, H) sees `past` (B, Tk, H), which is normalised already and includes x."""
        x = x + self.attend(0, self.norms[0](x), past, None if memory is not None else lengths)
        if memory is not None:
            x = x + self.attend(1, self.norms[2](x), memory, lengths)
        return x + self.mlp(self.norms[1](x))


class TransformerGenerator(nn.Module):
    """Two blocks read and two write, with the sigmoid attention of flashsigmoid.py (arXiv 2409.04431)."""

    def __init__(self, args):
        super().__init__()
        H = args.hidden
        self.words, self.tokens = nn.Embedding(len(WORDS), H), nn.Embedding(START + 1, H)
        self.positions = nn.Embedding(16, H)
        self.readers, self.writers = (nn.ModuleList(SigmoidBlock(H, writes) for _ in range(2)) for writes in (0, 1))
        self.norm, self.out = nn.LayerNorm(H), nn.Linear(H, len(TOKENS))

    def read(self, words, lengths):
        x = self.words(words) + self.positions.weight[:words.shape[1]]
        for block in self.readers:
            x = block(x, block.norms[0](x), lengths=lengths)
        return (self.norm(x), lengths), [[], []]

    def write(self, memory, state, token):
        x = (self.tokens(token) + self.positions.weight[len(state[0])])[:, None]                # (B, 1, H)
        for block, past in zip(self.writers, state):
            past.append(block.norms[0](x))
            x = block(x, torch.cat(past, 1), *memory)
        return self.out(x[:, 0]), state


def gumbel(*shape, device, generator=None):
    return -torch.log(-torch.log(torch.rand(shape, device=device, generator=generator).clamp(1e-20, 1 - 1e-7)))


def speak(generator, words, lengths, forced=None, noise=None):
    """Programs (B, T) int64 for questions, and the log-probability (B,) of each, its <end> included.

    noise (B, T, V), drawn from Gumbel's distribution, samples; None takes the likeliest token. Where forced (B, T) is
    not -1, it is said instead. After <end> everything is <end> and counts for nothing.
    """
    memory, state = generator.read(words, lengths)
    token, ended = torch.full_like(lengths, START), torch.zeros_like(lengths, dtype=torch.bool)
    tokens, log_p = [], 0.0
    for t in range(LENGTH):
        logits, state = generator.write(memory, state, token)
        token = (logits if noise is None else logits + noise[:, t]).argmax(-1)
        if forced is not None:
            token = torch.where(forced[:, t] < 0, token, forced[:, t])
        token = token.masked_fill(ended, END)
        log_p = log_p + logits.log_softmax(-1).gather(1, token[:, None])[:, 0].masked_fill(ended, 0)
        ended = ended | (token == END)
        tokens.append(token)
    return torch.stack(tokens, 1), log_p


# -------- Execution engines. Programs run from right to left, all examples at once. States are (B, P, D), D = width: P = 9
# cells, or P = 1 in a Vector-NMN. The state of <end> is zero, and so is that of an operand that is not there.

def parse(programs):
    """programs (B, T) in prefix order -> (second, wellformed): where the second operand of the token at t begins (B, T),
    T where there is none, and whether each program is one whole expression (B,). A first operand begins at t + 1."""
    T = programs.shape[1]
    length = (programs != END).long().cumprod(1).sum(1)
    arity = (programs > SCENE).long() + (programs == AND)
    ends = length[:, None].repeat(1, T + 1)  # where the expression that begins at t ends; past the last token, there
    second, wellformed = torch.full_like(programs, T), length > 0
    for t in reversed(range(T)):
        inside = t < length
        one = torch.full_like(length, t + 1).minimum(length)
        two = ends.gather(1, one[:, None])[:, 0]
        three = ends.gather(1, two[:, None])[:, 0]
        ends[:, t] = torch.where(inside, torch.stack([one, two, three], 1).gather(1, arity[:, t:t + 1])[:, 0], length)
        second[:, t] = torch.where(inside & (arity[:, t] == 2) & (two < length), two, T)
        lacks = (arity[:, t] > 0) & (one >= length) | (arity[:, t] == 2) & (two >= length)
        wellformed = wellformed & ~(inside & lacks)
    return second, wellformed & (ends[:, 0] == length)


class Conv(nn.Module):
    """A zero-padded 3 x 3 convolution of 3 x 3 cells, (B, 9C) -> (B, 9D), with weights for each of V tokens."""

    def __init__(self, C, D, V=1, spectral_norm=False):
        super().__init__()
        bound = (9 * C) ** -0.5
        self.weight = nn.Parameter(torch.empty(9, C, V, D).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(V, D).uniform_(-bound, bound))
        steps = [(3 * (y - r) + x - c + 4 if abs(y - r) < 2 and abs(x - c) < 2 else 9)  # from cell (y, x) to (r, c)
                 for y in range(3) for x in range(3) for r in range(3) for c in range(3)]
        self.register_buffer("steps", torch.tensor(steps), persistent=False)
        self.register_buffer("u", F.normalize(torch.randn(V, 9 * D, 1), dim=1) if spectral_norm else None)

    def matrices(self):
        """The weights as matrices (V, 9C, 9D), side by side (9C, V 9D) on CUDA. To be made once a batch.

        With spectral norm, each over its largest singular value, which a power iteration follows from step to step."""
        padded = torch.cat([self.weight, torch.zeros_like(self.weight[:1])])
        spread = padded.index_select(0, self.steps).unflatten(0, (9, 9))                        # (9, 9, C, V, D)
        W = spread.permute(3, 0, 2, 1, 4).flatten(3).flatten(1, 2)                              # (V, 9C, 9D)
        if self.u is not None:
            if self.training:
                with torch.no_grad():
                    self.u.copy_(F.normalize(W.mT @ F.normalize(W @ self.u, dim=1), dim=1))
            W = W / (W @ self.u.clone()).norm(dim=1, keepdim=True)
        return W.transpose(0, 1).flatten(1) if W.is_cuda else W.unbind()

    def forward(self, x, matrices, token=None):
        """token chooses the weights: None if there is one for all, a tensor (B,) on CUDA, or, x being sorted by token, a
        list (V,) of how many examples each token has."""
        bias = self.bias.repeat(1, 9)                                                           # (V, 9D)
        if isinstance(token, list):
            parts = zip(x.split(token), matrices, bias.unbind())
            return torch.cat([torch.addmm(b, part, W) if v > SCENE else part for v, (part, W, b) in enumerate(parts)])
        if token is None:
            return torch.addmm(bias[0], x, matrices if x.is_cuda else matrices[0])
        y = torch.addmm(bias.flatten(), x, matrices).unflatten(1, bias.shape)  # every token's: no wait for how many
        return y.gather(1, token.view(-1, 1, 1).expand(-1, 1, bias.shape[1]))[:, 0]


class TensorModules(nn.Module):
    """Tensor-NMN: R_w(x) = ReLU(x + conv_w(ReLU(conv_w(x)))), own weights a token; `and` first joins its operands."""

    def __init__(self, args):
        super().__init__()
        D = args.width
        self.convs = nn.ModuleList(Conv(D, D, len(TOKENS), args.spectral_norm) for _ in range(2))
        self.scene = nn.ModuleList(Conv(D, D, 1, args.spectral_norm) for _ in range(2))
        self.join = nn.Linear(2 * D, D)

    def look(self, x):
        one, two = (conv.matrices() for conv in self.scene)
        return F.relu(x + self.scene[1](F.relu(self.scene[0](x, one)), two))

    def forward(self, scene, first, second, token, matrices):
        pair = torch.cat([first.unflatten(1, (9, -1)), second.unflatten(1, (9, -1))], -1)       # (B, 9, 2D)
        x = torch.where((token == AND)[:, None], F.relu(self.join(pair)).flatten(1), first)
        groups = token
        if not x.is_cuda:  # example by example its weights; on CUDA all weights for all, and no wait for how many
            order = token.argsort()
            x, groups = x.index_select(0, order), token.bincount(minlength=len(TOKENS)).tolist()
        y = F.relu(self.convs[0](x, matrices[0], groups))
        x = F.relu(x + self.convs[1](y, matrices[1], groups))
        if not x.is_cuda:
            x = x.index_select(0, order.argsort())
        return torch.where((token == SCENE)[:, None], scene, x)


def film(x, scale_and_shift):
    """x (B, 9D), scale_and_shift (B, 2D): a scale and a shift a channel."""
    scale, shift = scale_and_shift[:, None].chunk(2, -1)                                        # (B, 1, D)
    return ((1 + 2 * torch.tanh(scale)) * x.unflatten(1, (9, -1)) + shift).flatten(1)


class FilmModules(nn.Module):
    """Tensor-FiLM-NMN (our form): one residual block for all tokens, each with its own scales and shifts."""

    def __init__(self, args):
        super().__init__()
        D = args.width
        self.films = nn.ModuleList(nn.Embedding(len(TOKENS), 2 * D) for _ in range(2))
        self.join = nn.Linear(3 * D, D)
        self.convs = nn.ModuleList(Conv(D, D, 1, args.spectral_norm) for _ in range(2))

    def look(self, x):
        return x

    def forward(self, scene, first, second, token, matrices):
        x = F.relu(self.join(torch.cat([y.unflatten(1, (9, -1)) for y in (scene, first, second)], -1))).flatten(1)
        y = F.relu(self.convs[0](film(x, self.films[0](token)), matrices[0]))
        return F.relu(x + self.convs[1](film(y, self.films[1](token)), matrices[1]))


class VectorModules(nn.Module):
    """Vector-NMN: every call looks at the image again, through FiLM from its token and operands, and returns a vector."""

    def __init__(self, args):
        super().__init__()
        D = args.width
        self.tokens = nn.Embedding(len(TOKENS), D)
        self.films = nn.ModuleList(nn.Sequential(nn.Linear(3 * D, 3 * D), nn.ReLU(), nn.Linear(3 * D, 2 * D))
                                   for _ in range(4))
        self.convs = nn.ModuleList(Conv(D, D, 1, args.spectral_norm) for _ in range(4))

    def look(self, x):
        return x

    def forward(self, scene, first, second, token, matrices):
        condition, x = torch.cat([self.tokens(token), first, second], -1), scene                # (B, 3D), (B, 9D)
        for i in (0, 2):
            y = F.relu(self.convs[i](film(x, self.films[i](condition)), matrices[i]))
            x = F.relu(x + self.convs[i + 1](film(y, self.films[i + 1](condition)), matrices[i + 1]))
        return x.unflatten(1, (9, -1)).amax(1)


class Engine(nn.Module):
    def __init__(self, args):
        super().__init__()
        D = args.width
        self.stem = nn.Sequential(nn.Linear(300, 64), nn.ReLU(), nn.Linear(64, D), nn.ReLU())  # a cell is 10 x 10 x 3
        self.cells = dict(tensor=TensorModules, film=FilmModules, vector=VectorModules)[args.modules](args)
        self.size = D if args.modules == "vector" else 9 * D
        self.classifier = nn.Sequential(nn.Linear(D, 128), nn.ReLU(), nn.Linear(128, 2))

    def classify(self, state):
        return self.classifier(state.unflatten(1, (-1, self.classifier[0].in_features)).amax(1))

    def forward(self, images, programs):
        """images (B, 9, 300) uint8, programs (B, T) -> logits (B, 2), wellformed (B,), the state at each token (B, T, S).

        An ill-formed program answers with the state of its first token."""
        second, wellformed = parse(programs)
        T = programs.shape[1]
        scene = self.cells.look(self.stem(images / 255.0).flatten(1))                           # (B, 9D)
        matrices = [conv.matrices() for conv in self.cells.convs]
        states = [scene.new_zeros(len(scene), self.size)]                                       # of T; then T - 1, ...
        for t in reversed(range(T)):
            token, operand = programs[:, t], states[0]
            if token.is_cuda or (token == AND).any():
                index = (T - second[:, t]).view(-1, 1, 1).expand(-1, 1, self.size)
                operand = torch.stack(states, 1).gather(1, index)[:, 0]
            first = states[-1].masked_fill((token == SCENE)[:, None], 0)
            state = self.cells(scene, first, operand, token, matrices)
            states.append(state.masked_fill((token == END)[:, None], 0))
        return self.classify(states[-1]), wellformed, torch.stack(states[:0:-1], 1)


def run_recursively(engine, image, tokens, matrices):
    """What `Engine` computes, of one image (9, 300) and the list of its program, as in a textbook: logits (2,)."""
    scene = engine.cells.look(engine.stem(image[None] / 255.0).flatten(1))
    zero = scene.new_zeros(1, engine.size)

    def run(rest):
        if not rest or rest[0] == END:
            return zero, rest
        token, rest, operands = rest[0], rest[1:], []
        for _ in range((token > SCENE) + (token == AND)):
            operand, rest = run(rest)
            operands.append(operand)
        first, second = (operands + [zero, zero])[:2]
        return engine.cells(scene, first, second, torch.tensor([token], device=image.device), matrices), rest

    return engine.classify(run(tokens)[0])[0]


# -------- Losses

def interacting_loss(generator, engine, data, rows, given, baseline, weight):
    """(loss, reward (B,)): cross-entropy of the engine; of the generator, REINFORCE and the given programs."""
    images, questions, answers = (x[rows] for x in data.train)
    asked = torch.cat([questions, given])
    forced = torch.cat([torch.full_like(data.programs[questions], -1), data.programs[given]])
    noise = gumbel(len(asked), LENGTH, len(TOKENS), device=rows.device)
    programs, log_p = speak(generator, data.words[asked], data.lengths[asked], forced, noise)
    logits, wellformed, _ = engine(images, programs[:len(rows)])
    reward = ((logits.argmax(1) == answers) & wellformed).float()
    policy = ((reward - baseline) * log_p[:len(rows)]).mean()
    return F.cross_entropy(logits, answers) - policy - weight * log_p[len(rows):].sum() / max(1, len(given)), reward


def generator_loss(generator, data, questions, programs):
    """Cross-entropy of programs (B, T), summed over a program, mean over the batch."""
    return -speak(generator, data.words[questions], data.lengths[questions], programs)[1].mean()


def engine_loss(generator, engine, data, rows):
    """(loss, right (B,)): cross-entropy of the answers to what the generator says; without one, to the true programs."""
    images, questions, answers = (x[rows] for x in data.train)
    programs = data.programs[questions]
    if generator is not None:
        with torch.no_grad():
            noise = gumbel(len(rows), LENGTH, len(TOKENS), device=rows.device)
            programs, _ = speak(generator, data.words[questions], data.lengths[questions], noise=noise)
    logits = engine(images, programs)[0]
    return F.cross_entropy(logits, answers), (logits.argmax(1) == answers).float()


def transmit(generator, data, count):
    """count questions of training, drawn at random, and what the generator says to each, sampled: the transmitted set."""
    questions = torch.randint(SEEN, (count,), device=data.words.device)
    with torch.no_grad():
        noise = gumbel(count, LENGTH, len(TOKENS), device=questions.device)
        return questions, speak(generator, data.words[questions], data.lengths[questions], noise=noise)[0]


# -------- Evaluation

@torch.no_grad()
def evaluate(generator, engine, data, transmitted=None):
    """Greedy programs of all questions: answers and programs right, on Val-IID and Val-OOD, and how the language is.

    Without a generator, the true programs. Draws nothing from the random numbers of training."""
    engine.eval()
    found, programs, count = {}, data.programs, 16
    if generator is not None:
        programs, _ = speak(generator, data.words, data.lengths)
        source = torch.Generator(programs.device).manual_seed(0)
        noise = gumbel(count * SEEN, LENGTH, len(TOKENS), device=programs.device, generator=source)
        words, lengths = data.words[:SEEN].repeat(count, 1), data.lengths[:SEEN].repeat(count)
        found["entropy"] = -speak(generator, words, lengths, noise=noise)[1].mean().item()  # nats a program
    right, valid = (programs == data.programs).all(1), parse(programs)[1]
    for split, part in (("val_iid", slice(SEEN)), ("val_ood", slice(SEEN, None))):
        answers = [engine(images, programs[questions])[0].argmax(1) == y for images, questions, y in
                   zip(*(x.split(2048) for x in getattr(data, split)))]
        found[f"{split}_acc"] = torch.cat(answers).float().mean().item()
        found[f"{split}_program_acc"] = right[part].float().mean().item()
        found[f"{split}_valid"] = valid[part].float().mean().item()
    if transmitted is not None:
        questions, said = transmitted
        found["agreement"] = (programs[questions] == said).all(1).float().mean().item()
    engine.train()
    return found


# -------- Training

def replayed(step, device):
    """On CUDA, `step` as a graph from its fourth call on: its kernels are so small that to launch them takes longer."""
    if device.type != "cuda":
        return step
    side, graph, seen = torch.cuda.Stream(), torch.cuda.CUDAGraph(), []

    def call():
        if len(seen) < 3:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                seen.append(step())
            torch.cuda.current_stream().wait_stream(side)
            return seen[-1]
        if len(seen) == 3:
            with torch.cuda.graph(graph):
                seen.append(step())
        graph.replay()
        return seen[3]

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
    differing = [f"{name} {state['args'][name]} there, {getattr(args, name)} here" for name in FIXED
                 if state["args"][name] != getattr(args, name)]
    if differing:
        fail(f"--resume: {path} is another architecture or schedule: {'; '.join(differing)}")
    return state


def new_agent(kind, args, device):
    """A fresh generator or engine and its optimiser, which knows nothing of earlier ones."""
    kinds = dict(engine=Engine, generator=dict(lstm=LSTMGenerator, transformer=TransformerGenerator)[args.generator])
    agent = kinds[kind](args).to(device)
    lr, decay = (args.lr, args.weight_decay) if kind == "engine" else (args.generator_lr, 0.0)
    return agent, torch.optim.AdamW(agent.parameters(), lr, weight_decay=decay, fused=device.type != "mps",
                                    **(dict(capturable=True) if device.type == "cuda" else {}))


def train(args, data, device, out_dir):
    """All generations; returns (metrics, records), one record an evaluation. Ctrl-C saves and exits."""
    began = time.time()
    given = torch.randperm(SEEN, generator=torch.Generator().manual_seed(args.seed))[:args.given].to(device)
    names = dict(interacting=args.interact_steps, generator=args.generator_steps, engine=args.engine_steps)
    if args.true_programs:
        schedule = [(0, "engine", args.interact_steps)]
    elif args.generations == 1:
        schedule = [(0, "interacting", args.interact_steps)]
    else:
        schedule = [(g, *phase) for g in range(args.generations) for phase in names.items() if phase[1]]
    torch.manual_seed(1_000_003 * args.seed)
    agents = {kind: new_agent(kind, args, device) for kind in ("generator", "engine")}
    first, done, records, transmitted, baseline = 0, 0, [], None, torch.zeros((), device=device)
    if args.resume:
        state = load_checkpoint(out_dir / "checkpoint.pt", device, args)
        first, done, records, transmitted = state["phase"], state["done"], state["records"], state["transmitted"]
        baseline.copy_(state["baseline"])
        for kind, (agent, optimizer) in agents.items():
            agent.load_state_dict(state[kind][0])
            optimizer.load_state_dict(state[kind][1])
    out_dir.mkdir(parents=True, exist_ok=True)
    log = open(out_dir / "log.jsonl", "a" if args.resume else "w", buffering=1)
    log.write(json.dumps(dict(config=vars(args), device=str(device), torch=torch.__version__)) + "\n")
    stop = []  # Ctrl-C lets the step in progress end; a second one does not wait
    previous = signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if stop else stop.append(True))
    lengths = [steps for *_, steps in schedule]
    bar = tqdm(total=sum(lengths), initial=sum(lengths[:first]) + done, desc=out_dir.name, mininterval=1)
    for number, (generation, phase, steps) in enumerate(schedule):
        if number < first:
            continue
        before = sum(lengths[:number])
        interactions = sum(n for _, name, n in schedule[:number] if name == "interacting")
        torch.manual_seed(1_000_003 * args.seed + 500_000 + number)
        if phase == "generator" and not done:  # the old one speaks for the last time
            transmitted = transmit(agents["generator"][0], data, args.transmitted)
        if phase != "interacting" and not done and (phase == "generator" or not args.keep_engine):
            agents[phase] = new_agent(phase, args, device)
        (generator, generator_optimizer), (engine, engine_optimizer) = agents["generator"], agents["engine"]

        def step():
            if phase == "generator":
                pick = torch.randint(args.transmitted, (args.batch,), device=device)
                loss = generator_loss(generator, data, *(x[pick] for x in transmitted))
                if args.given and args.repeat_given:
                    loss = loss + args.given_weight * generator_loss(generator, data, given, data.programs[given])
                right = loss.detach().new_zeros(1)
            else:
                rows = torch.randint(len(data.train[0]), (args.batch,), device=device)
                if phase == "engine":
                    loss, right = engine_loss(None if args.true_programs else generator, engine, data, rows)
                else:
                    loss, right = interacting_loss(generator, engine, data, rows, given, baseline, args.given_weight)
                    baseline.lerp_(right.mean(), 0.1)
            loss.backward()
            for kind, optimizer in (("generator", generator_optimizer), ("engine", engine_optimizer)):
                if phase in (kind, "interacting"):
                    optimizer.step()
                    optimizer.zero_grad()
            return loss.detach(), right.mean()

        take = replayed(step, device)
        for t in range(done, steps):
            torch.manual_seed(1_000_003 * args.seed + before + t)  # all chance of a step: resuming is exact
            loss, right = take()
            bar.update()
            last = t + 1 == steps or bool(stop)
            if last or (t + 1) % 50 == 0:
                if not math.isfinite(loss.item()):
                    bar.close()
                    fail(f"loss {loss.item()} at step {before + t}, learning rate {args.lr:.2e}", status=1)
                bar.set_postfix(generation=generation, phase=phase, loss=f"{loss.item():.3f}", refresh=False)
            if last or phase == "interacting" and (t + 1) % args.eval_interval == 0:
                found = evaluate(None if args.true_programs else generator, engine, data, transmitted)
                record = dict(generation=generation, phase=phase, step=before + t + 1, end=t + 1 == steps,
                              interactions=interactions + (t + 1) * (phase == "interacting"),
                              train_acc=right.item(), **found)
                records.append(record)
                log.write(json.dumps(record) + "\n")
                if last:
                    bar.write(f"{generation:3} {phase:12}" + "".join(f" {k} {v:.3f}" for k, v in found.items()))
                state = {kind: (agent.state_dict(), optimizer.state_dict())
                         for kind, (agent, optimizer) in agents.items()}
                save_checkpoint(out_dir / "checkpoint.pt", dict(
                    state, args=vars(args), phase=number, done=t + 1, records=records, transmitted=transmitted,
                    baseline=baseline))
            if stop:
                bar.close()
                fail(f"interrupted at step {before + t + 1}; {out_dir / 'checkpoint.pt'} is saved, --resume goes on",
                     status=130)
        done = 0
    bar.close()
    signal.signal(signal.SIGINT, previous)
    final = [r for r in records if r["phase"] != "generator" or args.keep_engine]
    best = max(final, key=lambda r: r["val_iid_acc"])
    metrics = {key: value for key, value in best.items() if isinstance(value, float)}
    metrics |= {f"last_{key}": value for key, value in records[-1].items() if isinstance(value, float)}
    return agents, metrics | dict(seconds=time.time() - began), records


def interval(values):
    """Mean of (n,) and half the width of its 95 % interval, from Student's t; infinite for one value."""
    values = torch.tensor(values, dtype=torch.float64)
    t = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), 2)).get(len(values), 1.96)
    half = t * values.std().item() / len(values) ** 0.5 if len(values) > 1 else math.inf
    return values.mean().item(), half


def compare(args, device, out_dir):
    """Iterated learning and none, from the same agents, given programs and images, with equally many interactions.

    Returns (rows, {name: records of the first seed}, the agents and data of its iterated run)."""
    arms = {"iterated learning": {}, "no generations": dict(generations=1,
                                                            interact_steps=args.generations * args.interact_steps)}
    runs, curves, example = {name: [] for name in arms}, {}, None
    for seed in range(args.seed, args.seed + args.seeds):
        data = load(args, seed, device)
        for name, changes in arms.items():
            arm = argparse.Namespace(**vars(args) | changes | dict(seed=seed))
            agents, metrics, records = train(arm, data, device, out_dir / f"{name} seed {seed}".replace(" ", "_"))
            runs[name].append(metrics)
            curves.setdefault(name, records)
            example = example or (agents, data)
    rows = []
    for name, metrics in runs.items():
        row = dict(name=name, seeds=args.seeds)
        for key in metrics[0]:
            values = torch.tensor([run.get(key, math.nan) for run in metrics], dtype=torch.float64)
            row[key], row[f"{key}_std"] = values.mean().item(), values.std(correction=min(1, args.seeds - 1)).item()
        rows.append(row)
    difference = dict(name="difference, paired", seeds=args.seeds)
    for key in (key for key in runs["no generations"][0] if "acc" in key):
        difference[key], difference[f"{key}_interval"] = interval(
            [a[key] - b[key] for a, b in zip(runs["iterated learning"], runs["no generations"])])
    print(f"\nmean ± std, seeds: {args.seeds}; at the end of a generation chosen by Val-IID answers | at the very end")
    for row in rows + [difference]:
        spread = "interval" if row is difference else "std"
        print(f"{row['name']:20}" + " | ".join("  ".join(
            f"{label} {row[key]:.3f} ± {row[f'{key}_{spread}']:.3f}" for label, key in
            (("IID", f"{when}val_iid_acc"), ("programs", f"{when}val_iid_program_acc"), ("OOD", f"{when}val_ood_acc"),
             ("programs", f"{when}val_ood_program_acc"))) for when in ("", "last_")))
    return rows + [difference], curves, example


def plot(path, curves, agents, data):
    """Answers and programs against interactions, an arm a colour; below, what each module of a program attends to."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(3, 2))
    axes = upper.subplots(1, 2)
    for axis, what, title in zip(axes, ("acc", "program_acc"), ("answers", "programs, word for word")):
        for colour, (name, records) in enumerate(curves.items()):
            for split, style in (("iid", ":"), ("ood", "-")):
                points = [(r["interactions"], r[f"val_{split}_{what}"]) for r in records if r["phase"] != "generator"]
                axis.plot(*zip(*points), style, color=f"C{colour}", marker=".", label=f"{name}, Val-{split.upper()}")
        for record in (r for r in next(iter(curves.values())) if r["end"] and r["phase"] == "interacting"):
            axis.axvline(record["interactions"], color="0.85", zorder=0)
        axis.set(xlabel="interaction steps", ylabel=f"share of right {title}")
    axes[1].legend(frameon=False, fontsize=8)
    generator, engine = agents["generator"][0], agents["engine"][0]
    images, questions, _ = (x[:1] for x in data.val_ood)
    with torch.no_grad():
        programs, _ = speak(generator, data.words[questions], data.lengths[questions])
        states = engine(images, programs)[2]
    picture = images[0].view(3, 3, 10, 10, 3).transpose(1, 2).reshape(30, 30, 3).cpu()
    said = [TOKENS[token] for token in programs[0] if token]
    lower.suptitle(english(QUESTIONS[questions.item()]) + "?", fontsize=10)
    for axis, word, state in zip(lower.subplots(1, max(2, len(said))), said, states[0]):
        axis.imshow(picture)
        size = state.unflatten(0, (9, -1)).norm(dim=1).view(3, 3).cpu() if len(state) % 9 == 0 else state.new_zeros(3, 3)
        axis.imshow(size, cmap="gray", alpha=0.6, extent=(-0.5, 29.5, 29.5, -0.5))
        axis.set_title(word, fontsize=9)
    for axis in lower.axes:
        axis.set_axis_off()
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
    parser.set_defaults(**DEFAULTS["cpu" if there[0] == "cpu" else "gpu"])
    data = parser.add_argument_group("data").add_argument
    data("--data", choices=("generated", "published"), default="generated", help="SHAPES-SyGeT, drawn anew or its files")
    data("--images", type=int, default=600, help="drawn for each training question; the files hold 56")
    data("--given", type=int, default=20, help="training questions, of 135, whose true programs are given")
    model = parser.add_argument_group("model").add_argument
    model("--modules", choices=("tensor", "film", "vector"), default="tensor", help="Tensor-, Tensor-FiLM-, Vector-NMN")
    model("--generator", choices=("lstm", "transformer"), default="lstm", help="the latter with sigmoid attention")
    model("--width", type=int, default=32, help="channels of the engine")
    model("--hidden", type=int, default=64, help="units of the generator")
    model("--spectral_norm", action=argparse.BooleanOptionalAction, default=False, help="of the engine's convolutions")
    optimisation = parser.add_argument_group("optimisation").add_argument
    optimisation("--generations", type=int, help="1 is no iterated learning: interacting alone")
    optimisation("--interact_steps", type=int, help="steps of a generation in which both agents learn together")
    optimisation("--transmitted", type=int, default=2000, help="programs that the old generator says to the new")
    optimisation("--generator_steps", type=int, help="steps in which the new generator learns them: the bottleneck")
    optimisation("--engine_steps", type=int, help="steps in which the new engine learns to run what it says")
    optimisation("--keep_engine", action="store_true", help="renew the generator alone")
    optimisation("--repeat_given", action=argparse.BooleanOptionalAction, default=True,
                 help="the new generator learns the given programs, too")
    optimisation("--given_weight", type=float, default=1.0, help="of the given programs in the loss")
    optimisation("--true_programs", action="store_true", help="no generator: the engine runs the true programs")
    optimisation("--batch", type=int, help="images a step")
    optimisation("--lr", type=float, default=1e-3, help="of the engine's AdamW")
    optimisation("--generator_lr", type=float, default=1e-3, help="of the generator's")
    optimisation("--weight_decay", type=float, default=0.0, help="decoupled, of the engine")
    run = parser.add_argument_group("run").add_argument
    run("--seeds", type=int, default=1, help="with --compare: runs an arm")
    run("--seed", type=int, default=0, help="of images, given programs, weights and samples")
    run("--plot", metavar="FILE.png", help="draw accuracies, and what the modules of a program attend to")
    run("--out_dir", default="out/nmn_iterated", help="for checkpoint.pt, log.jsonl, metrics.json")
    run("--resume", action="store_true", help="go on from out_dir/checkpoint.pt, bit for bit")
    run("--eval_interval", type=int, default=500, help="interactions between evaluations, each with a checkpoint")
    run("--compare", action="store_true", help="iterated learning and none, in one table")
    run("--speed", action="store_true", help="no training: programs of a batch together against one after the other")
    run("--device", choices=there, default=there[0], help="of what this machine has")
    args = parser.parse_args(argv)
    if args.device == "cpu":  # once more, now that it is known what suits the run
        parser.set_defaults(**DEFAULTS["cpu"])
        args = parser.parse_args(argv)
    lowest = dict(images=1, given=0, width=1, hidden=16, generations=1, interact_steps=1, transmitted=1,
                  generator_steps=0, engine_steps=0, given_weight=0, batch=1, lr=0, generator_lr=0, weight_decay=0,
                  seeds=1, seed=0, eval_interval=1)
    for wrong, message in (
            *((not low <= getattr(args, name) < math.inf, f"--{name} {getattr(args, name)}; allowed: {low} or more")
              for name, low in lowest.items()),
            (args.given > SEEN, f"--given {args.given}; allowed: 0 to {SEEN}"),
            (args.hidden % 16, f"--hidden {args.hidden}; allowed: multiples of 16"),
            (args.compare and (args.resume or args.generations < 2 or args.true_programs),
             "--compare; allowed: without --resume and --true_programs, with --generations 2 or more"),
            (args.plot and args.true_programs, "--plot; allowed: without --true_programs"),
            (args.plot and not Path(args.plot).absolute().parent.is_dir(), f"--plot {args.plot}: no such folder"),
            (args.plot and not importlib.util.find_spec("matplotlib"), "--plot needs: pip install matplotlib")):
        if wrong:
            fail(message)
    return args


def load(args, seed, device):
    """Everything on the device: three splits (images (N, 9, 300) uint8, questions (N,), answers (N,)) and, of the 244
    questions, words (244, 11), lengths (244,), programs (244, T)."""
    try:
        splits = load_shapes(args.data, args.images, seed)
    except (OSError, ValueError) as error:
        fail(f"--data {args.data}: {error}")
    words, lengths = encode([english(question).split() for question in QUESTIONS], WORDS, 11)
    programs, _ = encode([program(question) for question in QUESTIONS], TOKENS, LENGTH)
    for name, (images, *rest) in splits.items():
        cells = images.unflatten(1, (3, 10)).unflatten(3, (3, 10)).transpose(2, 3).reshape(-1, 9, 300)
        splits[name] = [x.to(device) for x in (cells, *rest)]
    return argparse.Namespace(**splits, words=words.to(device), lengths=lengths.to(device), programs=programs.to(device))


def speed(args, data, device):
    """Examples a second, forward and backward, of 256 true programs: one after the other, and together."""
    engine, rows = Engine(args).to(device), torch.randint(len(data.val_ood[0]), (256,), device=device)
    images, programs = data.val_ood[0][rows], data.programs[data.val_ood[1][rows]]

    def one_by_one():
        matrices = [conv.matrices() for conv in engine.cells.convs]
        logits = [run_recursively(engine, image, tokens, matrices) for image, tokens in zip(images, programs.tolist())]
        torch.stack(logits).sum().backward()
        return torch.zeros(()), torch.zeros(())

    def together():
        loss = engine(images, programs)[0].sum()
        loss.backward()
        engine.zero_grad()
        return loss.detach(), loss.detach()

    found = {}
    for name, take, times in (("one_by_one", one_by_one, 2), ("together", replayed(together, device), 20)):
        for timed in (False, True):  # the first time warms up
            began = time.time()
            for _ in range(times):
                take()
            if device.type == "cuda":
                torch.cuda.synchronize()
        found[name] = 256 * times / (time.time() - began)
    return found | dict(ratio=found["together"] / found["one_by_one"])


def main(argv=None):
    """Train, compare or time, as the flags say; returns what is in metrics.json."""
    args = parse_flags(argv)
    out_dir, device = Path(args.out_dir), torch.device(args.device)
    name = torch.cuda.get_device_name(device) if args.device == "cuda" else args.device
    sizes = [sum(p.numel() for p in new_agent(kind, args, torch.device("cpu"))[0].parameters()) for kind in ("generator", "engine")]
    print(f"{name}, float32 (too small for bfloat16 to pay), {args.data} images, {sizes[0]:,} parameters in the "
          f"{args.generator} generator, {sizes[1]:,} in the {args.modules} engine")
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")
    if args.compare:
        rows, curves, (agents, data) = compare(args, device, out_dir)
        result = dict(rows=rows)
    else:
        data = load(args, args.seed, device)
        if args.speed:
            result = speed(args, data, device)
        else:
            agents, result, records = train(args, data, device, out_dir)
            curves = {"this run": records}
        for key, value in result.items():
            print(f"{key:26}{value:,.4f}")
    result.update(device=name, dataset=args.data, seed=args.seed, torch=torch.__version__)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "metrics.json").write_text(json.dumps(result, indent=1))
    if args.plot and not args.speed:
        plot(args.plot, curves, agents, data)
    return result


if __name__ == "__main__":
    main()
