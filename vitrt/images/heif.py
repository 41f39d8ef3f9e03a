"""HEIC and HEIF, the formats of iPhone photographs, read through pillow-heif where it is there."""

from __future__ import annotations

import io

from vitrt.images.file_content import first_bytes

BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def is_heif(content: str | io.BytesIO) -> bool:
    """Whether a file, or its content, says that it is in this format."""
    start = first_bytes(content)
    return start[4:8] == b"ftyp" and start[8:12] in BRANDS


def register_heif() -> None:
    """Teach Pillow the format. ValueError where pillow-heif is missing."""
    try:
        import pillow_heif
    except ImportError as error:
        raise ValueError("HEIC is read through pillow-heif: pip install pillow-heif") from error
    pillow_heif.register_heif_opener()
