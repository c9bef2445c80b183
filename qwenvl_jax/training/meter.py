"""What the steps between two rows of the log have done and how fast: the numbers of a row, and whether they are any.

A step's metrics are scalars by name, whichever they are. They stay on the device until a row is made of them, so that
the host never waits for a single step.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.training.flops import StepCost

Scalars = dict[str, jax.Array]
GIB = 2**30
WORK = ("pairs", "encoded", "places", "picture_places")  # counts that make up others, and are in no row


@partial(jax.jit, static_argnames=("queries", "words"))
def count(batches: dict[str, jax.Array], *, queries: int, words: bool = True) -> Scalars:
    """What a step of these batches (as of `make_train_step`) sees, over all hosts, as float32 scalars.

    tokens that are not padding, of so many `places`; `pairs` of a token and one that it attends to; pictures of so many
    `picture_places`, and how many of them are `encoded`. words: whether the language model reads the tokens; 0 if not.
    """
    real = (batches["group"] > 0) & words
    pictures = jnp.sum(batches["slots"] >= 0, dtype=jnp.float32) / queries
    shown = batches.get("pixels", batches.get("features"))
    return {
        "tokens": jnp.sum(real, dtype=jnp.float32),
        "places": jnp.float32(real.size * words),
        # A token's position is the number of those before it in its own record or branch.
        "pairs": jnp.sum(jnp.where(real, batches["positions"] + 1, 0), dtype=jnp.float32),
        "pictures": pictures,
        "picture_places": jnp.float32(0 if shown is None else shown.shape[0] * shown.shape[1]),
        "encoded": pictures * ("pixels" in batches),
    }


class Meter:
    """Collects the steps of one row after another. peak: FLOP/s of all devices together, None where it is not known."""

    def __init__(self, cost: StepCost, peak: float | None):
        self.cost, self.peak = cost, peak
        self.restart()

    def restart(self) -> None:
        """Begins a new row now."""
        self.metrics: list[Scalars] = []
        self.waited = 0.0
        self.began = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For what is no part of training: it takes no time."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def add(self, metrics: Scalars, waited: float) -> None:
        """One more step, which has waited so many seconds for its data."""
        self.metrics.append(metrics)
        self.waited += waited

    def check(self, number: int, where: Callable[[int], list[str]], saved: int | None) -> None:
        """Raises FloatingPointError if loss or gradient of a step up to `number` is no number, naming what it saw.

        saved: the newest checkpoint, which is from before.
        """
        for step, metrics in enumerate(self.metrics, number - len(self.metrics) + 1):
            for name, what in (("loss", "loss"), ("gradient_norm", "gradient")):
                if name in metrics and not np.isfinite(metrics[name]):
                    seen = ", ".join(where(step)[:20])
                    kept = "no checkpoint was saved" if saved is None else f"the last checkpoint is of step {saved}"
                    value = float(metrics[name])
                    raise FloatingPointError(f"the {what} of step {step} is {value}; it was made from {seen}; {kept}")

    def row(self) -> dict[str, float]:
        """Means over the steps of this row, speeds, padding, waits and memory; then begins the next."""
        steps = len(self.metrics)
        means = {name: float(np.mean([m[name] for m in self.metrics])) for name in self.metrics[0]}  # waits for them
        seconds = (time.perf_counter() - self.began) / steps
        row = {name: value for name, value in means.items() if name not in WORK}
        row |= {"seconds_per_step": seconds, "data_wait": self.waited / steps}
        row["data_wait_share"] = row["data_wait"] / seconds
        speeds = [name for name in ("tokens", "pictures", "target_tokens") if name in row]
        row |= {f"{name}_per_second": row[name] / seconds for name in speeds}
        for prefix, things, places in (("", "tokens", "places"), ("picture_", "pictures", "picture_places")):
            if means[places]:
                row[f"{prefix}padding"] = 1 - means[things] / means[places]
        if self.peak:
            targets = means.get("target_tokens", 0.0)
            work = self.cost.flops(means["tokens"], means["pairs"], targets, means["encoded"])
            row["mfu"] = work / seconds / self.peak
        self.restart()
        return row | device_memory()


def device_memory() -> dict[str, float]:
    """GiB in use and at most in use on the fullest device of this host; nothing where the backend does not tell."""
    told = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    names = {"memory": "bytes_in_use", "memory_peak": "peak_bytes_in_use"}
    return {name: max(stats[key] for stats in told) / GIB for name, key in names.items() if told and key in told[0]}
