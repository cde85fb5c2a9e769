"""The questions of SHAPES-SyGeT, their English, their programs, and an executor that answers them from a scene.

A scene is 3 x 3 cells, each empty or a circle, square or triangle in red, green or blue. (square, above, red) asks
whether some square lies in a cell right above a red thing: the tuple is the published (is square (above red)). The 244
questions are split by template: training asks 135 of them, Val-OOD the others, whose words it knows in other places.
"""
from itertools import product

import torch
import torch.nn.functional as F

COLOURS, SHAPES = ("red", "green", "blue"), ("circle", "square", "triangle")
SHIFTS = dict(above=(-1, 0), below=(1, 0), left_of=(0, -1), right_of=(0, 1))  # rows down, columns right
TOKENS = ("<end>", "scene", *COLOURS, *SHAPES, *SHIFTS, "and")
TWO_TRANSFORMS = dict(  # blue aag is (blue, above, above, green): the 64 that the data set's authors drew out of 576
    blue="aag alt blb lab lac lar llc llt lrb lrs", green="abb abs bac bbb brc lar lbr llc lrg rbc rrg",
    red="abt bbg brg rbb rbt rlc rrb", circle="abs alc arc bas bbc bbr blg bls blt lac llr lrc rbr rlg",
    square="aac aag aat alb bac blg bls lar las lrc lrg rar rbg rbt", triangle="aac ars lar lbt llc lrg rbg rbt")


def all_questions():
    """The 135 training questions, then the 109 of Val-OOD, each a tuple of words: (square, above, red)."""
    named = {name[0]: name for name in SHIFTS}, {name[0]: name for name in COLOURS + SHAPES}
    found = [*product(COLOURS + SHAPES, repeat=2), *product(COLOURS + SHAPES, SHIFTS, COLOURS + SHAPES)]
    found += [(head, named[0][code[0]], named[0][code[1]], named[1][code[2]])
              for head, codes in TWO_TRANSFORMS.items() for code in codes.split()]
    seen = {2: lambda q: q[0] in SHAPES or q[1] in SHAPES, 3: lambda q: q[2] in COLOURS, 4: lambda q: q[0] in SHAPES}
    return sorted(found, key=lambda q: not seen[len(q)](q))


def english(question):
    """(square, red) is "is a square red", (square, above, red) is "is a square above a red shape"."""
    nouns = [f"a {name} shape" if name in COLOURS else f"a {name}" for name in (question[0], question[-1])]
    if len(question) == 2 and question[1] in COLOURS:
        nouns[1] = question[1]
    return " ".join(["is", nouns[0], *question[1:-1], nouns[1]]).replace("_", " ")


def program(question):
    """(square, above, red) is [and, square, scene, above, red, scene]: tokens in prefix order."""
    return ["and", question[0], "scene", *question[1:], "scene"]


def execute(tokens, scenes):
    """The answers (N,) bool of one program to scenes (N, 3, 3, 2), colour and shape of each cell, 0 for none."""
    stack = []
    for token in reversed(tokens):  # a program denotes a set of cells (N, 3, 3)
        if token == "scene":
            stack.append(torch.ones_like(scenes[..., 0], dtype=torch.bool))
        elif token == "and":
            stack.append(stack.pop() & stack.pop())
        elif token in SHIFTS:
            down, right = SHIFTS[token]
            stack.append(F.pad(stack.pop(), (1, 1, 1, 1))[:, 1 - down:4 - down, 1 - right:4 - right])
        else:
            names = COLOURS if token in COLOURS else SHAPES
            stack.append(stack.pop() & (scenes[..., int(names is SHAPES)] == 1 + names.index(token)))
    return stack.pop().flatten(1).any(1)


QUESTIONS = all_questions()
WORDS = ["<pad>", *sorted({word for question in QUESTIONS for word in english(question).split()})]


def answer(rows, scenes):
    """The executor's answers (N,) int64 to the questions of index rows (N,) about scenes (N, 3, 3, 2)."""
    answers = torch.zeros_like(rows)
    for i in rows.unique():
        answers[rows == i] = execute(program(QUESTIONS[i]), scenes[rows == i]).long()
    return answers


def encode(sentences, vocabulary, length):
    """Lists of words -> (B, length) int64, padded with 0, and how many words each has (B,)."""
    rows = [[vocabulary.index(word) for word in sentence] for sentence in sentences]
    return torch.tensor([row + [0] * (length - len(row)) for row in rows]), torch.tensor([len(row) for row in rows])


def question_tensors():
    """Of all questions: words (244, 11), lengths (244,) and programs (244, 8), all int64."""
    words, lengths = encode([english(question).split() for question in QUESTIONS], WORDS, 11)
    return dict(words=words, lengths=lengths, programs=encode(map(program, QUESTIONS), TOKENS, 8)[0])
