"""CIFAR-10, binary version: records of one label byte and 3 x 32 x 32 pixel bytes, in six batches of 10,000."""
import hashlib
import io
import tarfile

import numpy as np
import torch

from data.download import CACHE, download, store
from data.glyphs import load_glyphs

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
RECORD, RECORDS = 1 + 3 * 32 * 32, 10_000
MD5 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}


def load_images(name):
    """As load_cifar10, and, for name "glyphs", the same of drawn digits."""
    if name == "cifar10":
        return load_cifar10()
    images, labels = load_glyphs(14_000, size=32)
    images = images.expand(-1, 3, -1, -1)  # grey: in colour, what two views share is the colour, not the digit
    ends = dict(train=(0, 8000), val=(8000, 10_000), test=(10_000, 14_000))
    return {part: (images[a:b], labels[a:b]) for part, (a, b) in ends.items()}, "glyphs"


def load_cifar10():
    """({"train", "val", "test": (images (N, 3, 32, 32) uint8, labels (N,) int64)}, name of the split).

    Train is batches 1 to 4, val the first 2,000 images of batch 5; test is test_batch.bin or, where only the others are
    in the cache, the remaining 8,000 of batch 5. An empty cache is filled by download. Raises OSError where that fails
    or a batch is missing, ValueError where one is not what it should be."""
    folder = CACHE / "cifar10"
    if not any((folder / name).exists() for name in MD5):
        unpack(folder)
    names = list(MD5) if (folder / "test_batch.bin").exists() else list(MD5)[:5]
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise OSError(f"{', '.join(missing)} not in {folder}\nHINT: put the rest of {URL} there, or delete what is "
                      "there to download all")
    batches = [decode(check(folder / name, name, (folder / name).read_bytes())) for name in names]
    train = tuple(torch.cat(parts) for parts in zip(*batches[:4]))
    val = tuple(part[:2000] for part in batches[4])
    test = tuple(part[2000:] for part in batches[4]) if len(batches) == 5 else batches[5]
    tested = "8,000 of batch 5" if len(batches) == 5 else "test_batch.bin"
    return dict(train=train, val=val, test=test), f"cifar10 (train: batches 1-4, test: {tested})"


def check(source, name, content):
    """content, the bytes of batch `name` from source; ValueError if its MD5, the publisher's choice, is another."""
    found = hashlib.md5(content).hexdigest()
    if found != MD5[name]:
        raise ValueError(f"{source}: MD5 {found} of {len(content):,} bytes, expected {MD5[name]} of "
                         f"{RECORD * RECORDS:,}\nHINT: delete {source}, and download it again from {URL}")
    return content


def decode(content):
    records = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(-1, RECORD).copy())
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()


def unpack(folder):
    """Download the archive; once every batch in it has been checked, write all six to folder."""
    try:
        archive = download(URL)
    except OSError as error:
        raise OSError(f"CIFAR-10 is not in the cache and {URL} gave: {error}\n"
                      f"HINT: put data_batch_1.bin to data_batch_5.bin into {folder}") from error
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            members = {name: tar.extractfile(f"cifar-10-batches-bin/{name}").read() for name in MD5}
    except (tarfile.TarError, KeyError, EOFError) as error:
        raise ValueError(f"{URL}: not the archive of CIFAR-10 ({error})") from error
    for name, content in members.items():
        check(URL, name, content)
    for name, content in members.items():
        store(folder / name, content)
