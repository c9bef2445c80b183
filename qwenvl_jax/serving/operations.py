"""GET /health, /ready, /version and /metrics: for whoever runs the server."""

from importlib.metadata import version as installed_version

from fastapi import APIRouter, Request, Response

from qwenvl_jax.serving.encoding import JSONReply
from qwenvl_jax.serving.openapi import described
from qwenvl_jax.serving.reply_schema import Status, Version
from qwenvl_jax.serving.state import Server

router = APIRouter()


@router.api_route("/health", methods=["GET", "HEAD"], **described(None, Status))
async def health(request: Request) -> Response:
    """Whether the process is worth keeping: 503 where the engine has ended or hangs, and it must be started again."""
    status = request.app.state.server.status
    return JSONReply({"status": status}, 503 if status in ("dead", "stuck") else 200)


@router.api_route("/ready", methods=["GET", "HEAD"], **described(None, Status))
async def ready(request: Request) -> Response:
    """Whether requests should be sent here: 503 while the model loads and while the server drains."""
    status = request.app.state.server.status
    return JSONReply({"status": status}, 200 if status == "ready" else 503)


@router.get("/version", **described(None, Version))
async def version() -> Response:
    """The version of this software."""
    return JSONReply({"version": installed_version("qwenvl-jax")})


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Numbers for Prometheus."""
    server: Server = request.app.state.server
    return Response(server.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
