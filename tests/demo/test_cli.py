"""The demo in the terminal, as a person runs it. How often the tiny model is right is measured by eval/scenes.py."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from qwenvl_jax.demo.cli import main

REPOSITORY = Path(__file__).parents[2]
PICTURE = REPOSITORY / "qwenvl_jax" / "assets" / "pictures" / "word.png"


def run_demo(*arguments: str, folder: Path = REPOSITORY) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "demo.py"), *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_an_answer_with_a_box_about_the_shipped_picture(tmp_path):
    """The first command of the README, run from another folder."""
    done = run_demo(
        "--image", str(PICTURE), "--ask", "Where is the yellow cross?", "--output", "boxes.png", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "yellow cross" in done.stdout
    assert "in pixels of the picture" in done.stdout
    assert "Traceback" not in done.stderr
    with Image.open(PICTURE) as picture, Image.open(tmp_path / "boxes.png") as drawn:
        assert drawn.size == picture.size
        assert drawn.convert("RGB").tobytes() != picture.convert("RGB").tobytes()


def test_an_answer_in_the_terminal_does_not_wait_for_gradio(fixtures):
    """Also: a question without a picture, to a checkpoint folder."""
    program = (
        "import sys; from qwenvl_jax.demo.cli import main; "
        f"status = main(['--checkpoint', {str(fixtures / 'qwen-vl-chat-tiny')!r}, '--ask', 'Hello']); "
        "sys.exit(status or ('gradio' in sys.modules and 'gradio was imported'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "text.png").write_text("this is no picture")
    (tmp_path / "cut.png").write_bytes(PICTURE.read_bytes()[:400])
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--image", "missing.png", "--ask", "What?"], "missing.png"),
        (["--image", "text.png", "--ask", "What?"], "text.png"),
        (["--image", "cut.png", "--ask", "What?"], "cut.png"),
        (["--image", "empty", "--ask", "What?"], "empty"),
        (["--image", str(PICTURE), "--ask", " "], "--ask"),
        (["--image", str(PICTURE)], "--ask"),
        (["--checkpoint", "nowhere", "--ask", "What?"], "nowhere"),
        (["--checkpoint", "empty", "--ask", "What?"], "empty"),
        (["--checkpoint", "text.png", "--ask", "What?"], "text.png"),
        (["--adapter", "empty", "--ask", "What?"], "adapter_config.json"),
        (["--image", str(PICTURE), "--ask", "What?", "--output", "boxes.unknown"], "boxes.unknown"),
        (["--image", str(PICTURE), "--ask", "What?", "--output", "nowhere/boxes.png"], "nowhere"),
        (["--ask", "What?", "--output", "boxes.png"], "--image"),
    ],
)
def test_a_mistake_gives_one_line_that_names_it(arguments, named, folder, capsys):
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert named in output.err


def test_a_mistake_ends_the_process_with_two(tmp_path):
    done = run_demo("--image", "missing.png", "--ask", "What?", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("demo: ")
    assert done.stderr.count("\n") == 1


def test_a_taken_port_is_named(fixtures, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["--checkpoint", str(fixtures / "qwen-vl-chat-tiny"), "--server-port", port]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert port in error
