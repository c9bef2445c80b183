"""Several replicas of the server behind one address, by Ray Serve.

    pip install ".[serve]" "ray[serve]"
    python examples/ray_serve.py --replicas 2 --gpus 1 --checkpoint /path/to/Qwen-VL-Chat --slots 16

Each replica is a process with a model, an engine and the application of `serve.py`, whose options this takes. Ray
listens, spreads the requests and starts a replica again that dies or whose engine does. See docs/replicas.md.
"""

import argparse
import signal
import sys
import threading

import ray
from fastapi import FastAPI
from ray import serve

from qwenvl_jax.config import UserError
from qwenvl_jax.serving import cli

SECONDS_BETWEEN_CHECKS = 5


def deployment(options: argparse.Namespace) -> serve.Deployment:
    """What Ray runs in each replica. Raises UserError for options that are wrong."""
    settings = cli.settings(options)

    def build() -> FastAPI:
        """The application with a model, ready to answer. Called in the replica's process."""
        from qwenvl_jax.serving import logs
        from qwenvl_jax.serving.app import create_app

        logs.configure(options.log_level)
        app = create_app(settings)
        app.state.server.install(*cli.build(options, lambda line: print(line, flush=True)))
        return app

    @serve.ingress(build)
    class Replica:
        app: FastAPI  # Ray puts it there

        def check_health(self) -> None:
            """Raises where the replica should be started again; Ray asks every few seconds."""
            status = self.app.state.server.status
            if status in ("dead", "stuck"):
                raise RuntimeError(f"the engine is {status}")

    return serve.deployment(
        Replica,
        name="qwenvl",
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        # The server itself says 429, with a time to come again, before Ray lets requests wait.
        max_ongoing_requests=2 * options.max_queue,
        health_check_period_s=SECONDS_BETWEEN_CHECKS,
        graceful_shutdown_timeout_s=options.drain_seconds,
    )


def main() -> int:
    parser = cli.parser()
    parser.add_argument("--replicas", type=int, default=2, help="processes with a model each")
    parser.add_argument("--gpus", type=float, default=0, help="of each replica")
    parser.add_argument("--cpus", type=float, default=1, help="of each replica, for Ray's bookkeeping")
    options = parser.parse_args()
    try:
        replicas = deployment(options)
    except UserError as error:
        print(f"ray_serve: {error}", file=sys.stderr)
        return 2
    ray.init(ignore_reinit_error=True)
    serve.start(http_options={"host": options.host, "port": options.port, "request_timeout_s": options.request_timeout})
    serve.run(replicas.bind(), name="qwenvl", route_prefix="/")
    print(f"ready: {options.replicas} replicas on http://{options.host}:{options.port}", flush=True)
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    told.wait()
    serve.delete("qwenvl")  # answers under way get --drain-seconds; `shutdown` alone would cut them off
    serve.shutdown()
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
