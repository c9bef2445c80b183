"""Checkpoints of a run: written while it goes on, the last few and the best kept, read back on any mesh."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from qwenvl_jax.config import UserError
from qwenvl_jax.training.step import TrainState

policies = ocp.training.preservation_policies


class Checkpoints:
    """Orbax checkpoints of a run: parameters and optimizer apart, so that the first can be read alone.

    The newest `keep` stay, and the one with the lowest validation loss of those that were examined.
    """

    def __init__(self, folder: Path, keep: int):
        best = policies.BestN(
            get_metric_fn=lambda m: m["loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        self.folder = folder.absolute()
        self.checkpointer = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        return None if self.checkpointer.latest is None else self.checkpointer.latest.step

    def save(self, state: TrainState, step: int, validation_loss: float | None) -> None:
        """Begins to write the state; the next save, or `close`, waits for its end, and tells if it failed."""
        if self.latest == step:
            return
        metrics = None if validation_loss is None else {"loss": validation_loss}
        save = self.checkpointer.save_checkpointables_async
        self._write(lambda: save(step, _parts(state), force=True, metrics=metrics))

    def load(self, state: TrainState) -> TrainState:
        """The newest state, into the shapes and shardings of `state`. Raises UserError where it cannot be read."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _parts(state))
        try:
            loaded = self.checkpointer.load_checkpointables(self.latest, shapes)
        except Exception as error:  # whatever a damaged folder provokes in Orbax and TensorStore
            folder = self.folder / str(self.latest)
            raise UserError(
                f"{folder}: damaged or incomplete ({cause(error)}); copy it again, or remove it, and the same command "
                "goes on from the checkpoint before it"
            ) from None
        return TrainState(loaded["optimizer"]["step"], loaded["params"], loaded["optimizer"]["memory"])

    def close(self) -> None:
        """Waits for what is being written."""
        self._write(self.checkpointer.close)

    def _write(self, work: Callable[[], Any]) -> None:
        """Does what may find that a checkpoint could not be written."""
        try:
            work()
        except Exception as error:  # Orbax passes on what the file system says in several types
            raise UserError(
                f"{self.folder}: a checkpoint could not be written ({cause(error)}); those before it are whole: make "
                "room, and the same command goes on from the newest"
            ) from None


def cause(error: BaseException) -> str:
    """The innermost reason of an error of Orbax's, which names the file, in one line."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return " ".join(str(error).split())[:500] or type(error).__name__


def _parts(state: TrainState) -> dict:
    return {"params": state.params, "optimizer": {"memory": state.optimizer, "step": state.step}}
