"""Digits drawn by a pen, grey or in colour: no network, ten classes, fixed by a seed."""
import math

import torch


def arc(x, y, width, height, start, end, points=9):
    """Points on an ellipse around (x, y), from one angle to another, in degrees, clockwise from 3 o'clock."""
    angles = [math.radians(start + (end - start) * i / (points - 1)) for i in range(points)]
    return [(x + width * math.cos(a), y + height * math.sin(a)) for a in angles]


# what the pen does for 0 to 9, in a box from -1 to 1, y downwards
STROKES = [
    arc(0, 0, 0.6, 0.9, -90, 270, 17),
    [(-0.35, -0.55), (0.05, -0.9), (0.05, 0.9)],
    arc(0, -0.4, 0.55, 0.5, 190, 400) + [(-0.6, 0.9), (0.6, 0.9)],
    arc(-0.05, -0.45, 0.5, 0.45, 200, 450) + arc(-0.05, 0.45, 0.6, 0.45, 270, 510),
    [(0.1, -0.9), (-0.6, 0.25), (0.6, 0.25), (0.3, 0.25), (0.3, -0.25), (0.3, 0.9)],
    [(0.5, -0.9), (-0.4, -0.9), (-0.45, -0.1)] + arc(-0.05, 0.35, 0.6, 0.55, 230, 500),
    arc(0.35, 0.4, 0.9, 1.3, 270, 180) + arc(0, 0.4, 0.55, 0.5, 180, -180),
    [(-0.6, -0.9), (0.6, -0.9), (-0.2, 0.9)],
    arc(0, -0.45, 0.45, 0.45, 90, 450) + arc(0, 0.45, 0.55, 0.45, 270, 630),
    arc(0, -0.4, 0.5, 0.5, 0, -360, 13) + [(0.45, 0.1), (0.3, 0.9)],
]


def load_glyphs(count, size=28, channels=1, seed=0):
    """(images (count, channels, size, size) uint8, labels (count,) int64), on the CPU.

    Each glyph is bent, scaled, sheared, turned and shifted at random, its pen has a random width. Grey: white on black;
    colour: paper and ink of random colours that differ by a quarter or more in every channel, so that only the shape
    tells the class. Another seed gives other images.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator)

    longest = max(len(stroke) for stroke in STROKES)
    pens = torch.tensor([stroke + stroke[-1:] * (longest - len(stroke)) for stroke in STROKES])     # (10, P, 2)
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    pixels = torch.cartesian_prod(axis, axis).flip(1)                                               # (S * S, 2) of x, y
    labels = torch.randint(len(STROKES), (count,), generator=generator)
    images = torch.empty(count, channels, size, size, dtype=torch.uint8)
    for batch in torch.arange(count).split(500):  # so that what is in progress fits into the processor's cache
        B = len(batch)
        x, y = pens[labels[batch]].unbind(-1)                                                       # (B, P)
        bend = uniform(-0.12, 0.12, 4, B, 1)
        x, y = x + bend[0] * torch.sin(3 * y) + bend[1] * y * y, y + bend[2] * torch.sin(3 * x) + bend[3] * x * x
        x = x * uniform(0.75, 1.15, B, 1) + y * uniform(-0.3, 0.3, B, 1)
        y = y * uniform(0.8, 1.05, B, 1)
        turn = uniform(-0.2, 0.2, B, 1)
        points = torch.stack([x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos()], -1)
        points = 0.7 * points + uniform(-0.12, 0.12, B, 1, 2)                                       # (B, P, 2)
        nearest = torch.full((B, size * size), torch.inf)
        for a, b in zip(points.unbind(1), points[:, 1:].unbind(1)):  # squared distance of pixels to the segment ab
            along, offset = (b - a)[:, None], pixels - a[:, None]                                   # (B, 1 or S * S, 2)
            t = (offset * along).sum(-1) / (along.square().sum(-1) + 1e-9)
            nearest = nearest.minimum((offset - t.clamp(0, 1)[..., None] * along).square().sum(-1))
        ink = ((uniform(0.06, 0.14, B, 1) - nearest.sqrt()) * size / 2 + 0.5).clamp(0, 1)           # edges 1 pixel wide
        ink = ink.view(B, 1, size, size)
        if channels > 1:
            paper = uniform(0, 1, B, channels, 1, 1)
            ink = paper + ink * ((paper + uniform(0.25, 0.75, B, channels, 1, 1)) % 1 - paper)
        images[batch] = (255 * ink).round().byte()
    return images, labels
