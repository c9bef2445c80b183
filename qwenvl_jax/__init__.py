"""Qwen-VL in JAX and Flax.

    import qwenvl_jax as qv
    vlm = qv.load("tiny")
    reply = vlm.chat([{"role": "user", "content": [
        {"type": "image", "image": "street.jpg"}, {"type": "text", "text": "Where is the red car?"}]}])

This file only opens the front door, `vlm.py`, and does so when it is used: importing the package loads neither JAX nor
anything else.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenvl_jax.vlm import VLM, Reply, load

__all__ = ["VLM", "Reply", "load"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qwenvl_jax import vlm

    return getattr(vlm, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
