"""Serve a model over HTTP: `python serve.py [--checkpoint DIR] [--host H] [--port P] ...`; see qwenvl_jax/serving."""

from qwenvl_jax.serving.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
