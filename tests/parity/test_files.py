"""Checkpoint files: torch writes and we read without it, we write and torch reads."""

import collections

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from parity.reference import original_tensors, random_model, tensor, tiny_config
from torch import nn

from qwenvl_jax.checkpoints.huggingface import load_model, save_model
from qwenvl_jax.checkpoints.tensor_files import SafetensorsFile, write_safetensors
from qwenvl_jax.checkpoints.torch_pickle import TorchFile
from qwenvl_jax.config import UserError

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def values(*shape, dtype=torch.float32, seed=0):
    random = torch.tensor(100 * np.random.default_rng(seed).standard_normal(shape))
    return random > 0 if dtype == torch.bool else random.to(dtype)


def as_numpy(value: torch.Tensor) -> np.ndarray:
    value = value.detach().contiguous()
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def same_bits(ours: np.ndarray, theirs: torch.Tensor) -> bool:
    expected = as_numpy(theirs)
    return ours.dtype == expected.dtype and ours.shape == expected.shape and ours.tobytes() == expected.tobytes()


def written_by_torch(folder, state, **options) -> TorchFile:
    torch.save(state, folder / "pytorch_model.bin", **options)
    return TorchFile(folder / "pytorch_model.bin")


def check(file: TorchFile, state) -> None:
    assert file.names() == list(state)
    for name, value in state.items():
        assert file.describe(name)[0] == tuple(value.shape)
        assert same_bits(file.read(name), value), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4, 5), (0,), (3, 0, 2)], ids=str)
def test_dtypes_and_shapes(tmp_path, dtype, shape):
    state = {"weight": values(*shape, dtype=dtype), "other": values(2, dtype=dtype, seed=1)}
    check(written_by_torch(tmp_path, state), state)


def test_views_and_shared_storages(tmp_path):
    base = values(6, 8)
    image = values(2, 3, 4, 4).to(memory_format=torch.channels_last)
    state = {
        "base": base,
        "transposed": base.T,
        "column": base[:, 3],
        "block": base[2:5, 1:7:2],
        "last": base[-1, -1],
        "same": base,
        "permuted": values(2, 3, 4).permute(2, 0, 1),
        "channels_last": image,
        "narrow": values(1000, dtype=torch.bfloat16)[500:504],
    }
    check(written_by_torch(tmp_path, state), state)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(tmp_path, protocol):
    state = collections.OrderedDict(weight=values(3, 4), bias=values(3, dtype=torch.float16))
    check(written_by_torch(tmp_path, state, pickle_protocol=protocol), state)


def test_many_tensors(tmp_path):
    """More names than the one-byte memo of a pickle holds."""
    state = {f"layers.{i}.weight": values(2, 3, seed=i) for i in range(400)}
    check(written_by_torch(tmp_path, state), state)


def test_state_dict_of_a_module(tmp_path):
    """With the metadata that torch hangs on it, parameters and buffers, and weights that two layers share."""
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Embedding(5, 4))
    module.append(nn.Linear(4, 5, bias=False))
    module[3].weight = module[2].weight
    state = module.state_dict()
    check(written_by_torch(tmp_path, state), state)
    parameters = dict(module.named_parameters())
    check(written_by_torch(tmp_path, parameters), parameters)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (nn.Linear(2, 2), "torch.nn.modules.linear"),
        ({"weight": torch.zeros(2, dtype=torch.complex64)}, "ComplexFloatStorage"),
        ({"weight": torch.ones(2).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"weight": torch.ones(2), "step": torch.Generator}, "Generator"),
    ],
    ids=["module", "complex", "sparse", "class"],
)
def test_anything_else_is_refused_by_name(tmp_path, content, named):
    with pytest.raises(UserError, match=named):
        written_by_torch(tmp_path, content)


def test_other_contents_are_refused(tmp_path):
    for content in ([torch.ones(2)], {"weight": torch.ones(2), "epoch": 3}, {"model": {"weight": torch.ones(2)}}):
        with pytest.raises(UserError):
            written_by_torch(tmp_path, content)


def test_the_format_before_torch_1_6_is_named(tmp_path):
    with pytest.raises(UserError, match=r"before torch 1\.6"):
        written_by_torch(tmp_path, {"weight": torch.ones(2)}, _use_new_zipfile_serialization=False)


def test_safetensors_that_we_write(tmp_path):
    """Torch reads the same names, dtypes, shapes and bits."""
    state = {str(dtype): values(3, 4, dtype=dtype) for dtype in DTYPES} | {"scalar": values(), "empty": values(0, 3)}
    arrays = {name: as_numpy(value) for name, value in state.items()}
    described = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    write_safetensors(tmp_path / "model.safetensors", described, arrays.values())
    read = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert set(read) == set(state)
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in state.items())


def test_safetensors_that_torch_writes(tmp_path):
    state = {str(dtype): values(3, 4, dtype=dtype) for dtype in DTYPES}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    file = SafetensorsFile(tmp_path / "model.safetensors")
    assert all(same_bits(file.read(name), value) for name, value in state.items())


@pytest.mark.parametrize("stacked", [True, False])
def test_a_checkpoint_goes_from_us_to_torch_and_back(tmp_path, stacked):
    """A folder that we save, read and written anew by torch as `.bin`, loads to the same bits."""
    model = random_model(tiny_config())
    save_model(model, tmp_path / "ours", shard_bytes=300_000)
    state = {}
    for path in sorted((tmp_path / "ours").glob("*.safetensors")):
        state |= safetensors.torch.load_file(path)
    original = original_tensors(model)
    assert set(state) == set(original)
    assert all(torch.equal(state[name], tensor(value)) for name, value in original.items())

    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_bytes((tmp_path / "ours" / "config.json").read_bytes())
    torch.save({name: value.bfloat16() for name, value in state.items()}, theirs / "pytorch_model.bin")
    loaded = load_model(theirs, stacked=stacked)
    expected = {name: value.bfloat16() for name, value in state.items()}
    if stacked:
        assert all(same_bits(value, expected[name]) for name, value in original_tensors(loaded).items())
    else:
        assert same_bits(np.asarray(loaded.layers[1].up.kernel[...]).T, expected["transformer.h.1.mlp.w1.weight"])
