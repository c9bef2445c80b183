"""The reader of torch checkpoints: what it reads, and what it refuses. The archives are put together by hand here."""

import io
import pickle
import struct
import subprocess
import sys
import tracemalloc
import types
import zipfile
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenvl_jax.checkpoints.torch_pickle import TorchFile
from qwenvl_jax.config import UserError

# Instructions of the pickle machine, as torch writes them.


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def named(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def together(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def tensor(key="0", kind="FloatStorage", size=6, offset=0, shape=(2, 3), strides=(3, 1)) -> bytes:
    storage = together(text("storage"), named("torch", kind), text(key), text("cpu"), integer(size)) + b"Q"
    no_hooks = named("collections", "OrderedDict") + b")R"
    sizes = (together(*map(integer, values)) for values in (shape, strides))
    return (
        named("torch._utils", "_rebuild_tensor_v2")
        + together(storage, integer(offset), *sizes, b"\x89", no_hooks)
        + b"R"
    )


def dictionary(**entries: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u."


def write(path: Path, description: bytes, storages: dict[str, bytes], order: str | None = "little") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", description)
        if order is not None:
            archive.writestr("archive/byteorder", order)
        for key, values in storages.items():
            archive.writestr(f"archive/data/{key}", values)
    return path


SIX = np.arange(6, dtype=np.float32)


def test_reads_a_tensor(tmp_path):
    file = TorchFile(write(tmp_path / "a.bin", dictionary(weight=tensor()), {"0": SIX.tobytes()}))
    assert file.names() == ["weight"]
    assert file.describe("weight") == ((2, 3), np.float32)
    np.testing.assert_array_equal(file.read("weight"), SIX.reshape(2, 3))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("DoubleStorage", np.float64),
        ("FloatStorage", np.float32),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", ml_dtypes.bfloat16),
        ("LongStorage", np.int64),
        ("IntStorage", np.int32),
        ("ShortStorage", np.int16),
        ("CharStorage", np.int8),
        ("ByteStorage", np.uint8),
        ("BoolStorage", np.bool_),
    ],
)
@pytest.mark.parametrize("order", ["little", "big", None])
def test_reads_every_type_in_both_byte_orders(tmp_path, kind, dtype, order):
    values = np.asarray([0, 1, 1, 0, 1, 0], dtype) if kind == "BoolStorage" else np.asarray([1, 2, 3, 4, 5, 100], dtype)
    raw = values.tobytes()
    if order == "big":
        raw = values.view(f"u{values.itemsize}").byteswap().tobytes()
    file = TorchFile(write(tmp_path / "a.bin", dictionary(x=tensor(kind=kind)), {"0": raw}, order))
    assert file.read("x").dtype == dtype
    np.testing.assert_array_equal(file.read("x"), values.reshape(2, 3))


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "expected"),
    [
        ((3, 2), (1, 3), 0, SIX.reshape(2, 3).T),
        ((2,), (3,), 2, SIX[[2, 5]]),
        ((2, 2), (1, 2), 1, [[1, 3], [2, 4]]),
        ((), (), 5, 5.0),
        ((0, 4), (4, 1), 0, np.zeros((0, 4))),
        ((6,), (1,), 0, SIX),
    ],
)
def test_honours_strides_and_offsets(tmp_path, shape, strides, offset, expected):
    description = dictionary(x=tensor(shape=shape, strides=strides, offset=offset))
    values = TorchFile(write(tmp_path / "a.bin", description, {"0": SIX.tobytes()})).read("x")
    assert values.shape == shape
    np.testing.assert_array_equal(values, expected)


def test_tensors_may_share_a_storage_and_be_parameters(tmp_path):
    shared = tensor(shape=(3,), strides=(1,), offset=3)
    parameter = named("torch._utils", "_rebuild_parameter")
    parameter += together(tensor(), b"\x88", named("collections", "OrderedDict") + b")R") + b"R"
    file = TorchFile(write(tmp_path / "a.bin", dictionary(a=shared, b=parameter), {"0": SIX.tobytes()}))
    np.testing.assert_array_equal(file.read("a"), [3, 4, 5])
    np.testing.assert_array_equal(file.read("b"), SIX.reshape(2, 3))


def test_a_state_dict_is_an_ordered_dictionary_with_attributes(tmp_path):
    """`module.state_dict()`: an OrderedDict filled item by item, with `_metadata` hung on it."""
    entries = b"(" + text("x") + tensor() + b"u"
    metadata = b"}(" + text("_metadata") + named("collections", "OrderedDict") + b")Ru"
    description = b"\x80\x02" + named("collections", "OrderedDict") + b")R" + entries + metadata + b"b."
    assert TorchFile(write(tmp_path / "a.bin", description, {"0": SIX.tobytes()})).names() == ["x"]


@pytest.mark.parametrize("protocol", range(2, 6))
def test_reads_every_protocol_of_pickle(tmp_path, monkeypatch, protocol):
    """As torch does it: Python's own pickler, storages by persistent id. The pickler looks up the stand-ins."""
    storage_type = type("FloatStorage", (), {"__module__": "torch"})
    rebuild = type("_rebuild_tensor_v2", (), {"__module__": "torch._utils"})
    for module, member in (("torch", storage_type), ("torch._utils", rebuild)):
        stand_in = types.ModuleType(module)
        setattr(stand_in, member.__name__, member)
        monkeypatch.setitem(sys.modules, module, stand_in)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", storage_type, "0", "cpu", 6) if isinstance(value, storage_type) else None

        def reducer_override(self, value):
            if not isinstance(value, Fraction):
                return NotImplemented
            return rebuild, (storage_type(), 0, (2, 3), (3, 1), False, OrderedDict())

    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump({"weight": Fraction(1), "long name " * 40: Fraction(2)})
    file = TorchFile(write(tmp_path / "a.bin", buffer.getvalue(), {"0": SIX.tobytes()}))
    np.testing.assert_array_equal(file.read("weight"), SIX.reshape(2, 3))


class Evil:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def evil_calls(marker: Path) -> dict[str, Evil]:
    import operator
    import os
    import runpy

    command = f"touch {marker}"
    return {
        "posix.system": Evil(os.system, command),
        "builtins.eval": Evil(eval, f"open({str(marker)!r}, 'w')"),
        "builtins.exec": Evil(exec, f"open({str(marker)!r}, 'w')"),
        "builtins.getattr": Evil(getattr, Evil(__import__, "os"), "system"),
        "io.open": Evil(open, str(marker), "w"),
        "operator.attrgetter": Evil(operator.attrgetter("system"), Evil(__import__, "os")),
        "subprocess.Popen": Evil(subprocess.Popen, ["touch", str(marker)]),
        "runpy._run_code": Evil(runpy._run_code, command, {}),
    }


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", evil_calls(Path()))
def test_refuses_every_other_global_by_name(tmp_path, name, protocol):
    marker = tmp_path / "ran"
    description = pickle.dumps({"weight": evil_calls(marker)[name]}, protocol, fix_imports=False)
    with pytest.raises(UserError) as caught:
        TorchFile(write(tmp_path / "evil.bin", description, {}))
    assert name in str(caught.value)
    assert "evil.bin" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("collections", "OrderedDict.fromkeys"),
        ("collections", "Counter"),
        ("torch", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch._utils", "_rebuild_device_tensor_from_numpy"),
        ("copyreg", "_reconstructor"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("torch FloatStorage", ""),
    ],
)
def test_refuses_neighbours_of_the_admitted_names(tmp_path, module, name):
    by_instruction = dictionary(x=named(module, name))
    on_the_stack = b"\x80\x04}(" + text("x") + text(module) + text(name) + b"\x93u."
    for description in (by_instruction, on_the_stack):
        with pytest.raises(UserError, match="refused"):
            TorchFile(write(tmp_path / "a.bin", description, {}))


@pytest.mark.parametrize(
    "change",
    [
        {"offset": 1},
        {"offset": -1},
        {"shape": (3, 3)},
        {"shape": (-2, -3)},
        {"strides": (4, 1)},
        {"strides": (-3, 1)},
        {"strides": (3,)},
        {"shape": (10**6, 10**6), "strides": (0, 0)},
        {"shape": (2**62, 4), "strides": (0, 0)},
        {"shape": (2**80,), "strides": (1,)},
        {"strides": (2**61, 2**61)},
        {"shape": (1,) * 100, "strides": (1,) * 100},
        {"size": 7},
        {"size": -1},
        {"size": 2**61},
        {"key": "1"},
        {"key": "../data.pkl"},
        {"kind": "DoubleStorage"},
    ],
)
def test_refuses_tensors_that_reach_outside_their_storage(tmp_path, change):
    with pytest.raises(UserError, match=r"a\.bin: "):
        TorchFile(write(tmp_path / "a.bin", dictionary(x=tensor(**change)), {"0": SIX.tobytes()}))


@pytest.mark.parametrize(
    ("description", "said"),
    [
        (b"\x80\x02" + text("hello") + b".", "holds a str"),
        (dictionary(epoch=integer(3)), "'epoch' is a int"),
        (dictionary(model=b"}(" + text("x") + tensor() + b"u"), "'model' is a dict"),
        (b"\x80\x02}(" + integer(1) + tensor() + b"u.", "not a name"),
        (b"\x80\x02}(" + text("x"), "not a checkpoint that can be read"),
        (b"", "not a checkpoint that can be read"),
        (dictionary(x=named("collections", "OrderedDict") + together(integer(1)) + b"R"), "OrderedDict with 1"),
        (dictionary(x=text("torch") + b")R"), "not a function"),
        (dictionary(x=text("no storage") + b"Q"), "not to a storage"),
        (dictionary(x=b"h\x05"), "KeyError"),
        # Each of the next would take hours or gigabytes in Python's own unpickler or in a careless message.
        (dictionary(x=b")" + b"\x86".join([b"q\x00h\x00"] * 60) + b"\x86Q"), "not to a storage"),
        (dictionary(x=text("x") + b"r\xff\xff\xff\xff"), "'x' is a str"),
        (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x0f.", "not a checkpoint that can be read"),
    ],
)
def test_refuses_what_is_not_a_dictionary_of_tensors(tmp_path, description, said):
    with pytest.raises(UserError, match=said):
        TorchFile(write(tmp_path / "a.bin", description, {"0": SIX.tobytes()}))


def test_names_what_is_no_archive(tmp_path):
    good = write(tmp_path / "good.bin", dictionary(x=tensor()), {"0": SIX.tobytes()}).read_bytes()
    cases = {
        "truncated": good[:-30],
        "before torch 1.6": pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + b"rest",
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "no zip archive": b"<html>Not found</html>",
    }
    for said, content in cases.items():
        (tmp_path / "bad.bin").write_bytes(content)
        with pytest.raises(UserError, match=said):
            TorchFile(tmp_path / "bad.bin")
    with pytest.raises(UserError, match="no such file"):
        TorchFile(tmp_path / "absent.bin")


def test_refuses_compressed_entries(tmp_path):
    """Torch stores; a compressed entry of a few bytes could unfold to gigabytes."""
    for compressed in ("data.pkl", "byteorder", "data/0"):
        with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
            for name, content in {
                "data.pkl": dictionary(x=tensor()),
                "byteorder": b"little",
                "data/0": SIX.tobytes(),
            }.items():
                kind = zipfile.ZIP_DEFLATED if name == compressed else zipfile.ZIP_STORED
                archive.writestr(f"a/{name}", content, compress_type=kind)
        with pytest.raises(UserError):
            TorchFile(tmp_path / "a.bin")


def test_reads_only_what_is_asked_for(tmp_path):
    size = 4_000_000
    description = dictionary(**{f"t{i}": tensor(str(i), size=size, shape=(size,), strides=(1,)) for i in range(4)})
    path = write(tmp_path / "a.bin", description, {str(i): bytes(4 * size) for i in range(4)})
    tracemalloc.start()
    file = TorchFile(path)
    opened = tracemalloc.get_traced_memory()[1]
    file.read("t2")
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert opened < 1_000_000
    assert read < 4 * size + 1_000_000


ADAPTER = Path(__file__).parents[1] / "fixtures" / "lora-adapter" / "adapter_model.bin"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4),
    st.sampled_from(["pickle", "directory", "anywhere"]),
    st.none() | st.floats(0, 1),
)
def test_a_damaged_file_is_a_user_error_or_is_read(tmp_path, changes, where, cut):
    """Whatever bytes change: one clear error, or tensors of the shapes that they claim; never anything else."""
    data = bytearray(ADAPTER.read_bytes())
    first, last = {"pickle": (50, 3000), "directory": (len(data) - 2500, len(data)), "anywhere": (0, len(data))}[where]
    for position, value in changes:
        data[first + int(position * (last - first - 1))] = value
    path = tmp_path / "damaged.bin"
    path.write_bytes(data if cut is None else data[: int(cut * len(data))])
    try:
        file = TorchFile(path)
        for name in file.names():
            assert file.read(name).shape == file.describe(name)[0]
    except UserError as error:
        assert "damaged.bin" in str(error)  # noqa: PT017 (an error is only one of two good outcomes)
