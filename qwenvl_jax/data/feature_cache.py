"""Features of pictures kept on disk, for runs that leave the vision tower as it is: a picture is encoded once in all.

A file per picture, named by what it shows, in a folder named by the weights of the tower: another model, or another
picture of the same path, never finds it. A tower that learns must not use this.
"""

import hashlib
import uuid
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from qwenvl_jax.config import UserError
from qwenvl_jax.data.measure import Source
from qwenvl_jax.data.pipeline import ahead
from qwenvl_jax.models.qwen_vl import QwenVL
from qwenvl_jax.processing.images import preprocess
from qwenvl_jax.processing.processor import Processor

CHUNK = 16  # pictures encoded at once


class FeatureCache:
    """Features [Q, D] of pictures as the vision tower of `model` sees them, in `folder`. Pickles, without the model."""

    def __init__(self, folder: Path, model: QwenVL):
        self.folder = folder / fingerprint(model)
        self.shape = (model.config.visual.n_queries, model.config.visual.output_dim)
        self.dtype = np.dtype(jax.eval_shape(model.encode_images, _no_pixels(model, 1)).dtype)

    def file(self, picture: Image.Image) -> Path:
        """Where the features of an RGB picture are kept."""
        name = hashlib.sha256(f"{picture.size} ".encode() + picture.tobytes()).hexdigest()
        return self.folder / name[:2] / name[2:]

    def read(self, picture: Image.Image) -> np.ndarray:
        """[Q, D] in the model's dtype. Raises UserError where they are missing or damaged."""
        path = self.file(picture)
        try:
            return np.frombuffer(path.read_bytes(), self.dtype).reshape(self.shape)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not the features of a picture ({error}); remove it, and fill again") from None

    def write(self, path: Path, features: np.ndarray) -> None:
        """Writes a file, whole or not at all; several processes, of several hosts, may write the same one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        temporary.write_bytes(features.tobytes())
        temporary.replace(path)

    def fill(self, model: QwenVL, records: Source, processor: Processor, *, workers: int = 0) -> int:
        """Encodes all pictures of the records that are not there yet, and returns how many. Bad records are passed."""
        encode = jax.jit(lambda tower, pixels: tower(pixels))
        waiting: dict[str, np.ndarray] = {}
        done: set[str] = set()

        def flush() -> None:
            for start in range(0, len(waiting), CHUNK):
                paths = list(waiting)[start : start + CHUNK]
                pixels = _no_pixels(model, CHUNK)
                pixels[: len(paths)] = [waiting[path] for path in paths]
                for path, features in zip(paths, np.asarray(encode(model.visual, pixels)), strict=False):
                    self.write(Path(path), features)
            done.update(waiting)
            waiting.clear()

        for paths, pixels in ahead(_Missing(self, records, processor), first=0, workers=workers):
            # What is read ahead may have been written since.
            waiting |= {path: picture for path, picture in zip(paths, pixels, strict=True) if path not in done}
            if len(waiting) >= CHUNK:
                flush()
        flush()
        return len(done)


class _Missing:
    """A random-access source of the pictures of each record that are not cached: paths, float32 [n, 3, S, S]."""

    def __init__(self, cache: FeatureCache, records: Source, processor: Processor):
        self.cache, self.records, self.processor = cache, records, processor

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[list[str], np.ndarray]:
        try:
            _, _, pictures = self.processor.training_tokens(self.records[index].messages)
        except UserError:  # measuring names it
            pictures = []
        files = {str(self.cache.file(picture)): picture for picture in pictures}
        missing = {path: picture for path, picture in files.items() if not Path(path).exists()}
        return list(missing), preprocess(list(missing.values()), self.processor.config.visual.image_size)


def fingerprint(model: QwenVL) -> str:
    """Names the vision tower by its shape and its weights, all of which this process must hold."""
    digest = hashlib.sha256(repr(model.config.visual).encode())
    for leaf in jax.tree.leaves(model.visual):
        array = np.asarray(leaf)
        digest.update(f"{array.shape} {array.dtype} ".encode() + array.tobytes())
    return digest.hexdigest()[:32]


def _no_pixels(model: QwenVL, count: int) -> np.ndarray:
    size = model.config.visual.image_size
    return np.zeros((count, 3, size, size), np.float32)
