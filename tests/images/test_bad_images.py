"""Inputs that are no usable image: each an ImageError that names the image and says why."""

from __future__ import annotations

import io
import os
import struct
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile

from tests.support.pipes import make_pipe
from vitrt import Pixels
from vitrt.images.container import is_video
from vitrt.images.decode import check_images, size_of
from vitrt.images.inputs import ImageError
from vitrt.images.levels import normalisation_table
from vitrt.images.processor import ImageProcessor

PROCESSOR = ImageProcessor(14, 2, 2, 56 * 56, 28 * 28 * 64)


def photo(height: int = 60, width: int = 80) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    photo().save(buffer, file_format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises this size and holds next to nothing: a decompression bomb's outside."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def cut(content: bytes, share: float) -> bytes:
    return content[: int(len(content) * share)]


BAD_FILES = {  # name -> content, part of the reason
    "empty.png": (b"", "empty"),
    "empty.jpg": (b"", "empty"),
    "text.png": (b"this is not a picture\n" * 20, "not an image"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not an image"),
    "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    "zeros.jpg": (bytes(4096), "not an image"),
    "marker.jpg": (b"\xff\xd8\xff", "not an image"),
    "signature.png": (b"\x89PNG\r\n\x1a\n", "not an image"),
    "header.png": (png_header(40, 40)[:33], ""),
    "half.jpg": (cut(encoded("JPEG"), 0.5), "truncated"),
    "almost.jpg": (cut(encoded("JPEG"), 0.9), "truncated"),
    "head.jpg": (cut(encoded("JPEG"), 0.2), "truncated"),
    "half.png": (cut(encoded("PNG"), 0.5), "truncated"),
    "half.gif": (cut(encoded("GIF"), 0.5), "truncated"),
    "half.bmp": (cut(encoded("BMP"), 0.5), "truncated"),
    "half.ppm": (cut(encoded("PPM"), 0.5), "truncated"),
    "half.tif": (cut(encoded("TIFF"), 0.5), ""),
    "half.webp": (cut(encoded("WEBP"), 0.5), ""),
    "short.png": (png_header(300, 300), ""),
    "bomb.png": (png_header(20000, 20000), "400000000 pixels"),
    "narrow.png": (png_header(0, 40), ""),
}


def assert_refused(image, name: str, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        PROCESSOR.prepare(image)
    message = str(caught.value)
    assert name in message
    assert reason in message
    assert message.removeprefix(name).strip(": ")  # a name alone is no reason


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(tmp_path: Path, name: str) -> None:
    content, reason = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    assert_refused(path, str(path), reason)
    with pytest.raises(ImageError, match=f"given-{name}: .*{reason}"):
        PROCESSOR.prepare(content, name=f"given-{name}")


def test_broken_exif_does_not_cost_the_image() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    broken = encoded("JPEG", exif=exif).replace(b"MM\0*", b"junk").replace(b"II*\0", b"junk")
    assert b"junk" in broken
    np.testing.assert_array_equal(
        PROCESSOR.prepare(broken).pixels, PROCESSOR.prepare(encoded("JPEG")).pixels
    )


@pytest.mark.parametrize(("height", "width"), [(1, 4000), (4000, 1), (2, 401), (10, 2001)])
def test_aspect_ratio_over_200(tmp_path: Path, height: int, width: int) -> None:
    path = tmp_path / "strip.png"
    photo(height, width).save(path)
    assert_refused(path, str(path), f"{height} x {width} (height x width), an aspect ratio of")
    assert_refused(np.zeros((height, width, 3), np.uint8), "array", "at most 200")
    assert_refused(photo(height, width), "PIL image", "at most 200")


def test_things_that_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.jpg").mkdir()
    assert_refused(tmp_path / "folder.jpg", "folder.jpg", "directory")
    assert_refused(tmp_path / "missing.jpg", "missing.jpg", "No such file")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    assert_refused(tmp_path / "dangling.jpg", "dangling.jpg", "No such file")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert_refused(tmp_path / "loop.jpg", "loop.jpg", "symbolic links")
    make_pipe(tmp_path / "pipe.jpg", monkeypatch)
    assert_refused(tmp_path / "pipe.jpg", "pipe.jpg", "not a regular file")
    with pytest.raises(OSError, match="not a regular file"):
        size_of(tmp_path / "pipe.jpg")
    assert_refused(str(tmp_path / "nul\0.jpg"), "nul", "null")


def test_urls_that_nothing_is_read_from() -> None:
    for url in ("https://example.com/cat.jpg", "s3://bucket/cat.jpg", "HTTP://example.com/cat.jpg"):
        assert_refused(url, url, "URL is not fetched: download it")
    assert_refused("file:///no/such/cat.jpg", "file:///no/such/cat.jpg", "No such file")
    assert_refused("file://server/share/cat.jpg", "file://", "another machine, 'server'")
    assert_refused("data:image/png;base64", "data:", "has a comma")
    assert_refused("data:image/png;base64,AAAA%$", "data:", "its base64 content is broken")
    assert_refused("data:image/png;base64,", "data:", "empty")
    assert_refused("data:text/plain,hello", "data:text/plain,hello", "not an image")


def test_what_a_message_shows_is_cut() -> None:
    long = "data:image/png;base64," + "A" * 3_000_000
    for image in (long, Path("x" * 100_000), "y" * 100_000, "https://example.com/" + "z" * 100_000):
        with pytest.raises(ImageError) as caught:
            PROCESSOR.prepare(image)
        assert len(str(caught.value)) < 700
        assert f"({len(str(image))} characters)" in str(caught.value)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "PPM"])
def test_a_pil_image_closed_by_its_with(tmp_path: Path, file_format: str) -> None:
    photo().save(tmp_path / "photo", file_format)
    with Image.open(tmp_path / "photo") as image:
        pass
    assert_refused(image, str(tmp_path / "photo"), "it was closed before it was loaded")
    with Image.open(tmp_path / "photo") as image:
        image.load()
    PROCESSOR.prepare(image)


def test_pixels_that_are_no_numbers(tmp_path: Path) -> None:
    values = np.full((60, 80), 100, np.float32)
    values[3, 4:6] = np.nan
    Image.fromarray(values).save(tmp_path / "depth.tif")
    assert_refused(tmp_path / "depth.tif", "depth.tif", "2 of its 4800 values are NaN")
    masked = np.ma.masked_less(np.asarray(photo()), 50)
    assert_refused(masked, "array", "masked values; array.filled(level)")
    unmasked = np.ma.array(np.asarray(photo()))
    expected = PROCESSOR.prepare(np.asarray(photo())).pixels
    np.testing.assert_array_equal(PROCESSOR.prepare(unmasked).pixels, expected)


@pytest.mark.parametrize("brand", [b"heic", b"hevx", b"msf1", b"avif"])
def test_what_is_boxed_as_videos_are_may_be_an_image(brand: bytes) -> None:
    content = b"\0\0\0\x20ftyp" + brand + bytes(100)
    assert not is_video(io.BytesIO(content))
    assert is_video(io.BytesIO(content.replace(brand, b"isom")))


HEIC = b"\0\0\0\x20ftypheic" + bytes(100)


def test_heic_without_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "photo.heic").write_bytes(HEIC)
    assert_refused(tmp_path / "photo.heic", "photo.heic", "pip install pillow-heif")
    assert_refused(HEIC, "bytes", "pip install pillow-heif")


def test_heic_with_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for pillow-heif, whose `register_heif_opener` teaches Pillow the format."""

    class Reader(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._mode, self._size = "RGB", (80, 60)

        def load(self):
            self.im = photo().im
            return Image.Image.load(self)

    def register() -> None:
        Image.register_open("HEIF", Reader, lambda start: start[4:12] == b"ftypheic")

    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    module = types.SimpleNamespace(register_heif_opener=register)
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    np.testing.assert_array_equal(PROCESSOR.prepare(HEIC).pixels, PROCESSOR.prepare(photo()).pixels)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    photo().save(path)
    path.chmod(0)
    assert_refused(path, str(path), "Permission denied")


def test_a_file_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for whoever runs the tests as root."""
    path = tmp_path / "secret.png"
    photo().save(path)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image.builtins, "open", refuse)
    assert_refused(path, str(path), "Permission denied")


def test_a_tiff_of_float64_pixels() -> None:
    path = Path(skimage.__file__).parent / "data" / "multipage_rgb.tif"
    assert_refused(path, str(path), "not an image in a format that Pillow can read")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((40, 40, 3), np.float32),
        np.zeros((40, 40, 3), np.uint16),
        np.zeros((40, 40, 3), np.int64),
        np.zeros((40, 40), bool),
        np.zeros((40, 40, 3), object),
        np.zeros((40, 40, 4), np.uint8),
        np.zeros((40, 40, 2), np.uint8),
        np.zeros((3, 40, 40), np.uint8),
        np.zeros((2, 3, 40, 40), np.uint8),
        np.zeros((2, 40, 40, 1), np.uint8),
        np.zeros((2, 40, 40, 4), np.uint8),
        np.zeros((1, 2, 40, 40, 3), np.uint8),
        np.zeros(40, np.uint8),
        np.zeros((), np.uint8),
        np.zeros((0, 40, 3), np.uint8),
        np.zeros((40, 0, 3), np.uint8),
        np.zeros((0, 0), np.uint8),
        np.zeros((0, 40, 40, 3), np.uint8),
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}",
)
def test_bad_array(array: np.ndarray) -> None:
    assert_refused(array, str(array.dtype), str(list(array.shape)))
    with pytest.raises(ImageError, match=r"^frame 7: .*expected"):
        PROCESSOR.prepare(array, name="frame 7")


def test_a_matrix_is_an_array() -> None:
    grey = np.arange(1600, dtype=np.uint8).reshape(40, 40)
    found = PROCESSOR.prepare(np.matrix(grey)).pixels
    np.testing.assert_array_equal(found, PROCESSOR.prepare(grey).pixels)


def test_hints_say_what_would_be_right() -> None:
    assert_refused(np.zeros((40, 40, 3), np.float32), "array", "scale it to 0..255 and cast it")
    assert_refused(np.zeros((40, 40, 4), np.uint8), "array", "array[..., :3]")
    assert_refused(np.zeros((3, 40, 40), np.uint8), "array", "move the channels to the last axis")


def test_bad_pil_images() -> None:
    closed = photo()
    closed.close()
    assert_refused(closed, "PIL image", "closed")
    assert_refused(Image.new("RGB", (0, 5)), "PIL image", "must be positive")
    assert_refused(Image.new("La", (5, 5)), "PIL image (La, 5 x 5)", "not supported")
    assert_refused(Image.open(io.BytesIO(cut(encoded("PNG"), 0.5))), "PIL image", "truncated")


@pytest.mark.parametrize("thing", [None, 3, ["a.png"], torch.zeros(3, 4, 4)])
def test_things_that_are_no_images(thing) -> None:
    assert_refused(thing, type(thing).__name__, "expected a path")


def test_tensors_whose_layout_is_not_known() -> None:
    for shape in ((3, 40, 3), (2, 3, 40, 3)):
        assert_refused(torch.zeros(shape, dtype=torch.uint8), "Tensor", "two layouts fit; name it")
    for shape in ((40, 40), (4, 40, 40), (1, 40, 40), (1, 2, 3, 40, 40), (2, 40, 3, 40)):
        assert_refused(torch.zeros(shape, dtype=torch.uint8), f"{list(shape)}", "no layout with")
    for values, layout, said in (
        (torch.zeros(3, 40, 40), "whc", "layout is 'whc'; it must be one of hwc, chw, fhwc, fchw"),
        (torch.zeros(3, 40, 40), "hwc", r"shape \[3, 40, 40\] have not the layout 'hwc'"),
        (np.zeros((40, 40, 3)), "fhwc", r"shape \[40, 40, 3\] have not the layout 'fhwc'"),
    ):
        with pytest.raises(ValueError, match=said):
            Pixels(values, layout)
    assert_refused(Pixels(torch.zeros(3, 40, 40), "chw"), "Pixels", "float32 in the shape [40, 40")


def test_tensors_that_are_not_in_memory() -> None:
    uint8 = torch.zeros(3, 40, 40, dtype=torch.uint8)
    for tensor, reason in ((uint8.to("meta"), "no data"), (uint8.to_sparse(), "Sparse")):
        for image in (tensor, Pixels(tensor, "chw")):
            assert_refused(image, "uint8 in the shape [3, 40, 40]; expected uint8 in mem", reason)
    floats = torch.zeros(3, 40, 40, dtype=torch.bfloat16)  # of which NumPy knows nothing
    assert_refused(Pixels(floats, "chw"), "bfloat16 in the shape [3, 40, 40]", "expected uint8")


def test_rows_and_files_that_hold_no_image(tmp_path: Path) -> None:
    assert_refused({"bytes": None, "path": None}, "dict", "one of them not None")
    assert_refused({"bytes": b"x", "label": 3}, "dict", "it has bytes, label")
    assert_refused({"bytes": "text", "path": "a/b.png"}, "a/b.png", "bytes is a str")
    assert_refused({"bytes": b"text", "path": "a/b.png"}, "a/b.png", "not an image")
    assert_refused({"path": str(tmp_path / "no.png")}, "no.png", "No such file")
    assert_refused({"path": True}, "dict", "path is a bool")
    assert_refused(io.BytesIO(b"x"), "BytesIO", "not an image")
    assert_refused(io.BytesIO(), "BytesIO", "empty")
    assert_refused(io.StringIO("text"), "StringIO", "not open in binary mode")
    (tmp_path / "photo.png").write_bytes(encoded("PNG"))
    with open(tmp_path / "photo.png", "rb") as file:
        pass
    assert_refused(file, "photo.png", "closed file")


def test_one_image_is_no_list_of_images() -> None:
    """What could be iterated over would give its keys, lines or rows as images."""
    one = [{"bytes": b"", "path": "a.png"}, io.BytesIO(b"x"), torch.zeros(3, 4, 5), b"", "a.png"]
    one += [bytearray(b"x"), memoryview(b"x")]
    for image in [*one, Pixels(torch.zeros(3, 4, 4), "chw"), Path("a.png"), photo()]:
        with pytest.raises(ValueError, match=r"images is one image, .*: \[image\]"):
            check_images(image)
    with pytest.raises(ValueError, match=r"one array of shape \[2, 3, 4, 5\]; give \[array\] if"):
        check_images(torch.zeros(2, 3, 4, 5))
    for nothing in (True, 5, None):
        with pytest.raises(ValueError, match="images is a .*; give a list of images"):
            check_images(nothing)


def test_decompression_bombs_follow_pillows_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded("PNG")  # 4800 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2399)
    with pytest.raises(ImageError, match=r"^big\.png: .*4800 pixels.*limit of 4798.*--max-"):
        PROCESSOR.prepare(content, name="big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2400)
    with pytest.warns(Image.DecompressionBombWarning, match="4800 pixels"):
        PROCESSOR.prepare(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    PROCESSOR.prepare(content)


@pytest.mark.filterwarnings("ignore")  # Pillow comments on what it finds in broken files
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_broken_bytes_give_pixels_or_an_image_error(file_format: str) -> None:
    content = encoded(file_format)
    messages: list[str] = []

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(
        changes=st.lists(
            st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=20
        ),
        # Headers are where most can go wrong.
        header=st.lists(st.tuples(st.integers(0, 63), st.integers(0, 255)), max_size=3),
        length=st.integers(0, len(content)) | st.just(len(content)),
    )
    def check(changes, header, length) -> None:
        broken = bytearray(content)
        for position, value in changes + header:
            broken[position] = value
        try:
            prepared = PROCESSOR.prepare(bytes(broken[:length]), name="broken image")
        except ImageError as error:
            messages.append(str(error))
            return
        _, h, w = prepared.grid_thw
        assert prepared.pixels.shape == (1, 14 * h, 14 * w, 3)

    check()
    assert messages
    assert all(message.startswith("broken image: ") for message in messages)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 0}, "patch_size is 0"),
        ({"merge_size": -1}, "merge_size is -1"),
        ({"temporal_patch_size": 0}, "temporal_patch_size is 0"),
        ({"min_pixels": 0}, "min_pixels is 0"),
        ({"min_pixels": 5000, "max_pixels": 4000}, "4000 is below min_pixels 5000: give both"),
        ({"min_pixels": 1, "max_pixels": 783}, "max_pixels is 783.*28 x 28 = 784"),
        ({"resize": "lanczos"}, "resize is 'lanczos'.*pillow.*torch"),
    ],
)
def test_bad_processor_settings(change: dict, message: str) -> None:
    settings = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    limits = {"min_pixels": 3136, "max_pixels": 12845056}
    with pytest.raises(ValueError, match=message):
        ImageProcessor(**{**settings, **limits, **change})


def test_bad_normalisation() -> None:
    with pytest.raises(ValueError, match="three values each"):
        normalisation_table((0.5,), (0.5, 0.5, 0.5), "pillow")
    with pytest.raises(ValueError, match="without zeros"):
        normalisation_table((0.5, 0.5, 0.5), (0.5, 0.0, 0.5), "pillow")
    with pytest.raises(ValueError, match="resize is 'gpu'"):
        normalisation_table((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "gpu")
