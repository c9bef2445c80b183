"""What a server is told when it starts. Nothing here depends on the model."""

import dataclasses

from qwenvl_jax.serving.media import ImageLimits

MEGABYTE = 2**20


@dataclasses.dataclass(frozen=True)
class Settings:
    """model_names: what `model` in a request may say; the first is the model's own. adapters: the names of its
    adapters, which `model` may say, too. api_keys: one of them must be sent, where there are any. max_queue: requests
    that are answered or wait at one time. Seconds are of wall clock."""

    model_names: tuple[str, ...] = ("tiny",)
    adapters: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    max_queue: int = 128
    max_body_bytes: int = 32 * MEGABYTE
    max_images: int = 8
    image_limits: ImageLimits = dataclasses.field(default_factory=ImageLimits)
    allow_urls: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    request_timeout: float = 600  # for a whole answer
    body_timeout: float = 60  # for a request's body to arrive
    drain_seconds: float = 30  # for answers under way when the server is told to stop
    ping_seconds: float = 15  # of silence in a stream before a comment is sent, so that proxies keep it open
    stall_seconds: float = 60  # without a step of an engine that has work, before it counts as stuck

    @property
    def names(self) -> tuple[str, ...]:
        """All that `model` may say."""
        return self.model_names + self.adapters
