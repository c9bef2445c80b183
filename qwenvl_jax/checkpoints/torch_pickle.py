"""Reads PyTorch checkpoints (`pytorch_model-*.bin`, `adapter_model.bin`) without PyTorch and without running them.

Such a file is a zip archive with a pickle that describes tensors and one uncompressed entry per storage. A pickle is a
program; this reader interprets only the instructions that build a dictionary of tensors, and refuses every global but
those below by name. Nothing in the file is imported, called or given a chance to be. Values are read tensor by tensor.

Not here: which tensors a model needs (`huggingface.py`), and the formats before torch 1.6, which nothing writes now.
"""

import math
import pickletools
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qwenvl_jax.config import UserError

STORAGES = {
    "torch DoubleStorage": np.dtype(np.float64),
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
}
TENSOR = "torch._utils _rebuild_tensor_v2"
PARAMETER = "torch._utils _rebuild_parameter"
DICTIONARY = "collections OrderedDict"
GLOBALS = {TENSOR, PARAMETER, DICTIONARY, *STORAGES}


@dataclass(frozen=True)
class Global:
    """A name that the pickle mentions. It stands for itself; nothing is imported."""

    name: str


@dataclass(frozen=True)
class Storage:
    key: str
    dtype: np.dtype
    size: int  # elements


@dataclass(frozen=True)
class TorchTensor:
    """Where a tensor's values lie: elements `offset + sum(index * stride)` of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements


class Damaged(Exception):
    """The pickle is not one that torch wrote for a dictionary of tensors."""


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > 32 or any(type(n) is not int or not 0 <= n < 2**62 for n in value):
        raise Damaged(f"{what} is not a tuple of sizes")
    return value


def _tensor(arguments: tuple) -> TorchTensor:
    """The arguments of torch's `_rebuild_tensor_v2`, checked: every element lies within the storage."""
    if len(arguments) < 4 or not isinstance(arguments[0], Storage):
        raise Damaged("a tensor without a storage")
    storage, offset, shape, strides = arguments[:4]
    shape, strides = _sizes(shape, "a shape"), _sizes(strides, "a stride")
    if type(offset) is not int or offset < 0 or len(shape) != len(strides):
        raise Damaged(f"a tensor of shape {shape} with strides {strides} or an offset that cannot be")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    # More elements than the storage holds would be a broadcast view: a few bytes that claim to be terabytes.
    if math.prod(shape) > storage.size or (math.prod(shape) and last >= storage.size):
        raise Damaged(
            f"a tensor of shape {shape}, strides {strides}, offset {offset} in a storage of {storage.size} elements"
        )
    return TorchTensor(storage, offset, shape, strides)


def _storage(persistent_id: Any) -> Storage:
    """The persistent id by which a pickle refers to a storage: ("storage", type, key, device, elements)."""
    match persistent_id:
        case ("storage", Global(name), str(key), str(), int(size)) if name in STORAGES and size >= 0:
            return Storage(key, STORAGES[name], size)
    raise Damaged("a reference that is not to a storage")


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Global) or type(arguments) is not tuple:
        raise Damaged("a call of something that is not a function")
    if function.name == TENSOR:
        return _tensor(arguments)
    if function.name == PARAMETER and arguments and isinstance(arguments[0], TorchTensor):
        return arguments[0]
    if function.name == DICTIONARY and not arguments:
        return OrderedDict()
    raise Damaged(f"a call of {function.name.replace(' ', '.')} with {len(arguments)} arguments")


MARK = object()


class PickleReader:
    """Interprets the pickle of a state dict: strings, numbers, tuples, lists, dictionaries and tensors."""

    def __init__(self, data: bytes):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.data = data

    def run(self) -> Any:
        """The object that the pickle describes. Raises Damaged; any other exception means damage too."""
        instructions: list[tuple[Any, Any, Any]] = list(pickletools.genops(self.data))
        for opcode, argument, _ in instructions:
            if opcode.name == "GLOBAL":  # before all else, so that a refusal names it
                self.named(str(argument))
        for opcode, argument, _ in instructions:
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT") or "BINUNICODE" in name:
                self.stack.append(argument)
            elif name == "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            elif name in ("BINPUT", "LONG_BINPUT"):
                self.memo[argument] = self.stack[-1]
            elif name in ("GLOBAL", "STACK_GLOBAL"):
                self.stack.append(self.named(argument))
            elif name in ("BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[argument])
            elif name not in ("PROTO", "FRAME"):
                self.build(name)
        raise Damaged("no end")

    def named(self, name: str | None) -> Global:
        if name is None:  # STACK_GLOBAL
            attribute, module = self.stack.pop(), self.stack.pop()
            if type(attribute) is not str or type(module) is not str:
                raise Damaged("a global without a name")
            name = f"{module} {attribute}"
        if name not in GLOBALS:
            raise UserError(
                f"the pickle names {name.replace(' ', '.')[:100]!r}, which no dictionary of tensors needs; refused, "
                "nothing was run. If you trust the file, convert it to safetensors where torch is installed"
            )
        return Global(name)

    def build(self, name: str) -> None:
        """Instructions that put values together."""
        stack = self.stack
        match name:
            case "MARK":
                stack.append(MARK)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
            case "TUPLE":
                stack.append(tuple(self.since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple([stack.pop() for _ in range(int(name[-1]))][::-1]))
            case "APPEND" | "APPENDS":
                values = [stack.pop()] if name == "APPEND" else self.since_mark()
                self.top(list).extend(values)
            case "SETITEM" | "SETITEMS":
                values = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self.since_mark()
                keys = values[::2]
                if any(type(key) is not str for key in keys):
                    raise Damaged("a dictionary with a key that is not a name")
                self.top(dict).update(zip(keys, values[1::2], strict=True))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_call(stack.pop(), arguments))
            case "BUILD":  # attributes that torch hangs on a state dict (versions of modules); of no use here
                stack.pop()
                self.top(OrderedDict)
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case _:
                raise Damaged(f"the instruction {name}")

    def since_mark(self) -> list[Any]:
        values = []
        while (value := self.stack.pop()) is not MARK:
            values.append(value)
        return values[::-1]

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise Damaged(f"an instruction for a {kind.__name__} on a {type(self.stack[-1]).__name__}")
        return self.stack[-1]


class TorchFile:
    """The tensors of one file. Opening reads the description only; `read` fetches one tensor's values.

    `tensors` maps names to shapes and dtypes. Raises UserError, naming the file, if it is truncated, not a zip archive,
    of the format before torch 1.6, or describes anything but tensors.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                self._entries = {info.filename: info for info in archive.infolist()}
                description = self._description()
                self._prefix = description.removesuffix("data.pkl")
                order = f"{self._prefix}byteorder"
                self._swapped = order in self._entries and archive.read(self._stored(order)) == b"big"
                found = PickleReader(archive.read(description)).run()
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such file") from None
        except zipfile.BadZipFile:
            raise UserError(f"{self.path}: {_what_else(self.path)}") from None
        except Exception as error:  # whatever a damaged file provokes in the zip and pickle readers
            detail = f"{type(error).__name__} " * (not isinstance(error, Damaged)) + str(error)
            raise UserError(f"{self.path}: not a checkpoint that can be read ({detail.strip()})") from None
        self._tensors = self._checked(found)

    def names(self) -> list[str]:
        return list(self._tensors)

    def describe(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype of a tensor, from the description alone."""
        tensor = self._tensors[name]
        return tensor.shape, tensor.storage.dtype

    def read(self, name: str) -> np.ndarray:
        """A tensor's values, as a read-only view (strided where the tensor is) of just the bytes that it spans."""
        tensor = self._tensors[name]
        dtype = tensor.storage.dtype
        if not math.prod(tensor.shape):
            return np.zeros(tensor.shape, dtype)
        span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
        raw = np.empty(span * dtype.itemsize, np.uint8)
        with self.path.open("rb") as file:
            file.seek(self._start(file, tensor.storage) + tensor.offset * dtype.itemsize)
            if file.readinto(raw.data) != raw.nbytes:
                raise UserError(f"{self.path}: truncated in the middle of {name}; download it again")
        if self._swapped and dtype.itemsize > 1:
            raw.view(f"u{dtype.itemsize}").byteswap(inplace=True)
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(raw.view(dtype), tensor.shape, strides, writeable=False)

    def _description(self) -> str:
        """The name of the pickle, `data.pkl` in the archive's one folder."""
        found = [name for name in self._entries if name.split("/")[1:] == ["data.pkl"]]
        if len(found) != 1:
            raise Damaged(f"a zip archive with {len(found)} files data.pkl; a torch checkpoint has one")
        return self._stored(found[0])

    def _stored(self, name: str) -> str:
        """The name itself, once it is clear that its entry is not compressed: a few bytes could become gigabytes."""
        if self._entries[name].compress_type != zipfile.ZIP_STORED:
            raise Damaged(f"{name} is compressed, which torch does not do")
        return name

    def _checked(self, found: Any) -> dict[str, TorchTensor]:
        if not isinstance(found, dict):
            raise UserError(f"{self.path}: holds a {type(found).__name__}, not a dictionary of tensors")
        for name, tensor in found.items():
            if not isinstance(tensor, TorchTensor):
                raise UserError(f"{self.path}: entry {name!r} is a {type(tensor).__name__}, not a tensor")
            entry = self._entries.get(f"{self._prefix}data/{tensor.storage.key}")
            expected = tensor.storage.size * tensor.storage.dtype.itemsize
            if entry is None or entry.file_size != expected or entry.compress_type != zipfile.ZIP_STORED:
                state = "absent" if entry is None else f"{entry.file_size} bytes"
                raise UserError(
                    f"{self.path}: the values of {name} should be {expected} bytes but are {state}; download it again"
                )
        return found

    def _start(self, file, storage: Storage) -> int:
        """Where a storage's bytes begin: after the entry's own header, whose length only the header tells."""
        info = self._entries[f"{self._prefix}data/{storage.key}"]
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) != 30 or header[:4] != b"PK\x03\x04":
            raise UserError(f"{self.path}: damaged at byte {info.header_offset}; download it again")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        return info.header_offset + 30 + name_length + extra_length


def _what_else(path: Path) -> str:
    """What a file that is no zip archive probably is."""
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; fetch them with `git lfs pull`"
    if head.startswith(b"PK\x03\x04"):
        return "truncated: the end of the archive is missing; download it again"
    if head.startswith(b"\x80") or head[257:262] == b"ustar":
        return "a checkpoint in the format before torch 1.6; load and save it with a current torch, best as safetensors"
    return "not a torch checkpoint (no zip archive)"
