"""The serve command on several hosts: the first one listens and leads, the others have their devices do what it tells.

All of them end together: with status 0 when the first one is told to stop, with status 1 when any of them is gone.
"""

import argparse
import signal
import sys
import time
from functools import partial
from typing import NoReturn

import jax

from qwenvl_jax.config import UserError
from qwenvl_jax.hosts import HostsRecipe, connect
from qwenvl_jax.inference.followers import Followers, Following
from qwenvl_jax.serving import cli, logs, run

SECONDS_TO_TELL = 3  # clients that the engine has ended, before the process does


def serve(options: argparse.Namespace) -> NoReturn:
    """Serves or follows until it is told to stop. Ends the process: the runtime would wait for hosts that are gone.

    Raises UserError for hosts that do not find each other, and for options that are wrong.
    """
    settings = cli.settings(options)
    recipe = HostsRecipe(**{name: getattr(options, f"hosts.{name}") for name in cli.HOSTS})
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which is the server's
    connect(recipe)
    leads = jax.process_index() == 0
    try:
        if not leads:
            run.leave(_follow(options))
        followers = Followers(_end_when_told)
        build = partial(cli.build, options, followers=followers)
        try:
            with cli.listen(options.host, options.port) as listening:
                run.leave(run.serve(settings, listening, build, options.log_level, followers.close))
        except UserError:
            followers.close(2)
            raise
    except UserError as error:
        print(f"serve: {error}", file=sys.stderr)
        run.leave(2)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        run.leave(1)


def _follow(options: argparse.Namespace) -> int:
    """Returns the status to end with."""
    logs.configure(options.log_level)
    following = Following(_end)
    name = f"host {jax.process_index()} of {jax.process_count()}"
    told = 0

    def on_signal(*_: object) -> None:
        # A cluster tells all of its processes to stop, and the first one still has answers to finish.
        nonlocal told
        told += 1
        if told > 1:
            run.leave(1)
        _say(f"{name}: the first host says when to stop; once more to leave at once")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    _, engine = cli.prepare(options, lambda line: _say(f"{name}: {line}"))
    _say(f"{name}: ready to follow the first one")
    engine.follow(following.orders())
    _say(f"{name}: stopped")
    return following.status


def _end(status: int, reason: str) -> None:
    print(f"serve: {reason}", file=sys.stderr)
    run.leave(status)


def _end_when_told(status: int, reason: str) -> None:
    """Of the host that has clients."""
    print(f"serve: {reason}", file=sys.stderr, flush=True)
    time.sleep(SECONDS_TO_TELL)
    run.leave(status)


def _say(line: str) -> None:
    print(line, flush=True)
