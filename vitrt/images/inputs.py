"""What an image may be given as, brought to the few things that are decoded.

A path, the bytes of a file, a PIL image and an array are decoded as they are. Beside them there are
URLs (see file_content.py), rows of Hugging Face datasets, open files and tensors.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias, get_args

import numpy as np
from PIL import Image

from vitrt.messages import reason_of, shorten

if TYPE_CHECKING:
    from torch import Tensor

Layout = Literal["hwc", "chw", "fhwc", "fchw"]
_LAYOUTS: tuple[str, ...] = get_args(Layout)
BYTES = (bytes, bytearray, memoryview)  # an image file's content

# Two threads may be given one file, which has one position. What has no hash is locked by its id.
_READ_LOCKS = tuple(threading.Lock() for _ in range(64))


class ImageError(ValueError):
    """An image that cannot be used; the message names the image and the reason."""

    @classmethod
    def of(cls, error: Exception) -> ImageError:
        """One class for whatever a broken image makes its reader, or its forward, raise."""
        if isinstance(error, ImageError):
            return error
        found = cls(str(error) or type(error).__name__)
        found.__cause__ = error
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Pixels:
    """RGB pixels whose axes are named: a tensor or array, uint8.

    Args:
        values: on any device.
        layout: the order of its axes, height, width and channels, and before them the frames of a
            clip: "hwc", "chw", "fhwc" or "fchw".

    Raises:
        ValueError: another layout, or values that are none or of other axes.
    """

    values: Any
    layout: Layout

    def __post_init__(self) -> None:
        if self.layout not in _LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}; it must be one of {', '.join(_LAYOUTS)}")
        if not hasattr(self.values, "shape"):
            kind = type(self.values).__name__
            raise ValueError(f"the pixels are a {kind}; they must be a tensor or an array")
        shape = list(self.values.shape)
        if len(shape) != len(self.layout) or shape[self.layout.index("c")] != 3:
            raise ValueError(
                f"pixels of shape {shape} have not the layout {self.layout!r} with three channels"
            )

    def to_array(self) -> np.ndarray:
        """[H, W, 3], or of a clip [F, H, W, 3]."""
        values = self.values.detach().cpu().numpy() if is_tensor(self.values) else self.values
        array = np.asanyarray(values)  # which leaves a mask in place
        return np.moveaxis(array, self.layout.index("c"), -1)


# What is decoded, and what is brought to that: datasets' {"bytes", "path"}, tensors, open files.
PlainInput: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray | bytes
ImageInput: TypeAlias = (
    "PlainInput | bytearray | memoryview | Pixels | Mapping[str, Any] | BinaryIO | Tensor"
)


def is_tensor(image: object) -> bool:
    """Whether it is a torch tensor; without importing torch, which some processes never need."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(image, torch.Tensor)


def is_file(image: object) -> bool:
    """Whether it is open for reading, or, as what `fsspec.open` gives, opens as a context."""
    return hasattr(image, "read") or (hasattr(image, "open") and hasattr(image, "__enter__"))


def plain_input(image: object, name: str) -> PlainInput:
    """Whatever an image was given as, brought to a path, URL, content, PIL image or array.

    Raises:
        ImageError: it is nothing of that, or cannot be had.
    """
    if isinstance(image, str | os.PathLike | Image.Image | np.ndarray | bytes):
        return image
    if isinstance(image, BYTES):
        return bytes(image)
    if isinstance(image, Pixels):
        return _read_pixels(image, name)
    if is_tensor(image):
        return _read_pixels(_tensor_pixels(image, name), name)
    if isinstance(image, Mapping):
        return _of_row(image, name)
    if is_file(image):
        return _read(image, name)
    raise ImageError(
        f"{name}: expected a path, the bytes of an image file, a PIL image, an array, a uint8 "
        'tensor, an open file, or {"bytes": ..., "path": ...} of datasets'
    )


def _read_pixels(pixels: Pixels, name: str) -> np.ndarray:
    try:
        return pixels.to_array()
    except (TypeError, RuntimeError) as error:  # a sparse tensor, or one of device "meta"
        values = pixels.values
        raise ImageError(
            f"{name}: {values.dtype} in the shape {list(values.shape)}; expected uint8 in memory: "
            f"{shorten(reason_of(error))}"
        ) from error


def _tensor_pixels(tensor: Any, name: str) -> Pixels:
    """A tensor by the one layout that its shape allows."""
    shape = list(tensor.shape)
    found = f"{name}: {str(tensor.dtype).removeprefix('torch.')} in the shape {shape}"
    if str(tensor.dtype) != "torch.uint8":
        raise ImageError(f"{found}; expected a path, an array or a uint8 tensor")
    layouts: list[Layout] = ["hwc", "chw"] if len(shape) == 3 else ["fhwc", "fchw"]
    fitting = [
        layout for layout in layouts if len(shape) == len(layout) and shape[layout.index("c")] == 3
    ]
    if len(fitting) != 1:
        which = "two layouts fit" if fitting else "no layout with three channels fits"
        raise ImageError(f"{found}: {which}; name it, as in vitrt.Pixels(tensor, layout='chw')")
    return Pixels(tensor, fitting[0])


def _of_row(row: Mapping[str, Any], name: str) -> PlainInput:
    """The image of `{"bytes", "path"}`, the form that datasets keep images in, undecoded."""
    content, path = row.get("bytes"), row.get("path")
    if not row.keys() <= {"bytes", "path"} or (content is None and path is None):
        raise ImageError(
            f"{name}: expected the keys bytes and path of datasets, one of them not None; it has "
            f"{shorten(', '.join(map(str, row)))}"
        )
    if content is None:
        if not isinstance(path, str | os.PathLike):
            raise ImageError(f"{name}: path is a {type(path).__name__}")
        return os.fspath(path)
    if not isinstance(content, BYTES):
        raise ImageError(f"{name}: bytes is a {type(content).__name__}")
    return bytes(content)


def _read(file: Any, name: str) -> bytes:
    """The whole content of an open file, from its start where it can be rewound."""
    try:
        if not hasattr(file, "read"):
            with file as opened:
                content = opened.read()
        else:
            with _READ_LOCKS[id(file) // 64 % len(_READ_LOCKS)]:
                if getattr(file, "seekable", lambda: False)():
                    file.seek(0)
                content = file.read()
    except Exception as error:
        raise ImageError(f"{name}: cannot be read: {shorten(reason_of(error))}") from error
    if not isinstance(content, bytes):
        raise ImageError(f'{name}: is not open in binary mode: open it with "rb"')
    return content
