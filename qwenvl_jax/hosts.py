"""The hosts of a cluster: joining them into one program before the first array exists, and stopping them together."""

import dataclasses
import signal

import jax
from jax.experimental import multihost_utils

from qwenvl_jax.config import UserError


@dataclasses.dataclass(frozen=True)
class HostsRecipe:
    """How the processes of a run or a server find each other; the same command runs on every host.

    On TPU pods, under SLURM and under Open MPI `detect` is all that is needed. Elsewhere name the first host's address
    and port, how many hosts there are, and on each host which it is.
    """

    detect: bool = False  # take address, count and index from the cluster's own environment
    coordinator: str | None = None  # "host:port" of the first host
    count: int | None = None
    index: int | None = None  # of this host, from 0

    def __post_init__(self):
        given = [self.coordinator, self.count, self.index]
        if any(value is not None for value in given) and None in given:
            raise UserError("hosts: coordinator, count and index belong together; give all three, or detect alone")
        if self.count is not None and self.index is not None and not 0 <= self.index < self.count:
            raise UserError(f"hosts.index is {self.index}; it must lie in 0..{self.count - 1}")
        if self.coordinator is not None and ":" not in self.coordinator:
            raise UserError(f"hosts.coordinator is {self.coordinator!r}; it must be host:port")


def connect(recipe: HostsRecipe) -> None:
    """Waits for all hosts of the recipe, if it names any, for minutes.

    Raises UserError when there is no cluster to be detected, and when the hosts do not find each other.
    """
    try:
        if recipe.coordinator is not None:
            jax.distributed.initialize(recipe.coordinator, recipe.count, recipe.index)
        elif recipe.detect:
            jax.distributed.initialize()
    except ValueError as error:
        raise UserError(
            f"hosts.detect: no cluster was found here ({error}); give coordinator, count and index"
        ) from None
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"hosts: they have not found each other ({reason}); is the coordinator's port free?") from None


class StopRequest:
    """Whether the machine is being taken away: SIGTERM is noted, and acted upon between two steps."""

    def __enter__(self) -> "StopRequest":
        self.received = False
        self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exception) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def _note(self, *_) -> None:
        self.received = True

    def at(self, step: int) -> bool:
        """Whether to stop after this step; the same on every host."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.received
