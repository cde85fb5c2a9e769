"""Text as bytes: tiny shakespeare, the documentation and library that ship with Python, or files of your own."""
import os
import sys
from pathlib import Path

import numpy as np
import torch

from data.download import CACHE, cached

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def load_text(sources=None, least=1):
    """(tokens (N,) uint8, name and size). Sources: None, ["shakespeare"], ["python"], or paths of files and folders.

    None takes tiny shakespeare and, where that is neither in the cache nor to be had, what comes with Python. Raises
    OSError or ValueError that name the file and what to do, also where it holds fewer than `least` bytes.
    """
    if sources is None:
        try:
            return load_text(["shakespeare"], least)
        except OSError as error:
            print(f"tiny shakespeare: no download ({error.__cause__}), so --data python, the text that ships with it")
            return load_text(["python"], least)
    if sources == ["shakespeare"]:
        try:
            content = cached("shakespeare/input.txt", SHAKESPEARE_URL, SHAKESPEARE_SHA256)
        except OSError as error:
            raise OSError(f"tiny shakespeare is not in the cache and {SHAKESPEARE_URL} gave: {error}\n"
                          f"HINT: put it at {CACHE / 'shakespeare' / 'input.txt'}, or use --data python") from error
    elif sources == ["python"]:
        from pydoc_data.topics import topics  # the language reference, about half a MB of English
        content = "\n".join(topics[name] for name in sorted(topics)).encode()
        for module in sorted(Path(os.__file__).parent.glob("*.py")):  # the standard library without packages, 5 MB
            content += b"\n" + module.read_bytes()
        sources = [f"python {sys.version.split()[0]}"]
    else:
        content = b"\n".join(read(Path(source)) for source in sources)
    name = f"{' '.join(str(source) for source in sources)} ({len(content):,} bytes)"
    if len(content) < least:
        raise ValueError(f"{name}; allowed: {least:,} bytes or more, a hundred windows of --context")
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy()), name


def read(path):
    """The bytes of a text file, or of all text files below a folder in sorted order, hidden ones left out.

    Raises ValueError where there is nothing to read or no text, OSError where a file cannot be read."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        seen = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        texts = [content for p in seen if (content := p.read_bytes()) and b"\0" not in content]
        if not texts:
            raise ValueError(f"{path}: no text file in this folder")
        return b"\n".join(texts)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; allowed: shakespeare, python, or paths of text")
    content = path.read_bytes()
    if not content:
        raise ValueError(f"{path}: the file is empty")
    if b"\0" in content:
        raise ValueError(f"{path}: not text, it holds a NUL byte")
    return content
