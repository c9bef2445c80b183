"""The floors of docs/architecture.md: an import may point down or stay on its floor, never up."""

import ast
from pathlib import Path

import pytest

import qwenvl_jax

PACKAGE = Path(qwenvl_jax.__file__).parent
REPOSITORY = Path(__file__).parents[1]

FLOORS = {
    "config": 0, "nn": 0, "sharding": 0, "hosts": 0, "assets": 0, "pages": 0,
    "models": 1, "processing": 1,
    "checkpoints": 2,
    "vlm": 3, "inference": 3, "data": 3,
    "training": 4, "serving": 4, "demo": 4, "evaluation": 4, "convert": 4,
}  # fmt: skip
FRONT_DOOR = 3  # `import qwenvl_jax` and what it offers by name, all but the version


def qwenvl_imports(source: str, module: str) -> list[tuple[int, str]]:
    """(line, first name below `qwenvl_jax`) of every import in a module's source, those inside functions included.

    `module` is the dotted name relative imports are resolved against ("qwenvl_jax.nn.rope"; a package's own
    `__init__` is "qwenvl_jax.nn.__init__"). `import qwenvl_jax` itself yields "".
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [base])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "qwenvl_jax":
                found.append((node.lineno, rest.partition(".")[0]))
    return found


def upward_imports(source: str, module: str, floor: int) -> list[str]:
    return [
        f"{module}:{line} (floor {floor}) imports {name or 'qwenvl_jax'} (floor {FLOORS.get(name, FRONT_DOOR)})"
        for line, name in qwenvl_imports(source, module)
        if name != "__version__" and FLOORS.get(name, FRONT_DOOR) > floor
    ]


def modules() -> list[tuple[Path, str]]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return [(path, ".".join(["qwenvl_jax", *path.relative_to(PACKAGE).with_suffix("").parts])) for path in paths]


def test_no_import_points_up():
    wrong = []
    for path, module in modules():
        part = module.split(".")[1]
        if part != "__init__":  # the front door, which opens onto `vlm`
            wrong += upward_imports(path.read_text(encoding="utf-8"), module, FLOORS[part])
    assert wrong == []


def test_every_module_has_a_floor():
    assert {module.split(".")[1] for _, module in modules()} - {"__init__"} <= set(FLOORS)


def test_the_package_never_imports_a_script():
    scripts = {path.stem for path in REPOSITORY.glob("*.py")} | {"eval", "benchmarks", "tests"}
    for path, module in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not {name.partition(".")[0] for name in names} & scripts, f"{module}:{getattr(node, 'lineno', 0)}"


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from qwenvl_jax.models.qwen_vl import QwenVL", ["models"]),
        ("import qwenvl_jax.training.loop as loop", ["training"]),
        ("from qwenvl_jax import vlm", ["vlm"]),
        ("from ..inference import decode", ["inference"]),
        ("def later():\n    from qwenvl_jax import checkpoints", ["checkpoints"]),
        ("import qwenvl_jax as qv", ["qwenvl_jax"]),
        ("from qwenvl_jax import load", ["load"]),
        ("from qwenvl_jax import __version__", []),
        ("from . import norm", []),
        ("from qwenvl_jax.config import UserError", []),
    ],
)
def test_an_upward_import_is_found(source, wrong):
    """The walk sees every way of writing an import from floor 0."""
    found = upward_imports(source, "qwenvl_jax.nn.rope", FLOORS["nn"])
    assert [line.split(" imports ")[1].split()[0] for line in found] == wrong
