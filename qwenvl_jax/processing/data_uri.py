"""The bytes of a picture in a `data:` URI (RFC 2397), as strictly and as leniently as stated here.

  - only base64 is read; `;base64` may stand anywhere among the parameters, in any case; what percent-encodes its bytes
    instead is refused
  - the declared type must be image/..., application/octet-stream or absent, and is otherwise not believed: the bytes
    say what they are. Other parameters (charset, names) are ignored
  - white space in the base64 is ignored, "-" and "_" of the URL-safe alphabet are read, and the "=" at the end may be
    missing. Any other character, text behind the "=" and a single left-over digit are errors

What the bytes mean is in `images.py`.
"""

import binascii

from qwenvl_jax.processing.image_errors import ImageError, shortened

_LONGEST_HEADER = 1024
_SLICE = 2**18  # characters; binascii lets no other thread run, for about half a millisecond on so many
_STANDARD = bytes.maketrans(b"-_", b"+/")
_BLANKS = b" \t\r\n\f\v"


def is_data_uri(text: str) -> bool:
    return text[:5].lower() == "data:"


def data_uri_bytes(uri: str, max_bytes: int | None = None) -> bytes:
    """What the URI holds. Raises ImageError for anything but the forms above and where it is above `max_bytes`."""
    comma = uri.find(",", 0, _LONGEST_HEADER)
    header = uri[5 : _LONGEST_HEADER if comma < 0 else comma]
    media_type, *parameters = (part.strip().lower() for part in header.split(";"))
    if comma < 0 or "base64" not in parameters:
        raise ImageError("invalid_base64_image", "only data URIs of the form data:image/png;base64,... are read")
    if media_type and media_type != "application/octet-stream" and media_type.split("/")[0] != "image":
        raise ImageError(
            "unsupported_image_media_type", f"{shortened(media_type)!r} is no picture; send image/png or image/jpeg"
        )
    return _base64_bytes(uri, comma + 1, max_bytes)


def _base64_bytes(text: str, start: int, max_bytes: int | None) -> bytes:
    """The base64 in `text` from `start` on, in slices, between which other threads may run."""
    pieces: list[bytes] = []
    length, rest, ended = 0, b"", False
    try:
        for at in range(start, len(text), _SLICE):
            digits = text[at : at + _SLICE].encode("ascii").translate(_STANDARD, _BLANKS)
            unpadded = digits.rstrip(b"=")
            if ended and unpadded:
                raise ValueError("text behind the padding")
            ended = ended or len(unpadded) < len(digits)
            length += len(unpadded)
            if max_bytes is not None and length * 3 // 4 > max_bytes:
                raise ImageError("image_file_too_large", f"more than {max_bytes:,} bytes; send a smaller file")
            digits = rest + unpadded
            whole = len(digits) - len(digits) % 4
            pieces.append(binascii.a2b_base64(digits[:whole], strict_mode=True))
            rest = digits[whole:]
        pieces.append(binascii.a2b_base64(rest + b"=" * (-len(rest) % 4), strict_mode=True))
    except UnicodeEncodeError:
        raise ImageError("invalid_base64_image", "the base64 is damaged (a character beyond ASCII)") from None
    except (binascii.Error, ValueError) as error:  # whose messages are of a fixed length
        if isinstance(error, ImageError):
            raise
        raise ImageError("invalid_base64_image", f"the base64 is damaged ({error})") from None
    return b"".join(pieces)
