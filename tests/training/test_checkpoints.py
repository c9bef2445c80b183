"""Checkpoints of a run when things go wrong: a full disk, a damaged file; and that the best one stays."""

import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.config import UserError
from qwenvl_jax.training.checkpoints import Checkpoints
from qwenvl_jax.training.step import TrainState


def state(step: int) -> TrainState:
    value = jax.random.normal(jax.random.key(step), (200, 500))
    return TrainState(jnp.asarray(step), {"model.a": value}, {"mean": jnp.zeros((200, 500))})


def saved(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.isdigit())


def save(folder, *steps: int, losses: tuple[float | None, ...] = (), keep: int = 2) -> None:
    checkpoints = Checkpoints(folder, keep)
    for step, loss in zip(steps, losses or (None,) * len(steps), strict=True):
        checkpoints.save(state(step), step, loss)
    checkpoints.close()


def assert_goes_on_from(folder, step: int) -> None:
    checkpoints = Checkpoints(folder, 2)
    assert checkpoints.latest == step
    np.testing.assert_array_equal(checkpoints.load(state(0)).params["model.a"], state(step).params["model.a"])
    checkpoints.close()


def test_a_full_disk_loses_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match=f"{tmp_path}: a checkpoint could not be written .*too large.*make room"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert saved(tmp_path) == ["1"]
    assert_goes_on_from(tmp_path, 1)
    save(tmp_path, 2)
    assert_goes_on_from(tmp_path, 2)


def test_a_damaged_checkpoint_is_named_and_kept(tmp_path):
    save(tmp_path, 1, 2)
    largest = max((tmp_path / "2" / "params").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    largest.write_bytes(largest.read_bytes()[:1000])
    checkpoints = Checkpoints(tmp_path, 2)
    with pytest.raises(UserError, match=f"{tmp_path / '2'}: damaged or incomplete .*2/params.*remove it") as caught:
        checkpoints.load(state(0))
    checkpoints.close()
    assert "\n" not in str(caught.value)
    assert saved(tmp_path) == ["1", "2"]
    (tmp_path / "2").rename(tmp_path / "damaged")
    assert_goes_on_from(tmp_path, 1)


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path):
    save(tmp_path, 1, 2, 3, 4, losses=(0.5, 0.3, 0.4, 0.6), keep=1)
    assert saved(tmp_path) == ["2", "4"]
