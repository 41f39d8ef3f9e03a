"""vitrt verify: its errors are right, and what is wrong does not pass."""

from __future__ import annotations

import importlib.util
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

import vitrt.encoder
from tests.support.checkpoints import reference_tower
from tests.support.videos import write_video
from vitrt.attention import registry, sdpa
from vitrt.attention.base import BackendSpec
from vitrt.checkpoint.extract import extract_tower
from vitrt.checkpoint.opened import open_checkpoint
from vitrt.cli import main
from vitrt.commands.console import FAILED, OK
from vitrt.compare.errors import Errors, cosines
from vitrt.compare.sample_images import SIZES, choose_images, sample_image, sample_images
from vitrt.compare.verify import verify
from vitrt.compare.verify_table import Row, table_lines
from vitrt.config import RuntimeConfig
from vitrt.kernels.segments import Rotary, Segments

FAMILIES = ("tiny_qwen2_5_vl", "tiny_qwen3_vl")
CPU = RuntimeConfig(device="cpu")


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    sample_image(90, 150, 7).save(folder / "a.png")
    upright = sample_image(120, 100, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    upright.save(folder / "b.jpg", exif=exif)
    return folder


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected).norm() / expected.norm())


def transformers_errors(folder: Path, images: list[Any], limits: tuple[int, int]) -> list[float]:
    """The error of bfloat16 over all images, each through transformers alone."""
    config = open_checkpoint(folder).preprocessor_config()
    processor = Qwen2VLImageProcessorPil(
        patch_size=config.patch_size,
        min_pixels=limits[0],
        max_pixels=limits[1],
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
    )
    towers = reference_tower(folder), reference_tower(folder, torch.bfloat16)
    outputs: list[list[list[Tensor]]] = [[], []]
    for image in images:
        inputs = processor(images=[image], return_tensors="pt")
        for tower, output, dtype in zip(
            towers, outputs, (torch.float32, torch.bfloat16), strict=True
        ):
            with torch.inference_mode():
                out = tower(inputs["pixel_values"].to(dtype), grid_thw=inputs["image_grid_thw"])
            output.append([out.pooler_output, *(getattr(out, "deepstack_features", None) or ())])
    exact, rounded = (
        [torch.cat(column) for column in zip(*images, strict=True)] for images in outputs
    )
    return [relative_l2(*pair) for pair in zip(rounded, exact, strict=True)]


def test_every_mode_passes_and_errors_are_right(folder: Path):
    checkpoint = open_checkpoint(folder)
    images = sample_images()[:3]
    result = verify(checkpoint, CPU, images)
    assert result.passed and result.images == 3 and not result.differing
    assert [(row.dtype, row.ours) for row in result.rows] == [
        (torch.float32, True),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    ]
    exact, peer, ours = result.rows
    assert 0 < exact.errors.worst <= 1e-5 and exact.ratio is None
    limits = checkpoint.preprocessor_config()
    wanted = transformers_errors(folder, images, (limits.min_pixels, limits.max_pixels))
    # bfloat16 rounds differently in a batch of another size, so only nearly the same.
    assert [peer.errors.embeddings, *peer.errors.deepstack] == pytest.approx(wanted, rel=0.1)
    assert peer.ratio == 1 and 0.3 < ours.ratio <= 1.05
    text = "\n".join(table_lines(result))
    assert "2 of 2 ways to run it within their bounds" in text and "OVER" not in text
    assert f"{ours.errors.embeddings:.2e}" in text
    assert "not run: triton in float32, bfloat16: " in text


def test_command_line_on_the_users_images(
    folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["verify", str(folder), str(photos), "--device", "cpu", "--dtype", "float32"]
    assert main(command) == OK
    out = capsys.readouterr().out
    assert " 2 images, " in out and "pixel values bit-equal to its image processor's: 2 of 2" in out
    assert "1 of 1 ways to run it within their bounds" in out and "bfloat16" not in out


def test_pixel_limits_hold_for_both_sides(tiny_qwen3_vl: Path, photos: Path):
    runtime = RuntimeConfig(device="cpu", dtype="float32", min_pixels=40000, max_pixels=50000)
    result = verify(open_checkpoint(tiny_qwen3_vl), runtime, [str(photos / "a.png")])
    assert result.passed and not result.differing
    assert 40000 // 256 <= result.patches <= 50000 // 256


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="older transformers drop alpha"
)
def test_transparency_is_laid_onto_white_on_both_sides(tiny_qwen3_vl: Path, tmp_path: Path):
    image = sample_image(90, 150)
    grey = image.convert("L")
    grey.save(tmp_path / "grey.png", transparency=grey.getpixel((0, 0)))
    image.convert("P").save(tmp_path / "palette.png", transparency=bytes(range(256)))
    image.save(tmp_path / "colours.png", transparency=image.getpixel((0, 0)))
    alpha = image.convert("RGBA")
    alpha.putalpha(grey)
    alpha.save(tmp_path / "alpha.png")
    runtime = RuntimeConfig(device="cpu", dtype="float32")
    names = sorted(map(str, tmp_path.iterdir()))
    result = verify(open_checkpoint(tiny_qwen3_vl), runtime, [*names, alpha])
    assert result.images == 5 and result.passed and not result.differing


def test_an_extracted_tower_is_enough(folder: Path, tmp_path: Path):
    extract_tower(open_checkpoint(folder), tmp_path / "tower")
    runtime = RuntimeConfig(device="cpu", dtype="float32")
    result = verify(open_checkpoint(tmp_path / "tower"), runtime, sample_images()[:1])
    assert result.passed and len(result.rows) == 1


class Spoilt:
    """sdpa, all but right, or not at all."""

    name = "spoilt"
    capturable = True
    applies_rotary = False

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.backend = sdpa.SdpaBackend()

    def __call__(
        self, qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor | None = None
    ) -> Tensor:
        if not self.factor:
            raise RuntimeError("no kernel image\nis available")
        return self.backend(qkv, segments, rotary, out).mul_(self.factor)


@pytest.mark.parametrize(
    ("factor", "line"),
    [(1.001, "1e-05 OVER"), (math.nan, "inf"), (0.0, "failed: no kernel image")],
)
def test_a_backend_that_is_wrong_does_not_pass(
    tiny_qwen3_vl: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    factor: float,
    line: str,
):
    spec = BackendSpec("spoilt", lambda *_: Spoilt(factor), lambda *_: None)
    monkeypatch.setitem(registry._SPECS, "spoilt", spec)
    command = ["verify", str(tiny_qwen3_vl), "--device", "cpu", "--dtype", "float32"]
    assert main(command) == FAILED
    out = capsys.readouterr().out
    rows = {row.split()[1]: row for row in out.splitlines() if row.startswith("float32")}
    assert line in rows["spoilt"] and rows["sdpa"].endswith("1e-05 ok")
    assert "1 of 2 ways to run it within their bounds" in out


def test_a_backend_whose_windows_are_too_small_is_left_out(
    tiny_qwen2_5_vl: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """It is a limit of the backend, as a head size is, and nothing that went wrong."""
    spec = BackendSpec("narrow", lambda *_: sdpa.SdpaBackend(), lambda *_: None, most_window=63)
    monkeypatch.setitem(registry._SPECS, "narrow", spec)
    command = [str(tiny_qwen2_5_vl), "--device", "cpu", "--dtype", "float32"]
    assert main(["verify", *command]) == OK
    out = capsys.readouterr().out
    reason = "takes windows of at most 63 patches, and this tower's have up to 64"
    assert f"not run: narrow in float32: {reason}" in out
    assert "1 of 1 ways to run it within their bounds" in out
    assert main(["info", *command]) == OK
    assert f"narrow   no: {reason}" in capsys.readouterr().out


def test_fp8_is_measured_image_by_image_and_has_no_bound(
    folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
):
    options = ["--device", "cpu", "--precision", "fp8", "--fp8-skip-blocks", "0"]
    options += ["--min-pixels", "400000", "--max-pixels", "500000"]  # enough rows to pay
    assert main(["verify", str(folder), str(photos), *options]) == OK
    out = capsys.readouterr().out
    rows = {row.split()[0]: row.split() for row in out.splitlines() if " off " in row}
    assert rows["bfloat16"][-1] == "ok" and rows["fp8"][-1] == "none"
    assert float(rows["fp8"][3]) > 2 * float(rows["bfloat16"][3])  # fewer bits
    head, first, second, worst = out[out.index("cosine with") :].splitlines()[1:5]
    assert head.split() == ["bfloat16", "transformers", "bfloat16", "sdpa", "fp8", "sdpa"]
    assert first.endswith("a.png") and second.endswith("b.jpg") and worst.endswith("the worst")
    table = np.array(
        [[float(cell) for cell in line.split()[:3]] for line in (first, second, worst)]
    )
    np.testing.assert_array_equal(table[:2].min(axis=0), table[2])
    assert (table[:, 2] < table[:, 1]).all() and (table > 0.9).all()


def test_fp8_needs_a_dtype_for_the_rest(tiny_qwen3_vl: Path):
    runtime = RuntimeConfig(device="cpu", dtype="float32", precision="fp8")
    with pytest.raises(ValueError, match="needs dtype bfloat16"):
        verify(open_checkpoint(tiny_qwen3_vl), runtime, sample_images()[:1])


def test_cosines_are_those_of_each_image():
    exact = torch.randn(5, 8, dtype=torch.float64)
    other = exact.clone()
    other[3:] = torch.nan
    other[:3] *= 2
    assert cosines((other, ()), (exact, ()), [3, 2]) == (pytest.approx(1.0), -1.0)


def test_rounding_more_than_transformers_does_not_pass(
    tiny_qwen2_5_vl: Path, monkeypatch: pytest.MonkeyPatch
):
    """An error of about the size of bfloat16's own roundings, on top of them."""
    spec = BackendSpec("spoilt", lambda *_: Spoilt(1.03), lambda *_: None)
    monkeypatch.setitem(registry._SPECS, "spoilt", spec)
    runtime = RuntimeConfig(device="cpu", dtype="bfloat16")
    result = verify(open_checkpoint(tiny_qwen2_5_vl), runtime, sample_images()[:1])
    verdicts = {row.name: row.within for row in result.rows}
    assert verdicts == {"transformers": True, "sdpa": True, "spoilt": False}
    assert not result.passed


def test_other_pixels_do_not_pass(tiny_qwen3_vl: Path, monkeypatch: pytest.MonkeyPatch):
    """Half a level off in every pixel."""
    table = vitrt.encoder.level_tables
    monkeypatch.setattr(vitrt.encoder, "level_tables", lambda *a: table(*a) + np.float32(1 / 255))
    runtime = RuntimeConfig(device="cpu", dtype="float32")
    result = verify(open_checkpoint(tiny_qwen3_vl), runtime, sample_images()[:2])
    assert len(result.differing) == 2 and not result.passed
    assert "  not those of PIL image (RGB, 560 x 420)" in list(table_lines(result))


def test_without_transformers(
    tiny_qwen3_vl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    assert main(["verify", str(tiny_qwen3_vl)]) == FAILED
    assert "pip install 'vitrt[transformers]'" in capsys.readouterr().err


def row(errors: Errors | None, peer: Errors | None, ours: bool = True) -> Row:
    return Row(torch.bfloat16, "sdpa", False, errors, peer, ours=ours)


def test_bounds():
    peer = Errors(0.01, (0.02, 0.03))
    assert row(Errors(0.0105, (0.02, 0.03)), peer).within
    assert not row(Errors(0.0106, (0.02, 0.03)), peer).within
    assert not row(Errors(0.005, (0.01, 0.0316)), peer).within  # every level counts
    assert row(Errors(0.005, (0.01, 0.015)), peer).ratio == pytest.approx(0.5)
    assert not row(Errors(math.inf, (0.01, 0.01)), peer).within
    # Where transformers itself overflows, nothing can be compared, so nothing is promised.
    assert not row(Errors(math.inf, ()), Errors(math.inf, ())).within
    assert not row(None, peer).within
    assert row(Errors(1.0, ()), Errors(0.1, ()), ours=False).within
    assert row(Errors(1e-5, ()), None).within and not row(Errors(1.1e-5, ()), None).within


def test_which_images(photos: Path, caplog: pytest.LogCaptureFixture):
    assert [image.size[::-1] for image in choose_images([])] == list(SIZES)
    assert [Path(image).name for image in choose_images([str(photos)])] == ["a.png", "b.jpg"]
    with caplog.at_level("INFO", "vitrt"):
        assert len(choose_images([str(photos)], 1)) == 1
    assert "taking the first 1 image" in caplog.text
    with pytest.raises(ValueError, match="at least 1, got 0"):
        choose_images([str(photos)], 0)


def test_bad_images_are_named(
    tiny_qwen3_vl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["verify", str(tiny_qwen3_vl)]
    assert main([*command, str(tmp_path / "gone.png")]) == FAILED
    assert "gone.png" in capsys.readouterr().err
    assert main([*command, str(tmp_path)]) == FAILED
    assert "no image in" in capsys.readouterr().err
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    assert main([*command, str(tmp_path)]) == FAILED
    assert "broken.png" in capsys.readouterr().err


def test_made_up_images_are_like_photographs():
    """The same each time, and smooth: most of what neighbouring pixels say is the same."""
    for height, width in SIZES:
        image = np.asarray(sample_image(height, width)).astype(float)
        assert image.shape == (height, width, 3)
        assert np.array_equal(image, np.asarray(sample_image(height, width)))
        steps = np.abs(np.diff(image, axis=0)).mean()
        shuffled = np.random.default_rng(0).permutation(image)
        assert image.std() > 30 and steps < np.abs(np.diff(shuffled, axis=0)).mean() / 3


@pytest.mark.gpu
def test_every_backend_and_mode_of_a_gpu(folder: Path):
    result = verify(open_checkpoint(folder), RuntimeConfig(device="cuda"), sample_images())
    table = "\n".join(table_lines(result))
    assert result.passed, table
    assert {(row.dtype, row.graphs) for row in result.rows if row.ours} == {
        (dtype, graphs) for dtype in (torch.float32, torch.bfloat16) for graphs in (False, True)
    }
    assert not any("no graph" in row.note for row in result.rows), table


def test_videos_are_passed_over(photos: Path, tmp_path: Path):
    inputs = shutil.copytree(photos, tmp_path / "in")
    write_video(inputs / "a.mp4")
    assert choose_images([str(inputs)]) == [str(inputs / "a.png"), str(inputs / "b.jpg")]
