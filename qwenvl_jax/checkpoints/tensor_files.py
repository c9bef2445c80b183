"""Files of named tensors, whichever format: which tensors a checkpoint folder holds, and each one's values on demand.

Not here: what the tensors mean (the weight tables) and where they go (`huggingface.py`).
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from qwenvl_jax.checkpoints.torch_pickle import TorchFile
from qwenvl_jax.config import UserError

# Names of safetensors' dtypes. Complex and 8-bit float types do not occur in the models of this project.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

# In the order of preference: an index names the shards, a single file is its own index.
SOURCES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


class SafetensorsFile:
    """The tensors of one safetensors file. Raises UserError, naming the file, if it is damaged or no such file."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with self._open() as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
            self._described = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}

    def names(self) -> list[str]:
        return list(self._described)

    def describe(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype of a tensor, from the file's header alone."""
        shape, code = self._described[name]
        if code not in DTYPES:
            raise UserError(f"{self.path}: {name} has the type {code}, which is not supported")
        return shape, DTYPES[code]

    def read(self, name: str) -> np.ndarray:
        """A tensor's values in memory of their own."""
        # Opened anew each time: the library maps the file, and the pages it has touched stay until it is closed.
        with self._open() as file:
            return file.get_tensor(name)

    def _open(self):
        try:
            return safe_open(self.path, framework="np")
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such file") from None
        except (SafetensorError, OSError) as error:
            with self.path.open("rb") as file:
                pointer = file.read(23) == b"version https://git-lfs"
            problem = (
                "a Git LFS pointer, not the weights; fetch them with `git lfs pull`"
                if pointer
                else f"truncated or not a safetensors file ({error}); download it again"
            )
            raise UserError(f"{self.path}: {problem}") from None


class NamedTensors(Protocol):
    """The tensors of a checkpoint, whatever files they come from."""

    folder: Path

    def names(self) -> list[str]: ...
    def describe(self, name: str) -> tuple[tuple[int, ...], np.dtype]: ...
    def read(self, name: str) -> np.ndarray: ...


def open_tensors(path: Path) -> SafetensorsFile | TorchFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises UserError naming file and line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold an object {{...}}, holds a {type(value).__name__}")
    return value


class FolderTensors:
    """All tensors of a checkpoint folder: sharded with an index or one file, safetensors preferred over `.bin`.

    Raises UserError for a folder without weights, an index that names absent or foreign files or tensors that its
    shards do not hold, and for damaged shards. Only headers are read here.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        source = next((name for name in SOURCES if (folder / name).is_file()), None)
        if source is None:
            raise UserError(f"{folder}: no weights here; looked for {', '.join(SOURCES)}")
        indexed = self._index(source) if source.endswith(".index.json") else {}
        shards = sorted(set(indexed.values())) or [source]
        self._files: dict[str, SafetensorsFile | TorchFile] = {}
        for shard in shards:
            file = open_tensors(folder / shard)
            for name in file.names():
                if name in self._files:
                    other = self._files[name].path.name
                    raise UserError(f"{folder}: tensor {name} is in two files, {other} and {shard}")
                self._files[name] = file
        absent = [name for name in indexed if name not in self._files]
        if absent:
            raise UserError(f"{folder / source}: lists {some(absent)}, which its files do not hold")

    def names(self) -> list[str]:
        return list(self._files)

    def describe(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        return self._files[name].describe(name)

    def read(self, name: str) -> np.ndarray:
        return self._files[name].read(name)

    def _index(self, source: str) -> dict[str, str]:
        index = read_json(self.folder / source).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(shard, str) for shard in index.values()):
            raise UserError(f"{self.folder / source}: field weight_map should map tensor names to file names")
        shards = sorted(set(index.values()))
        foreign = [shard for shard in shards if Path(shard).name != shard or shard in (".", "..")]
        if foreign:
            raise UserError(f"{self.folder / source}: names {foreign[0]!r}, which is not a file of this folder")
        absent = [shard for shard in shards if not (self.folder / shard).is_file()]
        if absent:
            raise UserError(f"{self.folder}: {len(absent)} of {len(shards)} weight files are missing: {some(absent)}")
        return index


def some(names: Iterable[str], most: int = 10) -> str:
    """The first names of a list, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def write_safetensors(
    path: Path, described: Mapping[str, tuple[tuple[int, ...], np.dtype]], values: Iterable[np.ndarray]
) -> None:
    """Writes a safetensors file, one tensor in memory at a time (the library wants the whole file's at once).

    described: shape and dtype by name; values: the tensors in that order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file that does not say this
    position = 0
    for name, (shape, dtype) in described.items():
        end = position + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for (name, (shape, dtype)), value in zip(described.items(), values, strict=True):
            if value.shape != shape or value.dtype != dtype:
                raise AssertionError(f"{name}: promised {shape} {dtype}, got {value.shape} {value.dtype}")
            _write_array(file, value)
        file.flush()
        os.fsync(file.fileno())


def _write_array(file: BinaryIO, value: np.ndarray) -> None:
    file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
