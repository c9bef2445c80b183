"""A server over two real processes: its replies are those of one device, and neither process outlives the other."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from processes import REPOSITORY
from serving.process import REAL, ServerProcess, chat, picture, user

import qwenvl_jax

PATH = "/v1/chat/completions"
SECONDS_TO_END = 30
# Each of the virtual devices of both is in the mesh, and each matrix and each row of four is over both.
OPTIONS = ("--mesh", "fsdp=4,tensor=2", "--max-model-len", "160", "--prefixes", "1024", "--served-model-name", "tiny")


def environment() -> dict[str, str]:
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    return {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


class Hosts:
    """The processes of one server: `leader`, which listens, and `follower`."""

    def __init__(self, *options: str, wait: bool = True, follower: tuple[str, ...] = ()):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        together = ("--hosts.coordinator", address, "--hosts.count", "2", "--hosts.index")
        self.follower = subprocess.Popen(
            [sys.executable, REAL, *OPTIONS, *options, *follower, *together, "1"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY, env=os.environ | environment(),
        )  # fmt: skip
        try:
            self.leader = ServerProcess(*OPTIONS, *options, *together, "0", script=REAL, env=environment(), wait=False)
            if wait:
                self.leader.wait_until_ready()
        except BaseException:
            print(self.close())
            raise

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self.leader.__exit__()

    def close(self) -> str:
        """What the follower has said."""
        if self.follower.poll() is None:
            self.follower.kill()
        if not self.follower.stdout.closed:
            self.said = self.follower.communicate()[0]
        return self.said


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts("--slots", "4") as hosts:
        yield hosts


def test_replies_are_those_of_one_device(hosts):
    """With a picture and without, greedy and drawn, more at once than there are rows, a form, one that goes away."""
    vlm = qwenvl_jax.load("tiny")
    questions = [
        [{"type": "text", "text": "Where is the yellow cross?"}],
        [picture("blue", (64, 64)), {"type": "text", "text": "What is in the picture?"}],
    ]
    drawn = {"temperature": 0.9, "top_p": 0.95}
    bodies, expected = [], []
    for question in questions:
        for seed in (0, 1):
            options = {"temperature": 0} if seed == 0 else drawn | {"seed": seed}
            bodies.append(chat(messages=user(question), max_tokens=40, **options))
            parts = [
                {"type": "image", "image": part["image_url"]["url"]} if "image_url" in part else part
                for part in question
            ]
            expected.append(vlm.chat(user(parts), max_new_tokens=40, **options).text)
    client = hosts.leader.client
    gone = hosts.leader.open(chat(max_tokens=100, ignore_eos=True))
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(lambda body: client.post(PATH, json=body).json(), bodies))
    gone.close()
    assert [answer["error"] for answer in answers if "error" in answer] == []
    assert [answer["choices"][0]["message"]["content"] for answer in answers] == expected
    form = {"type": "regex", "regex": "[0-9]{5}"}
    formed = client.post(PATH, json=chat(response_format=form)).json()["choices"][0]["message"]["content"]
    assert len(formed) == 5
    assert formed.isdigit()
    hosts.leader.wait_until_idle()
    again = client.post(PATH, json=bodies[3]).json()
    assert again["choices"][0]["message"]["content"] == expected[3]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 64
    assert hosts.leader.metric("recompiles_total") == 0


def test_told_to_stop_all_finish_what_is_under_way(hosts):
    """Even where all of them are told, as a cluster does."""
    client = hosts.leader.client
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, PATH, json=chat(max_tokens=100, ignore_eos=True))
        while not hosts.leader.metric("num_requests_running"):
            time.sleep(0.01)
        hosts.follower.send_signal(signal.SIGTERM)
        hosts.leader.terminate()
        assert answer.result().json()["usage"]["completion_tokens"] == 100
    assert hosts.leader.process.wait(SECONDS_TO_END) == 0
    assert hosts.follower.wait(SECONDS_TO_END) == 0


@pytest.mark.long
def test_when_a_follower_dies_the_leader_ends():
    """In the midst of a reply: the client hears of it, and the process ends in a line and not in a wait."""
    with Hosts("--slots", "1") as hosts, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(hosts.leader.client.post, PATH, json=chat(max_tokens=120, ignore_eos=True))
        while not hosts.leader.metric("num_requests_running"):
            time.sleep(0.01)
        hosts.follower.kill()
        assert hosts.leader.process.wait(SECONDS_TO_END) == 1
        hosts.leader._reader.join()
        assert "serve: host 1 is gone; a model over several hosts ends with any of them\n" in hosts.leader.lines
        assert answer.result().status_code in (500, 503)


def test_when_the_leader_dies_the_follower_ends():
    """While it loads, which is the same to a follower as any other time."""
    with Hosts(wait=False) as hosts:
        hosts.leader.line("loading")
        hosts.leader.process.kill()
        assert hosts.follower.wait(SECONDS_TO_END) in (1, -signal.SIGABRT)  # the runtime may be the first to see it
        assert re.search("serve: the host that leads is gone|coordination service", hosts.close())


def test_a_follower_that_cannot_load_ends_the_leader():
    with Hosts(wait=False, follower=("--checkpoint", "tinny")) as hosts:
        assert hosts.follower.wait(SECONDS_TO_END) == 2
        assert hosts.leader.process.wait(SECONDS_TO_END) == 1
        assert "serve: tinny" in hosts.close()


def test_told_to_stop_while_they_load():
    with Hosts(wait=False) as hosts:
        hosts.leader.terminate()
        assert hosts.leader.process.wait(SECONDS_TO_END) == 0
        assert hosts.follower.wait(SECONDS_TO_END) == 0
