"""Fetch a file once, verify it, keep it: every loader in data/ goes through here."""
import hashlib
import os
import sys
import urllib.request
from pathlib import Path

from tqdm import tqdm

CACHE = Path(__file__).parent / "cache"


def checksum(content):
    return hashlib.sha256(content).hexdigest()


def cached(name, url, sha256=None, decode=bytes):
    """The bytes of CACHE/name after decode, downloaded first where it is missing. They have sha256, or, where that is
    None, the caller verifies them.

    Raises OSError where the file can be neither read nor downloaded, and ValueError that names it where its content is
    not what it should be: such a file is never used, nor kept.
    """
    path = CACHE / name
    fresh = not path.exists()
    stored = download(url) if fresh else path.read_bytes()
    content = decode(stored)
    if sha256 and checksum(content) != sha256:
        raise ValueError(f"{url if fresh else path}: sha256 {checksum(content)}, expected {sha256}\n"
                         f"HINT: delete {path} to download it again from {url}")
    if fresh:
        store(path, stored)
    return content


def store(path, content):
    """Write another file, then rename it: whoever finds path finds all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)


def download(url):
    """The bytes behind url, with a progress bar on a terminal. Raises OSError."""
    with urllib.request.urlopen(url, timeout=20) as response:
        total = int(response.headers.get("Content-Length") or 0)
        with tqdm(total=total or None, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1],
                  disable=not sys.stderr.isatty()) as bar:
            chunks = []
            while chunk := response.read(1 << 16):
                chunks.append(chunk)
                bar.update(len(chunk))
    content = b"".join(chunks)
    if total and len(content) != total:
        raise OSError(f"{url}: connection closed after {len(content)} of {total} bytes")
    return content
