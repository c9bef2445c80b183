"""Run twice by test_processes.py: loads, saves and loads again with the devices of two processes in one mesh."""

import sys
from pathlib import Path

import jax

address, process, source, target = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(address, num_processes=2, process_id=int(process))

from qwenvl_jax.checkpoints import huggingface, orbax  # noqa: E402 (after the processes have met)
from qwenvl_jax.checkpoints.folder import small_files  # noqa: E402
from qwenvl_jax.sharding import make_mesh, param_paths, preset_rules  # noqa: E402

assert jax.device_count() == 4
mesh, rules = make_mesh("fsdp"), preset_rules("fsdp")
model = huggingface.load_model(source, mesh=mesh, rules=rules, stacked=True)
assert not model.layers.qkv.kernel[...].is_fully_addressable
huggingface.save_model(model, Path(target) / "safetensors", **small_files(Path(source)), shard_bytes=900_000)
orbax.save_model(model, Path(target) / "orbax", **small_files(Path(source)))
jax.experimental.multihost_utils.sync_global_devices("saved")
same = jax.jit(lambda a, b: jax.numpy.all(a == b))
for form in ("safetensors", "orbax"):
    again = huggingface.load_model(Path(target) / form, mesh=mesh, rules=rules, stacked=True)
    for path, leaf in param_paths(again).items():
        assert same(leaf, param_paths(model)[path]), path
print("done")
