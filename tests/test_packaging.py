"""The project as a package: what the wheel holds, what its commands call, and whether it declares what it imports."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCKS = sorted((REPOSITORY / "requirements").glob("py3*.txt"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_whole_package(wheel):
    files = [
        path for path in (REPOSITORY / "qwenvl_jax").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    missing = {path.relative_to(REPOSITORY).as_posix() for path in files} - set(wheel.namelist())
    assert not missing
    assert any(name.startswith("qwenvl_jax/assets/") for name in wheel.namelist())


def test_the_wheel_holds_the_licences_and_nothing_else(wheel):
    others = [name for name in wheel.namelist() if not name.startswith("qwenvl_jax/")]
    assert {Path(name).name for name in others} == {
        "METADATA",
        "WHEEL",
        "RECORD",
        "entry_points.txt",
        "LICENSE",
        "NOTICE",
    }


@pytest.mark.parametrize(("command", "target"), PROJECT["scripts"].items())
def test_a_command_calls_a_function_that_exists(command, target):
    module, _, function = target.partition(":")
    assert callable(getattr(importlib.import_module(module), function)), command


def third_party_imports(folder: Path) -> dict[str, str]:
    """Top-level module name -> one file that imports it, but for the package itself and the standard library."""
    found = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for name in names:
                found[name.partition(".")[0]] = str(path.relative_to(REPOSITORY))
    return {name: path for name, path in found.items() if name not in {"qwenvl_jax", *sys.stdlib_module_names}}


def test_every_import_is_a_declared_dependency():
    used = third_party_imports(REPOSITORY / "qwenvl_jax")
    extras = [line for extra in ("data", "serve", "demo", "eval") for line in PROJECT["optional-dependencies"][extra]]
    declared = {canonicalize_name(Requirement(line).name) for line in [*PROJECT["dependencies"], *extras]}
    distributions = metadata.packages_distributions()
    undeclared = {
        f"{path} imports {module}"
        for module, path in used.items()
        if not {canonicalize_name(name) for name in distributions.get(module, [module])} & declared
    }
    assert not undeclared


def test_every_core_dependency_is_used():
    distributions = metadata.packages_distributions()
    used = {
        canonicalize_name(name)
        for folder in ("qwenvl_jax", "eval")
        for module in third_party_imports(REPOSITORY / folder)
        for name in distributions.get(module, [])
    }
    assert {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]} <= used


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_the_pins_are_complete_and_fit_the_declared_bounds(lock):
    pins = {}
    for line in lock.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[\w.-]+==[\w.]+", line), f"{lock.name}: {line!r} is not NAME==VERSION"
            name, _, version = line.partition("==")
            pins[canonicalize_name(name)] = version
    wanted = [
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"]["data"],
        *PROJECT["optional-dependencies"]["demo"],
        *PROJECT["optional-dependencies"]["dev"],
        *PROJECT["optional-dependencies"]["eval"],
        *PROJECT["optional-dependencies"]["serve"],
    ]
    for requirement in map(Requirement, wanted):
        if requirement.name == "qwenvl-jax":  # an extra that takes in another
            continue
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_no_file_names_a_machine_path():
    """The README's commands work elsewhere: no absolute home or work folder in code, docs and recipes."""
    pattern = re.compile(r"(?<![\w.])/(home|root|work|Users)/\w")
    folders = ("qwenvl_jax", "configs", "docs", "eval", "examples", "benchmarks", ".ci", "requirements")
    paths = [path for folder in folders for path in (REPOSITORY / folder).rglob("*")] + list(REPOSITORY.glob("*.*"))
    wrong = []
    for path in [*paths, REPOSITORY / "Makefile"]:
        if path.is_file() and path.suffix in {".py", ".md", ".toml", ".yaml", ".sbatch", ".txt", ""}:
            lines = path.read_text(encoding="utf-8").splitlines()
            wrong += [f"{path.relative_to(REPOSITORY)}:{n}" for n, line in enumerate(lines, 1) if pattern.search(line)]
    assert not wrong
