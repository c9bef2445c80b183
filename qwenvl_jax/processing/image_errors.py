"""What can be wrong with a picture, as one error with a code beside its text.

The codes are those of OpenAI's API, so that a server passes them on as they are. Mistakes that have nothing to do with
a picture's bytes (no such file, an array of the wrong type) stay plain UserErrors.
"""

from typing import Literal

from qwenvl_jax.config import UserError

Code = Literal[
    "empty_image_file",
    "failed_to_download_image",
    "image_file_too_large",  # bytes
    "image_parse_error",  # of a known format, but damaged, cut off or made to exhaust the reader
    "image_too_large",  # pixels
    "image_too_small",
    "invalid_base64_image",
    "invalid_image",
    "invalid_image_format",
    "invalid_image_url",
    "unsupported_image_media_type",
]


class ImageError(UserError):
    """A picture that cannot be had. `reason` says why and what to do; `where` names the source, where that helps."""

    def __init__(self, code: Code, reason: str, where: str = ""):
        super().__init__(code, reason, where)  # as it was called, so that it pickles
        self.code: Code = code
        self.reason = reason
        self.where = where

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" if self.where else self.reason

    def at(self, where: str) -> "ImageError":
        """The same error, said to be of `where`."""
        return ImageError(self.code, self.reason, f"{where}: {self.where}" if self.where else where)


def shortened(text: str, most: int = 80) -> str:
    """A source as error messages show it: a data URI or a URL can be megabytes long, and hold what does not print."""
    short = text if len(text) <= most else text[: most - 20] + "..."
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in short)
