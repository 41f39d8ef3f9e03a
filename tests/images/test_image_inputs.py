"""Everything an image can be given as: files, bytes, PIL images, arrays, clips, threads."""

from __future__ import annotations

import base64
import io
import logging
import textwrap
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageFile, JpegImagePlugin
from transformers.image_utils import load_image

from vitrt import ImageError, Pixels
from vitrt.images.levels import patches_reference
from vitrt.images.pixels import copy_pixels
from vitrt.images.processor import ImageProcessor
from vitrt.images.resize import resize_pillow, resize_torch

LEVELS = np.tile(np.arange(256, dtype=np.float32), (3, 1))


def processor(resize: str = "pillow") -> ImageProcessor:
    return ImageProcessor(14, 2, 2, 56 * 56, 28 * 28 * 64, resize)


def photo(height: int = 90, width: int = 150, seed: int = 0) -> Image.Image:
    """Smooth colours: survives JPEG, and no two corners look alike."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels(image, resize: str = "pillow") -> np.ndarray:
    return processor(resize).prepare(image).pixels


@pytest.mark.parametrize("resize", ["pillow", "torch"])
def test_path_string_bytes_pil_and_array_agree(tmp_path: Path, resize: str) -> None:
    path = tmp_path / "photo ü.png"
    photo().save(path)
    expected = pixels(np.asarray(photo()), resize)
    content = path.read_bytes()
    base64_content = base64.b64encode(content).decode()
    lines = "%0A".join(textwrap.wrap(base64_content, 76))
    urls = [
        path.as_uri(),  # with an escaped umlaut and a space
        f"file:{path}",
        f"FILE://localhost{path}",
        f"data:image/png;base64,{base64_content}",
        f"data:;BASE64,{lines.replace('+', '%2B')}",
        "data:image/png," + urllib.parse.quote_from_bytes(content),
    ]
    rows = [
        {"bytes": content, "path": "elsewhere/x.png"},
        {"bytes": content},
        {"bytes": None, "path": str(path)},
        {"path": path.as_uri()},
    ]
    buffer = io.BytesIO(content)
    buffer.seek(7)  # read from its start all the same
    files = [buffer, buffer, path.open("rb"), fsspec.open(str(path)), fsspec.open(f"file://{path}")]
    hwc = torch.from_numpy(np.array(photo()))
    chw = hwc.permute(2, 0, 1).contiguous()
    tensors = [hwc, chw, Pixels(hwc, "hwc"), Pixels(chw, "chw"), Pixels(chw.numpy(), "chw")]
    buffers = [bytearray(content), memoryview(content)]
    for same in (
        path,
        content,
        *buffers,
        photo(),
        Image.open(path),
        *urls,
        *rows,
        *files,
        *tensors,
    ):
        assert processor(resize).grid_of(same) == processor(resize).grid(90, 150)
        np.testing.assert_array_equal(pixels(same, resize), expected)


def test_pixels_of_three_rows_are_taken_by_the_name_of_their_layout() -> None:
    tall, wide = np.asarray(photo(3, 90)), np.asarray(photo(90, 3))
    for image, other in ((tall, "chw"), (wide, "hwc")):
        tensor = torch.from_numpy(np.array(image))
        if other == "chw":
            tensor = tensor.permute(2, 0, 1)
        assert tensor.shape[0] == 3 or tensor.shape[-1] == 3
        np.testing.assert_array_equal(pixels(Pixels(tensor, other)), pixels(image))
    square = torch.from_numpy(np.array(photo(3, 3)))
    np.testing.assert_array_equal(pixels(Pixels(square, "hwc")), pixels(np.asarray(photo(3, 3))))


def test_pixels_are_an_array_without_masked_values() -> None:
    masked = np.ma.masked_array(np.asarray(photo()), mask=True)
    with pytest.raises(ImageError, match=r"masked values; array\.filled"):
        processor().prepare(Pixels(masked, "hwc"))
    for values in ([[[1, 2, 3]]], photo()):
        with pytest.raises(ValueError, match=r"the pixels are a (list|Image); they must be a"):
            Pixels(values, "hwc")


def test_tensors_of_clips() -> None:
    clip = np.stack([np.asarray(photo(seed=seed)) for seed in range(4)])
    expected = processor().prepare(clip)
    fhwc = torch.from_numpy(clip)
    fchw = fhwc.permute(0, 3, 1, 2).contiguous()
    for same in (fhwc, fchw, Pixels(fhwc, "fhwc"), Pixels(fchw, "fchw")):
        prepared = processor().prepare(same)
        assert prepared.grid_thw == expected.grid_thw == processor().grid_of(same)
        np.testing.assert_array_equal(prepared.pixels, expected.pixels)


def test_threads_may_share_one_open_file() -> None:
    content = encoded(photo(400, 900))
    expected, shared = pixels(content), io.BytesIO(content)
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(lambda _: pixels(shared), range(64)):
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path: Path, orientation: int, file_format: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / "photo"
    path.write_bytes(encoded(photo(), file_format, exif=exif))
    upright = load_image(str(path))
    assert upright.size == ((150, 90) if orientation < 5 else (90, 150))
    for source in (path, path.read_bytes(), Image.open(path)):
        np.testing.assert_array_equal(pixels(source), pixels(np.asarray(upright)))


def test_a_pil_image_that_was_turned_upright_is_not_turned_again() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    upright = load_image(Image.open(io.BytesIO(encoded(photo(), "JPEG", exif=exif))))
    np.testing.assert_array_equal(pixels(upright), pixels(np.asarray(upright)))


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation_counts(file_format: str) -> None:
    frames = [photo(seed=1), photo(seed=2), photo(seed=3)]
    options = {"lossless": True} if file_format == "WEBP" else {}
    content = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(content)), "n_frames", 1) == 3
    first = load_image(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(pixels(content), pixels(np.asarray(first)))
    assert not np.array_equal(pixels(content), pixels(frames[1]))


def test_jpeg_is_decoded_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's draft mode would decode at an eighth of the size, with other pixels."""
    monkeypatch.delattr(JpegImagePlugin.JpegImageFile, "draft")
    content = encoded(photo(2400, 2400), "JPEG")
    whole = Image.open(io.BytesIO(content)).convert("RGB")
    np.testing.assert_array_equal(pixels(content), pixels(np.asarray(whole)))


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.round(rgb * share + 255 * (1 - share))


def test_transparency_is_laid_onto_white() -> None:
    size = 84, 112  # of whole tokens: nothing is resized
    rgba = photo(*size).convert("RGBA")
    alpha = np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8)
    alpha[0] = 0
    rgba.putalpha(Image.fromarray(alpha))
    for image in (rgba, encoded(rgba), rgba.convert("LA")):
        plain = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
        colours = np.asarray(plain.convert("RGBA"))
        result = pixels(image)[0].astype(int)
        assert np.abs(result - over_white(colours[..., :3], alpha)).max() <= 1
        assert (result[0] == 255).all()
    opaque = photo(*size).convert("RGBA")
    np.testing.assert_array_equal(pixels(opaque), pixels(photo(*size)))


@pytest.mark.filterwarnings("error")
def test_transparent_levels_and_colours_are_white() -> None:
    palette = photo(84, 112).quantize(16)
    index = np.asarray(palette)
    palette.info["transparency"] = bytes([0] * 8 + [255] * 8)
    content = encoded(palette, transparency=palette.info["transparency"])
    expected = np.where((index < 8)[..., None], 255, np.asarray(palette.convert("RGBA"))[..., :3])
    np.testing.assert_array_equal(pixels(palette)[0], expected)
    np.testing.assert_array_equal(pixels(content)[0], expected)
    assert palette.info["transparency"] == bytes([0] * 8 + [255] * 8)  # left as it was
    grey = photo(84, 112).convert("L")
    level = grey.getpixel((5, 5))
    levels = np.asarray(grey)
    expected = np.repeat(np.where(levels == level, 255, levels)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(pixels(encoded(grey, transparency=level))[0], expected)


@pytest.mark.parametrize(
    ("values", "mode", "warns"),
    [
        (np.array([[0, 255], [1, 2]], np.uint16), "I;16", False),
        (np.array([[0, 256], [1, 2]], np.uint16), "I;16", True),
        (np.array([[0, -1], [1, 2]], np.int32), "I", True),
        (np.array([[0, 0.5], [1, 1]], np.float32), "F", True),
        (np.array([[0, 200.0], [1, 1]], np.float32), "F", False),
    ],
)
def test_clipping_to_8_bits_is_logged(
    values: np.ndarray, mode: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    image = Image.fromarray(values)
    assert image.mode == mode
    with caplog.at_level(logging.WARNING, "vitrt"):
        processor().prepare(image, name="depth.png")
    assert [f"depth.png: mode {mode}" in text for text in caplog.messages] == [True] * warns


@pytest.mark.parametrize("resize", ["pillow", "torch"])
def test_arrays_of_every_layout(resize: str) -> None:
    rgb = np.asarray(photo())
    grey = rgb[..., 0]
    thrice = np.stack([grey] * 3, axis=-1)
    np.testing.assert_array_equal(pixels(grey, resize), pixels(thrice, resize))
    np.testing.assert_array_equal(pixels(grey[..., None], resize), pixels(thrice, resize))
    flipped = rgb[::-1, ::-1, ::-1]  # negative strides, not writable
    np.testing.assert_array_equal(pixels(flipped, resize), pixels(flipped.copy(), resize))
    assert not np.shares_memory(pixels(rgb, resize), rgb)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("resize", ["pillow", "torch"])
def test_an_image_of_the_right_size_keeps_its_pixels(resize: str) -> None:
    image = photo(112, 224)
    prepared = processor(resize).prepare(image)
    np.testing.assert_array_equal(prepared.pixels[0], np.asarray(image))
    prepared.pixels[:] = 0  # writable, and not the caller's memory
    assert image.getextrema() == photo(112, 224).getextrema()


@pytest.mark.parametrize("resize", ["pillow", "torch"])
@pytest.mark.parametrize("frames", [2, 5])
def test_a_clip_is_its_frames_and_the_last_one_repeated(frames: int, resize: str) -> None:
    clip = np.stack([np.asarray(photo(seed=seed)) for seed in range(frames)])
    prepared = processor(resize).prepare(clip)
    grid_t = (frames + 1) // 2
    assert prepared.grid_thw == (grid_t, *processor().grid(90, 150)[1:])
    assert prepared.pixels.shape[0] == 2 * grid_t
    for index in range(2 * grid_t):
        frame = pixels(clip[min(index, frames - 1)], resize)[0]
        np.testing.assert_array_equal(prepared.pixels[index], frame)


@pytest.mark.parametrize("frames", [1, 4, 7])
def test_a_span_of_a_clip_is_that_part_of_the_whole(frames: int) -> None:
    clip = np.stack([np.asarray(photo(seed=seed)) for seed in range(frames)])
    whole = processor().prepare(clip)
    t, h, w = whole.grid_thw
    for start in range(t):
        for stop in range(start + 1, t + 1):
            part = processor().prepare(clip, span=(start, stop))
            assert part.grid_thw == (stop - start, h, w)
            np.testing.assert_array_equal(part.pixels, whole.pixels[2 * start : 2 * stop])


def test_the_grid_is_known_from_a_header_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo().save(tmp_path / "upright.png")
    photo().save(tmp_path / "turned.jpg", exif=exif)
    clip = np.zeros((5, 90, 150, 3), np.uint8)
    content = (tmp_path / "turned.jpg").read_bytes()
    images = [tmp_path / "upright.png", str(tmp_path / "turned.jpg"), content, photo(), clip]
    images.append(Image.open(tmp_path / "turned.jpg"))
    expected = [processor().prepare(image).grid_thw for image in images]
    assert len(set(expected)) == 3  # upright, turned, and a clip
    images[-1] = Image.open(tmp_path / "turned.jpg")

    def decoded(image: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", decoded)
    assert [processor().grid_of(image) for image in images] == expected


def test_patches_of_a_clip_are_ordered_as_transformers_orders_video() -> None:
    """Each value is looked up where the definition of the order says it lies."""
    clip = np.stack([np.asarray(photo(84, 112, seed=seed)) for seed in range(3)])
    prepared = processor().prepare(clip)
    t, h, w = prepared.grid_thw
    patches = patches_reference(prepared, LEVELS, 14, 2, 2)
    assert patches.shape == (t * h * w, 3 * 2 * 14 * 14)
    row = 0
    for frame in range(t):
        for top in range(0, h, 2):
            for left in range(0, w, 2):
                for y, x in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                    pair = prepared.pixels[2 * frame : 2 * frame + 2]
                    pair = pair[:, 14 * y : 14 * y + 14, 14 * x : 14 * x + 14]
                    expected = pair.transpose(3, 0, 1, 2).reshape(-1)
                    np.testing.assert_array_equal(patches[row], expected)
                    row += 1


@pytest.mark.parametrize("resize", ["pillow", "torch"])
def test_threads_may_share_one_lazy_pil_image(resize: str) -> None:
    """Pillow loads pixels and EXIF on first use without a lock; `encode([image] * 8)` must work."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    noise = np.random.default_rng(0).integers(0, 256, (400, 900, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), "JPEG", exif=exif)  # read in several blocks
    expected = pixels(content, resize)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            shared = Image.open(io.BytesIO(content))
            start = threading.Barrier(8)

            def prepare(shared=shared, start=start) -> np.ndarray:
                start.wait()
                return pixels(shared, resize)

            for future in [pool.submit(prepare) for _ in range(8)]:
                np.testing.assert_array_equal(future.result(), expected)


def test_pillow_keeps_its_global_settings() -> None:
    truncated, limit = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    processor().prepare(encoded(photo(), "JPEG"))
    assert truncated == ImageFile.LOAD_TRUNCATED_IMAGES
    assert limit == Image.MAX_IMAGE_PIXELS


def test_the_two_resizes_differ_by_little() -> None:
    image = photo(333, 777)
    ours = np.asarray(resize_pillow(image, (112, 252)))
    other = resize_torch(np.asarray(image), (112, 252))
    difference = np.abs(ours.astype(int) - other.astype(int))
    assert 0 < difference.max() <= 2
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (448, 448), (2400, 2300)])  # the last in pieces
def test_pixels_are_what_numpy_makes_of_the_image(size: tuple[int, int]) -> None:
    height, width = size
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    frames = np.zeros((2, height, width, 3), dtype=np.uint8)
    copy_pixels(image, frames[1])
    np.testing.assert_array_equal(frames[1], np.asarray(image))
    assert not frames[0].any()


def test_pixels_are_not_copied_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    image, out = Image.new("RGB", (64, 32), (1, 2, 3)), np.empty((32, 64, 3), dtype=np.uint8)
    monkeypatch.delattr(Image.Image, "tobytes")  # which would hold the GIL
    copy_pixels(image, out)
    assert (out == (1, 2, 3)).all()


def test_pixels_of_a_file_that_was_closed() -> None:
    with Image.open(io.BytesIO(encoded(photo(), "PNG"))) as image:
        image.load()
    out = np.empty((image.height, image.width, 3), dtype=np.uint8)
    copy_pixels(image, out)
    np.testing.assert_array_equal(out, np.asarray(image))
