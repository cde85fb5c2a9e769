"""What may be done to a picture and its question without changing the answer: 48 symmetries of the data.

The square is turned or mirrored, and colours are exchanged, in the picture and in the program alike. Cells move whole,
so every picture is one that could have been drawn: a triangle still points up.
"""
from itertools import permutations, product

import torch

from data.shapes_questions import COLOURS, SHIFTS, TOKENS

RED, ABOVE = TOKENS.index("red"), TOKENS.index("above")
BESIDE = [1, 7, 3, 5]  # the cells above, below, left and right of the middle one, in the order of SHIFTS


def symmetries():
    """A row a symmetry: whence each cell (48, 9) and channel (48, 3) comes, and what each token becomes (48, 13)."""
    rows = []
    for mirrored, turns, channels in product((False, True), range(4), permutations(range(len(COLOURS)))):
        grid, channels, tokens = torch.arange(9).view(3, 3), torch.tensor(channels), torch.arange(len(TOKENS))
        cells = (grid.T if mirrored else grid).rot90(turns).flatten()
        tokens[RED:RED + len(COLOURS)] = RED + channels.argsort()
        places = cells.argsort()[BESIDE].tolist()  # where the neighbours of the middle are now
        tokens[ABOVE:ABOVE + len(SHIFTS)] = ABOVE + torch.tensor([BESIDE.index(place) for place in places])
        rows.append((cells, channels, tokens))
    return dict(zip(("cells", "channels", "tokens"), map(torch.stack, zip(*rows))))


def transform(images, programs, tables):
    """Images (B, 9, 300) and programs (B, T) after one symmetry of the tables, drawn at random."""
    row = torch.randint(len(tables.cells), (1,), device=images.device)
    cells, channels, tokens = (table[row][0] for table in (tables.cells, tables.channels, tables.tokens))
    return images[:, cells].unflatten(2, (-1, 3))[..., channels].flatten(2), tokens[programs]
