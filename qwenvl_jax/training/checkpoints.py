"""Checkpoints of a run: written while it goes on, the last few and the best kept, read back on any mesh."""

from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

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
        self.checkpointer = ocp.training.Checkpointer(
            folder.absolute(),
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        return None if self.checkpointer.latest is None else self.checkpointer.latest.step

    def save(self, state: TrainState, step: int, validation_loss: float | None) -> None:
        """Begins to write the state; the next save, or `close`, waits for its end."""
        if self.latest == step:
            return
        metrics = None if validation_loss is None else {"loss": validation_loss}
        self.checkpointer.save_checkpointables_async(step, _parts(state), force=True, metrics=metrics)

    def load(self, state: TrainState) -> TrainState:
        """The newest state, into the shapes and shardings of `state`."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _parts(state))
        loaded = self.checkpointer.load_checkpointables(self.latest, shapes)
        return TrainState(loaded["optimizer"]["step"], loaded["params"], loaded["optimizer"]["memory"])

    def close(self) -> None:
        """Waits for what is being written."""
        self.checkpointer.close()


def _parts(state: TrainState) -> dict:
    return {"params": state.params, "optimizer": {"memory": state.optimizer, "step": state.step}}
