"""docs/clients.md beside a server: every block that can run here runs as it stands, but for the server's address."""

import re
import shutil
import subprocess

import pytest
import yaml
from processes import REPOSITORY
from serving.process import picture

PAGE = (REPOSITORY / "docs" / "clients.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"
ANSWER = "<ref>yellow cross</ref><box>"


@pytest.fixture
def blocks(server):
    """The blocks of a language, with the address of the server of these tests."""

    def of(language: str) -> list[str]:
        found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
        assert found
        return [block.replace(ADDRESS, server.url) for block in found]

    return of


def test_the_shell_blocks(blocks):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    run = [
        subprocess.run(["bash", "-euo", "pipefail", "-c", block], capture_output=True, text=True, cwd=REPOSITORY)
        for block in blocks("sh")
    ]
    assert [done.returncode for done in run] == [0] * 3, run
    assert '"id":"tiny"' in run[0].stdout
    assert ANSWER in run[1].stdout
    assert run[2].stdout.endswith("data: [DONE]\n\n")


def test_the_python_blocks(blocks, monkeypatch, tmp_path, capsys):
    """In order, as one program; it may write into a folder of its own."""
    pictures = tmp_path / "qwenvl_jax" / "assets"
    pictures.mkdir(parents=True)
    (pictures / "pictures").symlink_to(REPOSITORY / "qwenvl_jax" / "assets" / "pictures")
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "page"}
    for block in blocks("python"):
        exec(compile(block, "docs/clients.md", "exec"), names)
    printed = capsys.readouterr().out
    for comment in re.findall(r"print\(.*\)  # (?:.*?: )?([<B].*)", "\n".join(blocks("python"))):
        assert comment in printed
    assert "yellow cross 298 76 374 152" in printed  # by hand as by the parser
    assert (tmp_path / "boxes.png").stat().st_size > 1000


def test_the_javascript_block(blocks, tmp_path):
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    (block,) = blocks("javascript")
    file = tmp_path / "page.mjs"
    file.write_text(block, encoding="utf-8")
    done = subprocess.run(["node", str(file)], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(ANSWER)


def test_settings_of_other_programs_parse():
    litellm, librechat = map(yaml.safe_load, re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
    assert litellm["model_list"][0]["litellm_params"]["api_base"] == ADDRESS + "/v1"
    assert librechat["endpoints"]["custom"][0]["baseURL"] == ADDRESS + "/v1"


def test_a_conversation_as_chat_programs_keep_it(post):
    """Every turn is a stream with all pictures again, text before them, and fields that mean nothing here."""
    body = {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}, "user": "65f0c1"}
    body |= {"temperature": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0}
    question = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, picture("red")]}
    messages: list[dict] = []
    for turn in range(3):
        messages.append(question)
        response = post(body | {"messages": messages})
        assert response.status_code == 200
        assert response.text.endswith("data: [DONE]\n\n")
        messages.append({"role": "assistant", "content": f"answer {turn}"})
