"""Compiled programs kept on disk, so that a server that starts again neither traces nor lowers them.

JAX's own compilation cache is asked with a program's text, and to write that text takes longer than to read the answer:
Python does it, one thread at a time. Here a program is asked for by what its text would be made of: the sources, the
versions of what they use, the model's structure, and the shapes and places of the arguments. The folder is in that of
JAX's cache, and to be trusted as that is: what is read from it is run.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import os
import pickle
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

PACKAGE = Path(__file__).parents[1]
SOURCES = ("config.py", "sharding.py", "nn", "models", "inference")  # what programs are made of
DAYS_KEPT = 14  # of programs of other sources, versions or devices, since they were last asked for
logger = logging.getLogger(__name__)


class Executables:
    """Those of this process's sources, versions and devices, in a folder of their own."""

    def __init__(self, folder: Path):
        self._folder = folder
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            os.utime(folder)
            _remove_old(folder.parent)

    def load(self, key: str, devices: Sequence[jax.Device]) -> jax.stages.Compiled | None:
        """The program of a `key`, ready to be called on these devices, in the order that it was compiled for.

        None where there is none that can be used.
        """
        path = self._folder / key
        try:
            serialised, inputs, outputs = pickle.loads(path.read_bytes())
            read = serialize_executable.deserialize_and_load
            return read(serialised, inputs, outputs, execution_devices=devices)
        except FileNotFoundError:
            return None
        except Exception as error:  # cut short, or of a runtime that does not read it: it will be written anew
            logger.debug("%s cannot be used: %r", path, error)
            return None

    def save(self, key: str, program: jax.stages.Compiled) -> None:
        """Keeps a program; one that cannot be kept is only slower at the next start."""
        path = self._folder / key
        part = path.with_name(f"{key}.{os.getpid()}.part")
        try:
            part.write_bytes(pickle.dumps(serialize_executable.serialize(program)))
            part.replace(path)
        except Exception as error:
            logger.debug("%s cannot be kept: %r", path, error)
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


@contextlib.contextmanager
def kept() -> Iterator[Executables | None]:
    """Those beside JAX's compilation cache, which is not asked meanwhile: what a CPU reads from there cannot be kept.

    None without such a cache, and where a program is part of several processes: then JAX's is asked as ever.
    """
    folder = jax.config.values["jax_compilation_cache_dir"]
    if not folder or not jax.config.values["jax_enable_compilation_cache"] or jax.process_count() > 1:
        yield None
        return
    found = Executables(Path(folder) / "executables" / _surroundings())
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield found
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


def key(name: str, *parts: Any) -> str:
    """A file name for a program: its own and a digest of what tells it from others, whose `repr`s must say all."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode() + b"\0")
    return f"{name}-{digest.hexdigest()[:32]}"


def arguments(tree: Any) -> Any:
    """What a program depends on of its arguments: their structure, shapes, dtypes and places."""

    def one(leaf: Any) -> Any:
        return (leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) if hasattr(leaf, "shape") else leaf

    leaves, structure = jax.tree.flatten(tree)
    return structure, [one(leaf) for leaf in leaves]


def _surroundings() -> str:
    """A digest of all that a program depends on besides its key."""
    devices = jax.devices()
    values = sorted((name, repr(value)) for name, value in jax.config.values.items() if "cache" not in name)
    flags = [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    kinds = [(device.id, device.device_kind) for device in devices]
    return key("for", _sources(), _versions(), values, flags, devices[0].client.platform_version, kinds, _processor())


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for source in SOURCES for path in (PACKAGE / source, *(PACKAGE / source).rglob("*.py"))):
        if path.is_file():
            digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def _versions() -> list[tuple[str, str]]:
    names = ("jax", "jaxlib", "flax", "numpy")
    return [("python", platform.python_version()), *((name, importlib.metadata.version(name)) for name in names)]


@functools.cache
def _processor() -> str:
    """What a CPU can do: a program for one is wrong on another that can do less."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor() or platform.machine()


def _remove_old(folder: Path) -> None:
    for other in folder.iterdir():
        if time.time() - other.stat().st_mtime > DAYS_KEPT * 24 * 3600:
            shutil.rmtree(other, ignore_errors=True)
