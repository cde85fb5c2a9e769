"""MNIST, or glyphs where it is not to be had: grey images of digits."""
import gzip
import zlib

import numpy as np
import torch

from data.download import CACHE, cached
from data.glyphs import load_glyphs

URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
SHA256 = {  # of the content: the gzip around it depends on who packed it
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
}


def load_digits(name=None):
    """(train (N, 1, 28, 28) uint8, test (M, 1, 28, 28) uint8, name). Name: None, "mnist" or "glyphs".

    MNIST has 60,000 and 10,000 images, glyphs 12,000 and 2,000. None takes MNIST and, where that is neither in the
    cache nor to be had, glyphs. Raises OSError or ValueError that name the file and what to do.
    """
    if name is None:
        try:
            return load_digits("mnist")
        except OSError as error:
            print(f"MNIST: no download ({error.__cause__}), so --data glyphs, which are drawn here")
            return load_digits("glyphs")
    if name == "glyphs":
        return *(load_glyphs(count, seed=seed)[0] for seed, count in enumerate((12_000, 2_000))), name
    return *(idx_images(file) for file in SHA256), name


def binarised(grey, seed):
    """One draw of grey (N, 1, 28, 28) uint8 as probabilities, float32 of 0 and 1, the same on every device."""
    noise = torch.rand(grey.shape, generator=torch.Generator().manual_seed(seed)).to(grey.device)
    return (noise < grey / 255).float()


def idx_images(name):
    """(N, 1, 28, 28) uint8 from an idx file, of which 16 bytes come before the first pixel."""
    file = f"mnist/{name}.gz"
    try:
        content = cached(file, f"{URL}{name}.gz", SHA256[name], unzip)
    except OSError as error:
        raise OSError(f"MNIST is not in the cache and {URL}{name}.gz gave: {error}\n"
                      f"HINT: put it at {CACHE / file}, or use --data glyphs") from error
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=16).copy()).view(-1, 1, 28, 28)


def unzip(content):
    """What a gzip file holds; of one that is damaged nothing, which has another checksum."""
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error):
        return b""
