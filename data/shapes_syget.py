"""SHAPES-SyGeT (github ankitkv/SHAPES-SyGeT): its files, or images and answers of the same distribution drawn anew."""
import hashlib
import io
import re

import numpy as np
import torch

from data.download import CACHE, cached
from data.shapes_questions import COLOURS, QUESTIONS, SHAPES, answer

URL = "https://raw.githubusercontent.com/ankitkv/SHAPES-SyGeT/868e3831c18d41b9503840475483bd120a6008ed/shapes_syget/"
BLOBS = dict(train="1cb36d48b58e5eb4b97b04452250a8355e0d445a", val_iid="6f928579cb507fb2cd1959b488cf1b997fd9d318",
             val_ood="beba3ce0c81e1cb199f4119f85042b39aa115631")  # git's names for the contents of the image files


def stencils():
    """(4, 256, 10, 10): how much of each pixel of its cell a shape covers (0 is none); half the radii are small."""
    radius = torch.cat([size * torch.linspace(0.9, 1.1, 128) for size in (2.5, 3.75)])[:, None]          # pixels
    y = (torch.arange(160) + 0.5) / 16 - 5  # 16 scan lines a pixel, each cut exactly
    circle = (radius ** 2 - y ** 2).clamp(min=0).sqrt()                                     # half of its width at y
    square, triangle = radius * (y.abs() < radius), (y + radius).clamp(min=0) / 2 * (y < radius)
    half = torch.stack([torch.zeros(256, 160), circle, square, triangle])[..., None]               # (4, 256, 160, 1)
    left = torch.arange(-5, 5)
    return (torch.minimum(half, left + 1) - torch.maximum(-half, left)).clamp(0, 1).unflatten(2, (10, 16)).mean(3)


def draw(questions, generator):
    """(images (N, 30, 30, 3) uint8 RGB, scenes (N, 3, 3, 2)), a thing that a question's first word names in each."""
    head = torch.tensor([(COLOURS + SHAPES).index(question[0]) for question in questions])[:, None, None]
    scenes, missing = torch.zeros(len(head), 3, 3, 2, dtype=torch.long), torch.arange(len(head))
    while len(missing):
        filled = torch.rand(len(missing), 3, 3, 1, generator=generator) < 0.8
        scenes[missing] = torch.randint(1, 4, (len(missing), 3, 3, 2), generator=generator) * filled
        named = torch.where(head < 3, scenes[..., 0] == head + 1, scenes[..., 1] == head - 2)
        missing = (~named.flatten(1).any(1)).nonzero()[:, 0]
    images, table, primaries = [], stencils(), torch.eye(4)[:, 1:]
    for colour, shape in (part.unbind(-1) for part in scenes.split(4096)):                                  # (n, 3, 3)
        cover = table[shape, torch.randint(256, shape.shape, generator=generator)]                  # (n, 3, 3, 10, 10)
        noise = 0.4 * torch.rand(*shape.shape, 3, generator=generator) - 0.2
        colours = 255 * (primaries[colour] + noise).clamp(0, 1)                                          # (n, 3, 3, 3)
        pixels = (cover[..., None] * colours[:, :, :, None, None]).round().byte()                # (n, 3, 3, 10, 10, 3)
        images.append(pixels.transpose(2, 3).reshape(-1, 30, 30, 3))
    return torch.cat(images), scenes


def decode(images):
    """The scenes (N, 3, 3, 2) of images (N, 30, 30, 3) uint8 RGB: the nearest stencil names the shape of a cell."""
    cells = images.unflatten(1, (3, 10)).unflatten(3, (3, 10)).transpose(2, 3).flatten(3, 4)       # (N, 3, 3, 100, 3)
    level, colour = cells.amax(3).max(-1)                                                                   # (N, 3, 3)
    cover = cells.amax(4) / level[..., None].clamp(min=1)
    table = stencils()[1:].reshape(-1, 100)
    shape = torch.cat([(part @ table.T - table.square().sum(1) / 2).argmax(-1) // 256 for part in cover.split(1024)])
    return torch.stack([colour + 1, shape + 1], -1) * (level > 0)[..., None]


def generated(questions, count, generator):
    """Tensors of one split, a question's `count` rows together: images, questions (N,), answers (N,), both int64."""
    rows = torch.tensor(questions).repeat_interleave(count)
    images, scenes = draw([QUESTIONS[row] for row in rows], generator)
    return images, rows, answer(rows, scenes)


def published(split):
    """Tensors of one split from its files. Raises OSError or ValueError that name the file and what is wrong."""
    content, queries, answers = (cached(f"shapes_syget/{split}.{kind}", f"{URL}{split}.{kind}")
                                 for kind in ("input.npy", "query", "output"))
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if blob != BLOBS[split]:
        raise ValueError(f"{CACHE}/shapes_syget/{split}.input.npy: git blob {blob}, expected {BLOBS[split]}")
    images = torch.from_numpy(np.load(io.BytesIO(content))[..., ::-1].copy())  # the files hold blue, green, red
    asked = [tuple(re.findall(r"\w+", line)[1:]) for line in queries.decode().splitlines()]
    stated = torch.tensor([line == "true" for line in answers.decode().splitlines()]).long()
    if not len(images) == len(asked) == len(stated) or not set(asked) <= set(QUESTIONS):
        raise ValueError(f"{CACHE}/shapes_syget/{split}.query: {len(asked)} questions, {len(stated)} answers")
    rows = torch.tensor([QUESTIONS.index(question) for question in asked])
    if wrong := (answer(rows, decode(images)) != stated).sum():
        raise ValueError(f"{CACHE}/shapes_syget/{split}.output: {wrong} answers are not what is seen")
    return images, rows, stated


def load_shapes(source="generated", count=600, seed=0):
    """{"train", "val_iid", "val_ood": (images (N, 30, 30, 3) uint8 RGB, index in QUESTIONS (N,), answer (N,))}.

    "generated" draws `count` training images a question, 8 for Val-IID, 64 for Val-OOD; "published" reads the files."""
    if source == "published":
        return {split: published(split) for split in BLOBS}
    seen, unseen, generator = range(135), range(135, 244), torch.Generator().manual_seed(seed)
    val = dict(val_iid=generated(seen, 8, generator), val_ood=generated(unseen, 64, generator))
    return val | dict(train=generated(seen, count, generator))
