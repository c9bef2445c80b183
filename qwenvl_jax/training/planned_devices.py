"""Devices to plan for: what memory they have, and stand-ins that the compiler takes for them."""

import dataclasses
import difflib
import importlib.util
import os

import jax

from qwenvl_jax.config import UserError


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A device: GiB that its driver or, on TPUs, its compiler offers, and its name for the TPU compiler."""

    memory: float
    tpu: str | None = None

    @property
    def usable(self) -> float:
        """GiB for a program: GPUs need some for the driver, for NCCL, and for gaps between arrays."""
        return self.memory if self.tpu else 0.95 * self.memory


HARDWARE = {
    "rtx4090": Hardware(24.0),
    "a100-40g": Hardware(40.0),
    "a100-80g": Hardware(80.0),
    "h100": Hardware(79.6),
    "h200": Hardware(140.4),
    "v5e": Hardware(15.75, tpu="v5e"),
    "v6e": Hardware(31.25, tpu="v6e"),
    "v5p": Hardware(95.74, tpu="v5p"),
}
STAND_IN = "v5p"  # whose compiler answers for GPUs
# So that libtpu looks for no machine, and leaves one that it is on to those who use it.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class PlanRecipe:
    """What to plan for."""

    devices: int = 1
    device: str = "h100"  # rtx4090, a100-40g, a100-80g, h100, h200, v5e, v6e, v5p, or a number of GiB
    pictures: float = 1.0  # in a row of records, on average

    def __post_init__(self):
        if self.devices < 1:
            raise UserError(f"plan.devices is {self.devices}; it must be at least 1")
        if self.pictures < 0:
            raise UserError(f"plan.pictures is {self.pictures}; it must be 0 or more")
        _ = self.hardware

    @property
    def hardware(self) -> Hardware:
        if self.device in HARDWARE:
            return HARDWARE[self.device]
        try:
            return Hardware(float(self.device))
        except ValueError:
            near = difflib.get_close_matches(self.device, HARDWARE)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(HARDWARE)}, or give a number of GiB"
            raise UserError(f"plan.device is {self.device!r}; {hint}") from None


def planned_devices(options: PlanRecipe) -> tuple[list[jax.Device], str]:
    """Devices that need not be there, to compile for, and the name of the compiler.

    Where `libtpu` is installed, TPUs; else, and for what is no power of two, CPU devices, of which JAX must have as
    many (`start_without_machines`).
    """
    is_slice = options.devices & (options.devices - 1) == 0  # slices of TPUs have a power of two
    if importlib.util.find_spec("libtpu") is None or not is_slice:
        devices = jax.devices("cpu")
        if len(devices) < options.devices:
            raise UserError(f"plan: JAX was started with {len(devices)} CPU devices, not {options.devices}")
        return devices[: options.devices], "the compiler for CPUs, whose activations are larger than others'"
    from jax.experimental import topologies

    kind = options.hardware.tpu or STAND_IN
    name = f"{kind}:{'x'.join(map(str, topology(options.devices, 3 if kind == 'v5p' else 2)))}"
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if options.devices < 4 else {}
    for variable, value in LIBTPU.items():
        os.environ.setdefault(variable, value)
    found = topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds)
    return list(found.devices), f"the compiler for TPU {kind}" + (
        "" if options.hardware.tpu else ", in place of a GPU's"
    )


def topology(count: int, dimensions: int) -> tuple[int, ...]:
    """Chips along each side of a slice of `count`, a power of two: (4, 2) for 8, (2, 2, 2) in three dimensions."""
    power = count.bit_length() - 1
    return tuple(2 ** ((power + i) // dimensions) for i in reversed(range(dimensions)))


def start_without_machines(count: int) -> None:
    """Gives JAX, before its first use, `count` CPU devices and nothing else, even where there is an accelerator."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
