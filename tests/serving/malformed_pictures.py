"""Several hundred damaged, hostile or merely unusual picture files, the same at every call.

For tests of what reads pictures of strangers, in the process or over HTTP. Each must give a picture or a refusal, soon
and in little memory; which of the two is for `test_media.py` to say where it is certain.
"""

import io
import random
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

_SIDE = 24


def pictures() -> Iterator[tuple[str, bytes]]:
    """(name, content of the file) of every one; names are unique."""
    whole = dict(whole_pictures())
    yield from whole.items()
    yield from _damaged(whole)
    yield from _no_pictures()
    yield from _unusual_modes()
    yield from _png_chunks(whole["png"])
    yield from _headers()
    yield from _tags(whole)
    yield from _long_lists(whole)
    yield from _animations()


def whole_pictures() -> Iterator[tuple[str, bytes]]:
    """One sound picture of each format, of a photograph's noise so that none is trivially small."""
    noise = np.random.default_rng(0).integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    yield "png", encoded(image, "PNG")
    yield "jpeg", encoded(image, "JPEG")
    yield "progressive-jpeg", encoded(image, "JPEG", progressive=True)
    yield "webp", encoded(image, "WEBP")
    yield "lossless-webp", encoded(image, "WEBP", lossless=True)
    yield "gif", encoded(image.quantize(64), "GIF")
    yield "bmp", encoded(image, "BMP")
    yield "tiff", encoded(image, "TIFF")
    yield "tiff-lzw", encoded(image, "TIFF", compression="tiff_lzw")
    yield "tiff-jpeg", encoded(image, "TIFF", compression="jpeg")
    yield "avif", encoded(image, "AVIF")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _damaged(whole: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Cut off at many places, with bytes changed, another format's first bytes, or something in front."""
    dice = random.Random(0)
    for kind, content in whole.items():
        for cut in (
            1,
            3,
            8,
            12,
            20,
            40,
            len(content) // 4,
            len(content) // 2,
            len(content) * 9 // 10,
            len(content) - 1,
        ):
            yield f"{kind}-cut-to-{cut}", content[:cut]
        for number in range(6):
            changed = bytearray(content)
            # Half of them in the head, where a byte means a size or an offset.
            reach = min(64, len(content)) if number % 2 else len(content)
            for _ in range(1 + number):
                changed[dice.randrange(reach)] = dice.randrange(256)
            yield f"{kind}-changed-{number}", bytes(changed)
        yield f"{kind}-zeros-behind-head", content[:32] + bytes(len(content) - 32)
        yield f"{kind}-junk-in-front", b"junk" + content
        yield f"{kind}-junk-behind", content + b"junk" * 100
        for other in ("png", "jpeg", "gif", "tiff"):
            if other != kind:
                yield f"{kind}-behind-{other}-magic", whole[other][:8] + content[8:]


def _no_pictures() -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "one-zero", b"\0"
    yield "zeros", bytes(4096)
    yield "noise", random.Random(1).randbytes(4096)
    yield "text", b"this is no picture\n" * 20
    yield "json", b'{"error": "not found"}'
    yield "html", b"<!DOCTYPE html><html><body><img src=x></body></html>"
    yield "html-behind-blanks", b"\n\n  <HTML><body>not found</body></html>"
    yield "svg", b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'
    yield "svg-with-declaration", b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "aa">]><svg>&a;</svg>'
    yield "pdf", b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF"
    yield "postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    yield "postscript-in-dos-clothes", b"\xc5\xd0\xd3\xc6" + struct.pack("<7I", 32, 10, 0, 0, 0, 0, 0)
    yield "zip", b"PK\x03\x04" + bytes(60)
    yield "gzip", b"\x1f\x8b\x08" + bytes(60)
    yield "elf", b"\x7fELF" + bytes(60)
    yield "mp4", b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(60)
    yield "heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60)
    yield "ico", encoded(Image.new("RGB", (16, 16)), "ICO")
    yield "ppm", b"P6 2 2 255\n" + bytes(12)
    yield "tga", encoded(Image.new("RGB", (4, 4)), "TGA")
    yield "psd", b"8BPS\0\1" + bytes(60)
    yield "wmf", b"\xd7\xcd\xc6\x9a" + bytes(60)
    yield "fli", b"\0\0\0\0\x12\xaf" + bytes(200)
    yield "xbm", b"#define im_width 9\n#define im_height 9\nstatic char im_bits[] = {0x00};\n"


def _unusual_modes() -> Iterator[tuple[str, bytes]]:
    rows = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        yield f"png-mode-{mode}", encoded(Image.fromarray(rows).convert(mode), "PNG")
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"):
        image = Image.new("LAB", (8, 8)) if mode == "LAB" else Image.fromarray(rows).convert(mode)
        yield f"tiff-mode-{mode}", encoded(image, "TIFF")
    for value in (0.5, -1.0, 300.0, float("nan"), float("inf")):
        yield f"tiff-floats-{value}", encoded(Image.fromarray(np.full((4, 4), value, np.float32)), "TIFF")
    for mode in ("L", "CMYK"):
        yield f"jpeg-mode-{mode}", encoded(Image.fromarray(rows).convert(mode), "JPEG")
    palette = Image.fromarray(rows).convert("P")
    yield "png-transparent-palette", encoded(palette, "PNG", transparency=bytes(range(256)))
    yield "png-transparent-colour", encoded(Image.new("RGB", (4, 4)), "PNG", transparency=(0, 0, 0))
    yield "gif-transparent", encoded(palette, "GIF", transparency=0)
    for size in ((1, 1), (2, 3), (1, 5000), (5000, 1)):
        yield f"png-{size[0]}x{size[1]}", encoded(Image.new("RGB", size), "PNG")
    for orientation in (0, 1, 3, 5, 6, 8, 9, 65535):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"jpeg-orientation-{orientation}", encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)
    yield "jpeg-broken-exif", encoded(Image.new("RGB", (4, 4)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    yield "png-broken-profile", encoded(Image.new("RGB", (4, 4)), "PNG", icc_profile=b"no profile")


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, data: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    """A PNG that claims a size, with `data` for its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


def _png_chunks(whole: bytes) -> Iterator[tuple[str, bytes]]:
    head, rest = whole[:33], whole[33:]
    yield "png-text-bomb", head + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(5 * 2**20), 9)) + rest
    yield "png-many-texts", head + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**19), 9)) * 200 + rest
    yield "png-profile-bomb", head + chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(5 * 2**20), 9)) + rest
    yield (
        "png-international-text-bomb",
        head + chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(5 * 2**20), 9)) + rest,
    )
    yield "png-wrong-checksum", head[:-1] + bytes([head[-1] ^ 1]) + rest
    yield "png-wrong-data-checksum", whole[:-17] + bytes([whole[-17] ^ 1]) + whole[-16:]
    yield "png-no-data", head + chunk(b"IEND", b"")
    yield "png-two-headers", head + head[8:] + rest
    yield "png-no-end", whole[:-12]
    yield "png-palette-missing", png(4, 4, bytes(20), 8, 3)
    yield "png-palette-short", png(4, 4, b"\0\xff\xff\xff\xff" * 4, 8, 3)[:33] + chunk(b"PLTE", b"abc") + png(4, 4)[33:]
    yield "png-huge-chunk-length", head + struct.pack(">I", 0x7FFFFFFF) + b"tEXt" + rest
    yield "png-negative-chunk-length", head + struct.pack(">I", 0xFFFFFFFF) + b"IDAT" + rest
    yield "png-apple", whole[:8] + chunk(b"CgBI", bytes(4)) + whole[8:]
    for depth, colour in ((0, 0), (3, 2), (32, 2), (8, 1), (8, 5), (16, 3), (16, 6), (1, 2), (255, 255)):
        yield f"png-depth-{depth}-colour-{colour}", png(4, 4, bytes(200), depth, colour)
    for length in (1, 20, 2**22):
        yield f"png-{length}-bytes-of-pixels-for-48", png(4, 4, bytes(length))


def _headers() -> Iterator[tuple[str, bytes]]:
    """Sizes that are impossible, or that a small file claims."""
    for width, height in ((0, 0), (0, 10), (10, 0), (65535, 65535), (2**31 - 1, 1), (2**32 - 1, 2**32 - 1),
                          (1, 40_000_000), (13_000, 13_000), (7000, 7000)):  # fmt: skip
        yield f"png-claims-{width}x{height}", png(width, height)
        yield f"bmp-claims-{width}x{height}", bmp(width, height, 24, 0, bytes(12))
        yield f"tiff-claims-{width}x{height}", _tiff(width, height)
        yield f"gif-claims-{width}x{height}", _gif(width & 0xFFFF, height & 0xFFFF)
        yield f"jpeg-claims-{width}x{height}", _jpeg(width & 0xFFFF, height & 0xFFFF)
    yield "png-inflates-to-10000x10000", png(10_000, 10_000, bytes(1250 * 10_000 + 10_000), 1, 0)
    yield "bmp-upside-down", bmp(4, -4, 24, 0, bytes(48))
    yield "bmp-negative-width", bmp(-4, 4, 24, 0, bytes(48))
    for bits, compression in ((0, 0), (1, 0), (4, 2), (8, 1), (16, 3), (24, 4), (32, 3), (64, 0), (24, 99)):
        yield f"bmp-{bits}-bits-compression-{compression}", bmp(4, 4, bits, compression, bytes(64))
    yield "bmp-run-lengths-bomb", bmp(7000, 7000, 8, 1, b"\xff\x05" * 10)
    yield "bmp-run-lengths-delta", bmp(1000, 1000, 8, 1, b"\0\2\xff\xff" * 100_000)
    yield (
        "tiff-giant-tiles",
        _tiff(10, 10, extra=[(322, 4, 1, 40_000), (323, 4, 1, 40_000), (324, 4, 1, 8), (325, 4, 1, 9)]),
    )
    yield "tiff-tiles-of-0", _tiff(10, 10, extra=[(322, 4, 1, 0), (323, 4, 1, 0), (324, 4, 1, 8), (325, 4, 1, 9)])
    yield "tiff-giant-strips", _tiff(7000, 7000, extra=[(259, 3, 1, 5), (273, 4, 1, 8), (278, 4, 1, 2**32 - 1)])
    for samples in (0, 2, 5, 65535):
        yield f"tiff-{samples}-samples", _tiff(4, 4, extra=[(277, 3, 1, samples)])
    for compression in (0, 2, 3, 4, 6, 7, 8, 32773, 34676, 34925, 50000, 50001, 65535):
        yield f"tiff-compression-{compression}", _tiff(4, 4, extra=[(259, 3, 1, compression)])


def bmp(width: int, height: int, bits: int, compression: int, data: bytes) -> bytes:
    palette = bytes(4 << bits) if bits <= 8 else b""
    sizes = struct.pack("<II", width & 0xFFFFFFFF, height & 0xFFFFFFFF)
    header = struct.pack("<I", 40) + sizes + struct.pack("<HHIIiiII", 1, bits, compression, len(data), 0, 0, 0, 0)
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + palette + data


def _gif(width: int, height: int) -> bytes:
    return (b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b","
            + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00;")  # fmt: skip


def _jpeg(width: int, height: int) -> bytes:
    whole = encoded(Image.new("RGB", (8, 8)), "JPEG")
    at = whole.index(b"\xff\xc0") + 5
    return whole[:at] + struct.pack(">HH", height, width) + whole[at + 4 :]


def tags(entries: list[tuple[int, int, int, int]], behind: bytes = b"") -> bytes:
    """A TIFF of (tag, type, count, value or offset) entries, which is also what EXIF is."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4) + behind


def _tiff(width: int, height: int, extra: list[tuple[int, int, int, int]] | None = None) -> bytes:
    entries = {256: (256, 4, 1, width & 0xFFFFFFFF), 257: (257, 4, 1, height & 0xFFFFFFFF), 258: (258, 3, 1, 8),
               259: (259, 3, 1, 1), 262: (262, 3, 1, 1), 273: (273, 4, 1, 8), 279: (279, 4, 1, 100)}  # fmt: skip
    entries |= {entry[0]: entry for entry in extra or []}
    return tags(list(entries.values()), bytes(200))


def _tags(whole: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Directories of tags that multiply: each of many claims the same megabyte, or holds very many numbers."""
    same = tags([(tag, 7, 1_000_000, 4000) for tag in range(40_000, 40_400)], bytes(1_000_000))
    ratios = tags([(0x011A, 5, 120_000, 26)], b"\1\0\0\0" * 240_000)
    small = Image.new("RGB", (8, 8))
    for name, block in (("same-megabyte", same), ("ratios", ratios)):
        yield f"tiff-tags-of-{name}", block
        yield f"png-tags-of-{name}", whole["png"][:33] + chunk(b"eXIf", block) + whole["png"][33:]
        yield f"webp-tags-of-{name}", encoded(small, "WEBP", exif=b"Exif\0\0" + block)
        yield f"avif-tags-of-{name}", encoded(small, "AVIF", exif=b"Exif\0\0" + block)
        parts = [b"Exif\0\0" + block[at : at + 65_000] for at in range(0, len(block), 65_000)]
        joined = b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part for part in parts)
        yield f"jpeg-tags-of-{name}", b"\xff\xd8" + joined + whole["jpeg"][20:]
    yield "tiff-tags-in-a-circle", tags([(256, 3, 1, 1), (257, 3, 1, 1)])[:-4] + struct.pack("<I", 8)
    yield "tiff-tags-beyond-the-end", b"II*\0\xff\xff\xff\x7f"
    yield "tiff-tag-of-4-gigabytes", _tiff(4, 4, extra=[(700, 1, 2**32 - 1, 8)])
    yield "tiff-sizes-as-ratios", _tiff(4, 4, extra=[(256, 5, 1, 8), (322, 5, 1, 8), (323, 2, 9, 8)])


def _long_lists(whole: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Very many small parts before or between the pixels."""
    head, rest = whole["png"][:33], whole["png"][33:]
    yield "png-50000-empty-chunks", head + chunk(b"abCd", b"") * 50_000 + rest
    yield "png-50000-empty-data", head + chunk(b"IDAT", b"") * 50_000 + rest
    yield "png-50000-chunks-behind", whole["png"][:-12] + chunk(b"abCd", b"") * 50_000 + whole["png"][-12:]
    start, body = whole["jpeg"][:2], whole["jpeg"][2:]
    yield "jpeg-100000-comments", start + b"\xff\xfe\0\2" * 100_000 + body
    yield "jpeg-100000-exif-blocks", start + b"\xff\xe1\0\x09Exif\0\0x" * 100_000 + body
    yield "jpeg-a-million-fill-bytes", start + b"\xff" * 1_000_000 + body
    progressive = whole["progressive-jpeg"]
    last = progressive.rindex(b"\xff\xda")
    yield "jpeg-2000-scans", progressive[:-2] + progressive[last:-2] * 2000 + progressive[-2:]
    large = encoded(Image.new("RGB", (6000, 6000)), "JPEG", progressive=True)
    last = large.rindex(b"\xff\xda")
    yield "jpeg-500-scans-of-36-megapixels", large[:-2] + (large[last : last + 40]) * 500 + large[-2:]
    at = whole["gif"].index(b",", 13 + 3 * 64)
    before, after = whole["gif"][:at], whole["gif"][at:]
    yield "gif-100000-comments", before + b"!\xfe\1a\0" * 100_000 + after
    yield "gif-comment-of-100000-pieces", before + b"!\xfe" + b"\1a" * 100_000 + b"\0" + after
    yield "gif-comment-of-a-megabyte", before + b"!\xfe" + (b"\xff" + bytes(255)) * 4000 + b"\0" + after
    yield "gif-frame-beyond-its-screen", before[:6] + b"\1\0\1\0" + before[10:] + after
    yield "gif-no-frame", before + b";"


def _animations() -> Iterator[tuple[str, bytes]]:
    frames = [Image.new("RGB", (16, 16), (number % 256, number // 256, 9)) for number in range(1000)]
    yield "gif-1000-frames", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    yield "gif-1000-frames-cut", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])[:20_000]
    yield "webp-1000-frames", encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], quality=1)
    yield "png-200-frames", encoded(frames[0], "PNG", save_all=True, append_images=frames[1:200])
    yield "tiff-200-frames", encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:200])
    animated = encoded(frames[0], "WEBP", save_all=True, append_images=frames[300:301])
    size = animated.index(b"VP8X") + 12
    yield "webp-claims-a-giant-canvas", animated[:size] + b"\xfe\x3f\0\xfe\x3f\0" + animated[size + 6 :]
