"""Paths, URLs, file contents, PIL images, arrays -> upright RGB, or an error that names the image.

Files are decoded by Pillow, turned upright by their EXIF orientation and brought to RGB as
transformers' image processors do it: what is transparent is laid onto white, and 16-bit and float
modes are clipped to 0..255 instead of scaled, which is logged as a warning, because little can be
seen in such an image.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from vitrt.images.file_content import content_of
from vitrt.images.heif import is_heif, register_heif
from vitrt.images.inputs import (
    BYTES,
    ImageError,
    ImageInput,
    Pixels,
    PlainInput,
    is_file,
    is_tensor,
)
from vitrt.messages import reason_of, shorten

logger = logging.getLogger(__name__)

_UPRIGHT = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow loads pixels and EXIF into the image on first use, without a lock: the same PIL image given
# twice would be loaded by two threads at once. PIL images do not hash, so locks are chosen by id.
_LOAD_LOCKS = tuple(threading.Lock() for _ in range(64))
_ARRAYS = "uint8 in the shape [H, W, 3], [H, W], [H, W, 1], or [F, H, W, 3] for a clip"


def name_of(image: object) -> str:
    """What error messages call an image that has no other name."""
    if isinstance(image, str | os.PathLike):
        return shorten(os.fsdecode(image)) or "''"
    if isinstance(image, Image.Image):
        origin = shorten(os.fsdecode(getattr(image, "filename", "") or "PIL image"))
        return f"{origin} ({image.mode}, {image.width} x {image.height})"
    if isinstance(image, np.ndarray):
        return "array"
    if isinstance(image, BYTES):
        return f"{type(image).__name__} object of length {len(image)}"
    if isinstance(image, Mapping) and isinstance(image.get("path"), str):
        return shorten(image["path"])
    if is_file(image):
        file_name = getattr(image, "name", None) or getattr(image, "path", None)
        if isinstance(file_name, str):
            return shorten(file_name)
    return f"object of type {type(image).__module__}.{type(image).__qualname__}"


def check_images(images: Iterable[ImageInput]) -> None:
    """ValueError for what is one image, or might be: its parts would be taken for images."""
    numbers = is_tensor(images) or (
        isinstance(images, np.ndarray) and images.dtype.kind not in "OU"  # not paths
    )
    if numbers and images.ndim >= 4:  # type: ignore[attr-defined]
        shape = list(images.shape)  # type: ignore[attr-defined]
        raise ValueError(
            f"images is one array of shape {shape}; give [array] if it is a clip, list(array) if "
            f"it is {shape[0]} images"
        )
    one = isinstance(images, (str, *BYTES, os.PathLike, Image.Image, Pixels, Mapping))
    if one or numbers or is_file(images):
        raise ValueError(f"images is one image, {name_of(images)}; give a list: [image]")
    if not (hasattr(images, "__iter__") or hasattr(images, "__getitem__")):
        raise ValueError(f"images is a {type(images).__name__}; give a list of images")


def check_array(array: np.ndarray, name: str) -> np.ndarray:
    """The array as uint8 [H, W, 3] or [F, H, W, 3]; what is neither is refused, never guessed."""
    found = f"{name}: {array.dtype} in the shape {list(array.shape)}"
    if np.ma.is_masked(array):
        raise ImageError(
            f"{found} with masked values; array.filled(level) says what they are to be"
        )
    if array.dtype != np.uint8:
        raise ImageError(f"{found}; expected {_ARRAYS}: scale it to 0..255 and cast it")
    array = np.asarray(array)  # a matrix has two axes, whatever is asked of it
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim not in (3, 4) or array.shape[-1] not in ((1, 3) if array.ndim == 3 else (3,)):
        hint = ""
        if array.ndim == 3 and array.shape[-1] == 4:
            hint = ": pass array[..., :3] to drop the fourth channel, or a PIL image"
        elif array.ndim in (3, 4) and array.shape[-3] == 3:
            hint = ": move the channels to the last axis"
        raise ImageError(f"{found}; expected {_ARRAYS}{hint}")
    if 0 in array.shape:
        raise ImageError(f"{found}; expected at least one pixel and one frame")
    if array.shape[-1] == 1:
        array = np.repeat(array, 3, axis=-1)
    return array


def decode(image: str | os.PathLike[str] | bytes | Image.Image, name: str) -> Image.Image:
    """A path, URL, the content of an image file or a PIL image -> upright, mode RGB, loaded.

    Raises ImageError where Pillow cannot read it.
    """
    with reading(name):
        if isinstance(image, Image.Image):
            return _upright_rgb(image, name)
        with open_image(image) as opened:
            return _upright_rgb(opened, name)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises inside the block into an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image in a format that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name}: cannot be read as an image: {error}; --max-image-pixels (in Python, "
            "PIL.Image.MAX_IMAGE_PIXELS) sets the limit"
        ) from error
    except Exception as error:
        # Broken files make Pillow's plugins raise nearly anything (SyntaxError, struct.error, ...).
        reason = shorten(reason_of(error))
        raise ImageError(f"{name}: cannot be read as an image: {reason}") from error


def size_of(image: PlainInput) -> tuple[int, int]:
    """(height, width) of an image, or of a clip's frames, as it will be decoded: from its header.

    Raises whatever an image that cannot be read makes Pillow raise; `decode` says what that means.
    """
    if isinstance(image, np.ndarray):
        height, width = image.shape[:2] if image.ndim < 4 else image.shape[1:3]
        return height, width
    if isinstance(image, Image.Image):
        return _upright_size(image)
    with open_image(image) as opened:
        return _upright_size(opened)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    sideways = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (image.width, image.height) if sideways else (image.height, image.width)


def open_image(image: str | os.PathLike[str] | bytes) -> Image.Image:
    """A regular file, or its content, as Pillow opens it: not yet loaded."""
    content = content_of(image)
    try:
        return Image.open(content)
    except UnidentifiedImageError:
        if not is_heif(content):
            raise
        register_heif()
        return Image.open(content)


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    with _LOAD_LOCKS[id(image) // 64 % len(_LOAD_LOCKS)]:
        if isinstance(image, ImageFile.ImageFile) and image.tile and image.fp is None:
            raise ValueError(
                "it was closed before it was loaded: call its load() before, or pass the path"
            )
        image.load()
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        _check_range(image, name)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_range(image: Image.Image, name: str) -> None:
    """Log values that 8 bits cannot hold. ValueError for NaN, which would turn into a number."""
    values = np.asarray(image)
    if values.size == 0:
        return
    if image.mode == "F" and np.isnan(values).any():
        raise ValueError(f"{int(np.isnan(values).sum())} of its {values.size} values are NaN")
    low, high = values.min(), values.max()
    if low < 0 or high > 255 or (image.mode == "F" and high <= 1):
        logger.warning(
            "%s: mode %s with values %g..%g; they are read as 0..255 and cut off there, "
            "as transformers does. Scale the image to 8 bits for useful features.",
            name,
            image.mode,
            low,
            high,
        )
