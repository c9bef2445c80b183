"""What every test shares: eight virtual CPU devices, a compilation cache on disk, and the folders of test data.

Not here: numerics (the model sets its own matmul precision) and model building (each test makes what it needs).
"""

import gc
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

# Programs of tests are run once or twice on tiny shapes: what takes long is compiling them well. Before JAX starts; the
# processes that tests start inherit it. The second line is of flags that newer ones do not have.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + (" --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1" * (version("jax") < "0.11")),
)

import jax
import pytest

if TYPE_CHECKING:
    from serving.process import ServerProcess  # needs packages that not every environment of tests has

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent

# Before the first array exists. Sharding tests need several devices; a program on one device is unaffected.
jax.config.update("jax_num_cpu_devices", 8)

# A second run of the suite mostly reads compiled programs back from here; the processes that tests start do, too.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "jax"))
# All programs, small ones too: other processes of the same run need many of them again.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs", float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
)


# What takes long begins first, or one of two processes would wait at the end for the other's last file.
LONGEST = (
    "tests/evaluation/test_command.py",
    "tests/training/test_",
    "tests/test_vlm.py",
    "tests/serving/test_hosts.py",
    "tests/inference/test_engine",
)

# JAX makes many objects when it traces a program, and few of them are garbage: to look for it after every 700 of them,
# as Python does by itself, takes a twentieth of the time.
gc.set_threshold(50_000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


def pytest_collection_finish() -> None:
    """Modules and tests stay until the end; nobody need look for garbage among them."""
    gc.freeze()


def golden_folder() -> Path:
    """The folder of golden values: `QWENVL_GOLDEN`, else tests/golden. A function, for use in parametrize."""
    return Path(os.environ.get("QWENVL_GOLDEN", TESTS / "golden"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden values."""
    return golden_folder()


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of tiny checkpoints, adapters and pictures; the picture paths in its goldens are relative to it."""
    return TESTS / "fixtures"


@pytest.fixture(scope="session")
def server() -> Iterator["ServerProcess"]:
    """The tiny model as serve.py serves it, under two names."""
    from serving.process import REAL, ServerProcess

    names = ("--served-model-name", "tiny", "--served-model-name", "Qwen/Qwen-VL-Chat")
    sizes = ("--slots", "4", "--max-model-len", "1024")  # fewer programs to compile than by default
    with ServerProcess(*names, *sizes, script=REAL) as process:
        yield process


@pytest.fixture(scope="session")
def real_vocabulary() -> Path:
    """Qwen's own `qwen.tiktoken`. Its licence keeps it out of this repository, so a test that needs it may skip."""
    named = os.environ.get("QWENVL_REAL_VOCABULARY")
    if named and not Path(named).is_file():
        pytest.fail(f"QWENVL_REAL_VOCABULARY names {named}, which is not a file")
    path = Path(named) if named else REPOSITORY.parent / "shared" / "golden" / "qwen.tiktoken"
    if not path.is_file():
        pytest.skip("Qwen's vocabulary is not included: set QWENVL_REAL_VOCABULARY to a qwen.tiktoken")
    return path
