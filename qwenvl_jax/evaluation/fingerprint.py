"""Tells one folder of weights from another without reading all of it: a digest of names, sizes and samples of files."""

import hashlib
from pathlib import Path

BLOCKS, BLOCK = 64, 65536  # of each file that are read, evenly spaced; small files are read whole
SUFFIXES = (".json", ".safetensors", ".bin", ".tiktoken", ".npz")


def folder_fingerprint(folder: Path) -> str:
    """Of the files that make a checkpoint or an adapter, wherever the folder is; folders of Orbax included."""
    digest = hashlib.sha256()
    files = [path for path in folder.rglob("*") if path.is_file() and (path.suffix in SUFFIXES or "ocdbt" in str(path))]
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with open(path, "rb") as file:
            if size <= BLOCKS * BLOCK:
                digest.update(file.read())
                continue
            for block in range(BLOCKS):
                file.seek((size - BLOCK) * block // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]
