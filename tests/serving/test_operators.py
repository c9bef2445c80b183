"""docs/operations.md and what operators take from examples/: tables and queries agree with the program."""

import argparse
import ast
import importlib.util
import json
import re
import subprocess
import sys

import pytest
import yaml
from processes import REPOSITORY

from qwenvl_jax.serving import cli

PAGE = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
EXAMPLES = REPOSITORY / "examples"


def table(heading: str) -> str:
    """The rows of the first table under a heading."""
    return re.search(rf"^## {heading}\n.*?\n\|---[^\n]*\n((?:\|[^\n]*\n)+)", PAGE, re.DOTALL | re.MULTILINE)[1]


def value_of(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    return " / ".join(action.choices) if action.choices else action.metavar or action.dest.upper()


def test_the_table_of_flags_is_the_parsers():
    actions = [action for action in cli.parser()._actions if action.dest != "help"]
    rows = [f"| `{action.option_strings[-1]}` | {value_of(action)} | {action.help} |\n" for action in actions]
    assert table("Flags") == "".join(rows)


def test_the_table_of_what_fits_is_the_scripts():
    command = [sys.executable, "benchmarks/serving_memory.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert table("What fits") == "".join(done.stdout.splitlines(keepends=True)[2:])


@pytest.fixture(scope="module")
def families(client) -> dict[str, tuple[str, str]]:
    """Kind and text by name, of all that /metrics has."""
    shown = client.get("/metrics").text
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", shown, re.MULTILINE))
    texts = dict(re.findall(r"^# HELP (\S+) (.*)$", shown, re.MULTILINE))
    return {name: (kind, texts[name]) for name, kind in kinds.items()}


def test_the_table_of_metrics_is_the_servers(families):
    rows = [f"| `{name}` | {kind} | {text} |\n" for name, (kind, text) in families.items()]
    assert sorted(table("Metrics").splitlines(keepends=True)) == sorted(rows)


def check_queries(text: str, families: dict[str, tuple[str, str]]) -> None:
    """That every series named in queries exists."""
    series = set()
    for name, (kind, _) in families.items():
        series |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    named = set(re.findall(r"qwenvl:\w+", text))
    assert named
    assert named <= series, named - series


def test_alerts_ask_for_metrics_that_exist(families):
    (block,) = re.findall(r"^```yaml\n(groups:.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    rules = [rule for group in yaml.safe_load(block)["groups"] for rule in group["rules"]]
    assert all({"alert", "expr", "for"} <= set(rule) for rule in rules)
    check_queries(block, families)


def test_the_dashboard_asks_for_metrics_that_exist(families):
    dashboard = json.loads((EXAMPLES / "grafana" / "qwenvl.json").read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["targets"]
        for target in panel["targets"]:
            check_queries(target["expr"], families)
    cells = [
        (x, y)
        for box in (panel["gridPos"] for panel in panels)
        for x in range(box["x"], box["x"] + box["w"])
        for y in range(box["y"], box["y"] + box["h"])
    ]
    assert len(set(cells)) == len(cells)  # no panel lies on another
    assert max(x for x, _ in cells) < 24


def takes(words: list[str]) -> argparse.Namespace:
    """The options of a command that ends with those of the server."""
    return cli.parser().parse_args(words)


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_the_images_start_the_server_as_somebody_without_rights(name):
    lines = (EXAMPLES / "docker" / name).read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    last = dict(steps)
    assert last["USER"] not in ("root", "0")
    assert json.loads(last["ENTRYPOINT"]) == ["qwenvl-serve"]
    takes(json.loads(last["CMD"]))
    assert "/health" in last["HEALTHCHECK"]
    sources = [word for step, rest in steps if step == "COPY" and "--from" not in rest for word in rest.split()[:-1]]
    assert sources
    assert [source for source in sources if not (REPOSITORY / source).exists()] == []


def test_the_pod_starts_the_server_and_asks_for_its_probes(client):
    documents = list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text(encoding="utf-8")))
    deployment, service = documents
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    options = takes(container["args"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert options.port == ports["http"]
    assert options.host == "0.0.0.0"
    assert pod["terminationGracePeriodSeconds"] > options.drain_seconds
    for kind, path in (("startupProbe", "/ready"), ("readinessProbe", "/ready"), ("livenessProbe", "/health")):
        probe = container[kind]["httpGet"]
        assert (probe["path"], probe["port"]) == (path, "http")
        assert client.get(probe["path"]).status_code == 200
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()


def test_the_example_of_replicas_agrees_with_the_package_and_its_page():
    """Ray is not among the requirements, so the example is read and not run; what it was run with is on the page."""
    source = (EXAMPLES / "ray_serve.py").read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("qwenvl_jax"):
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}"), name.name
    added = set(re.findall(r'add_argument\("(--[a-z]+)"', source))
    page = (REPOSITORY / "docs" / "replicas.md").read_text(encoding="utf-8")
    commands = re.findall(r"python (\S+\.py) ([^\n&]*)", page)
    assert {script for script, _ in commands} == {"serve.py", "examples/ray_serve.py"}
    for script, words in commands:
        _, rest = cli.parser().parse_known_args(words.split())
        assert {word for word in rest if word.startswith("--")} <= (added if script.startswith("examples") else set())
