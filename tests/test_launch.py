"""The files in examples/ and the commands of docs/launch.md: they parse, and train.py takes their flags."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qwenvl_jax.training.recipe import Recipe, parse_arguments, parse_plan

REPOSITORY = Path(__file__).parents[1]
SLURM = REPOSITORY / "examples" / "slurm.sbatch"
JOBSET = REPOSITORY / "examples" / "gke-jobset.yaml"


def recipe_of(command: list[str]) -> Recipe:
    """The recipe that a command line with train.py in it means."""
    arguments = command[command.index("train.py") + 1 :]
    return parse_arguments(parse_plan(arguments)[0])


def shell_commands(text: str) -> list[list[str]]:
    """The words of every call of train.py in a shell script, without comments and redirections."""
    lines = text.replace("\\\n", " ").splitlines()
    calls = [re.search(r"^[^#]*?(train\.py [^#>&\"]*)", line) for line in lines]
    return [shlex.split(call[1]) for call in calls if call]


def test_the_slurm_script():
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    (command,) = shell_commands(SLURM.read_text())
    recipe = recipe_of(command)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", SLURM.read_text(), re.MULTILINE))
    gpus = int(options["gpus-per-node"])
    assert recipe.hosts.detect
    assert options["ntasks-per-node"] == "1"  # so each must be told that all GPUs are its own
    assert f"JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(gpus)))}\n" in SLURM.read_text()
    assert recipe.batch_size // recipe.accumulate == int(options["nodes"]) * gpus


def test_the_jobset():
    document = yaml.safe_load(JOBSET.read_text())
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert all(isinstance(word, str) for word in container["args"])
    recipe = recipe_of(container["command"] + container["args"])
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert (
        job["parallelism"] == job["completions"] == rows * columns / container["resources"]["limits"]["google.com/tpu"]
    )
    assert recipe.hosts.detect
    assert recipe.batch_size // recipe.accumulate == rows * columns
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("page", ["launch.md", "memory.md"])
def test_the_commands_of_a_page(page):
    blocks = re.findall(r"```sh\n(.*?)```", (REPOSITORY / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    commands = shell_commands("\n".join(blocks))
    assert commands
    for command in commands:
        recipe_of(command)


DETECT = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
from qwenvl_jax.hosts import HostsRecipe, connect
connect(HostsRecipe(detect=True))
print(jax.process_index(), jax.process_count(), jax.device_count())
"""


def test_hosts_are_detected_from_the_variables_of_slurm():
    """Two processes of one machine find each other by what SLURM would tell them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    slurm |= {"JAX_COORDINATOR_PORT": port, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", DETECT],
            env=os.environ | slurm | {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)},
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert said == ["0 2 4\n", "1 2 4\n"]
