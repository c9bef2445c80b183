"""The application: the routes, and around them what happens to every request."""

from importlib.metadata import version

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from qwenvl_jax.serving import chat, completions, errors, models, openapi, operations, responses, tokens
from qwenvl_jax.serving.middleware import BodyLimit, Keys, Observed
from qwenvl_jax.serving.settings import Settings
from qwenvl_jax.serving.state import Server


def create_app(settings: Settings) -> FastAPI:
    """An application that answers at once, and requests for replies as soon as `app.state.server` has a model."""
    # No slash is added to a path, since a redirected POST may lose its body. The pages that FastAPI would add load
    # scripts from elsewhere.
    app = FastAPI(title="qwenvl-jax", redirect_slashes=False, docs_url=None, redoc_url=None)
    app.state.server = server = Server(settings)
    for part in (models, chat, completions, responses, tokens, operations):
        app.include_router(part.router)
    errors.install(app)
    openapi.install(app, version("qwenvl-jax"), settings.names)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, most=settings.max_body_bytes)
    if settings.api_keys:
        app.add_middleware(Keys, keys=settings.api_keys)
    if settings.cors_origins:  # outside of the keys: a browser asks first, without one
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Observed, metrics=server.metrics)
    return app
