"""vitrt show: the components are the principal ones, and every cell is where it belongs."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.commands import Vitrt, vitrt
from tests.support.folders import file_size_limit, photo
from vitrt import ImageFeatures, VisionEncoder
from vitrt.cli import main
from vitrt.commands.console import FAILED, OK
from vitrt.commands.feature_picture import (
    SIDE,
    Panel,
    arrange,
    panels_of,
    principal_colours,
    save_picture,
)
from vitrt.compare.sample_images import sample_image

__all__ = ["vitrt"]  # a fixture


@pytest.mark.parametrize("shape", [(9, 7, 40), (30, 31, 12), (5, 2, 3)])
def test_components_are_those_of_a_singular_value_decomposition(shape: tuple[int, int, int]):
    """More features than cells and the other way round, against numpy in float64."""
    rng = np.random.default_rng(0)
    h, w, width = shape
    # Components of clearly different size, in random directions.
    basis = np.linalg.qr(rng.standard_normal((width, width)))[0]
    grid = rng.standard_normal((h * w, width)) * 0.7 ** np.arange(width) @ basis
    unit = grid / np.linalg.norm(grid, axis=1, keepdims=True)
    centred = unit - unit.mean(axis=0)
    u, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    wanted = u[:, :3] * sizes[:3]
    wanted *= np.sign(wanted[np.abs(wanted).argmax(axis=0), range(3)])
    low, high = np.quantile(wanted, [0.01, 0.99], axis=0)
    wanted = ((wanted - low) / (high - low)).clip(0, 1).reshape(h, w, 3)

    colours, share = principal_colours(torch.from_numpy(grid).float().view(h, w, width))
    assert colours.dtype == torch.uint8 and colours.shape == (h, w, 3)
    np.testing.assert_allclose(colours.numpy() / 255, wanted, atol=1 / 255)
    assert share == pytest.approx((sizes[:3] ** 2).sum() / (sizes**2).sum(), abs=1e-4)


def test_long_cells_do_not_hide_the_rest():
    grid = torch.randn(8, 8, 16, generator=torch.Generator().manual_seed(0))
    longer = grid.clone()
    longer[3, 4] *= 1000
    assert torch.equal(principal_colours(grid)[0], principal_colours(longer)[0])


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 2, 8), (6, 4, 8), (4, 4, 1)])
def test_nothing_to_tell_apart_is_grey(shape: tuple[int, int, int]):
    colours, share = principal_colours(torch.ones(shape))
    assert (colours == 128).all() and share == 1
    assert (principal_colours(torch.zeros(shape))[0] == 128).all()


def test_panels_show_each_cell_at_its_place():
    """Features that name their cell: one corner unlike all others."""
    h, w, merge = 6, 10, 2
    tokens = torch.eye(4)[torch.zeros(15, dtype=torch.long)].clone()
    tokens[4] = torch.tensor([0.0, 1, 0, 0])  # row 0, last column
    deepstack = tokens.roll(10, 0)[None].repeat(2, 1, 1)  # row 2, last column
    hidden = torch.eye(4)[torch.zeros(h * w, dtype=torch.long)].view(1, 1, h, w, 4).clone()
    hidden[0, 0, 5, 0] = torch.tensor([0.0, 0, 1, 0])
    features = ImageFeatures(tokens, deepstack, (1, h, w), merge, hidden, (3,))
    panels = list(panels_of(features, (8, 16)))
    assert [panel.label.split(":")[0] for panel in panels] == [
        "embeddings",
        "deepstack 0, layer 8",
        "deepstack 1, layer 16",
        "layer 3",
    ]
    for panel, size, place in zip(
        panels,
        [(5, 3), (5, 3), (5, 3), (10, 6)],
        [(0, 4), (2, 4), (2, 4), (5, 0)],
        strict=True,
    ):
        assert panel.image.size == size
        red = np.asarray(panel.image)[..., 0].astype(int)
        assert np.unravel_index(abs(red - np.median(red)).argmax(), red.shape) == place


def test_panels_are_arranged_without_overlap():
    colours = ["red", "green", "blue", "yellow", "purple"]
    panels = [Panel(c, Image.new("RGB", (20, 10), c)) for c in colours]
    picture = np.asarray(arrange(panels)).reshape(-1, 3)
    for colour in colours:
        count = (picture == np.array(Image.new("RGB", (1, 1), colour).getpixel((0, 0)))).all(1)
        assert count.sum() == SIDE * SIDE // 2, colour


@pytest.mark.parametrize("fixture", ["tiny_qwen2_5_vl", "tiny_qwen3_vl"])
def test_command_line(
    fixture: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    folder = request.getfixturevalue(fixture)
    photo, output = tmp_path / "photo.jpg", tmp_path / "picture.png"
    sample_image(200, 300).save(photo)
    command = ["show", str(folder), str(photo), "--output", str(output), "--device", "cpu"]
    assert main(command) == OK
    assert capsys.readouterr().out.strip() == str(output)
    first = output.read_bytes()
    with Image.open(output) as picture:
        assert picture.format == "PNG" and min(picture.size) > SIDE / 2
    assert main(command) == OK
    assert output.read_bytes() == first  # the same each time
    assert main([*command, "--layers", "0,-1"]) == OK
    with Image.open(output) as larger, Image.open(photo):
        assert larger.size > picture.size


def test_two_halves_of_a_picture_show_as_two_halves(tiny_qwen3_vl: Path):
    """Noise on the left, black on the right."""
    halves = np.zeros((128, 256, 3), np.uint8)
    halves[:, :128] = np.random.default_rng(0).integers(0, 256, (128, 128, 3))
    encoder = VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cpu")
    features = encoder.encode([halves], layers=[-1])[0]
    for panel in panels_of(features):
        pixels = np.asarray(panel.image).astype(float)
        middle = pixels.shape[1] // 2
        left, right = pixels[:, :middle], pixels[:, middle:]
        between = np.abs(left.mean((0, 1)) - right.mean((0, 1))).max()
        assert between > right.std((0, 1)).max(), panel.label  # the plain half is even
        assert left.std() > right.std(), panel.label


def test_what_cannot_be_shown_is_named(
    tiny_qwen3_vl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    photo = tmp_path / "photo.png"
    sample_image(60, 60).save(photo)
    content = photo.read_bytes()
    (tmp_path / "link.png").symlink_to(photo)
    for arguments, message in (
        ([str(photo), "--output", str(tmp_path / "a.jpg")], "must end in .png"),
        ([str(photo), "--output", str(tmp_path / "no" / "a.png")], "does not exist"),
        ([str(tmp_path / "gone.png"), "--output", str(tmp_path / "a.png")], "gone.png"),
        ([str(photo), "--output", str(tmp_path / "a.png"), "--layers", "9"], "has 6 layers"),
        ([str(photo), "--output", str(photo)], "is the image itself"),
        ([str(photo), "--output", str(tmp_path / "link.png")], "is the image itself"),
    ):
        assert main(["show", str(tiny_qwen3_vl), *arguments]) == FAILED
        assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("a.*"))
    assert photo.read_bytes() == content


def test_the_image_itself_is_refused_before_a_model_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    photo = tmp_path / "photo.png"
    sample_image(60, 60).save(photo)
    assert main(["show", str(tmp_path / "no model"), str(photo), "--output", str(photo)]) == FAILED
    assert "is the image itself" in capsys.readouterr().err


def test_show_takes_what_encode_takes(tiny_qwen2_5_vl: Path, tmp_path: Path):
    encoder = VisionEncoder.from_pretrained(tiny_qwen2_5_vl, device="cpu")
    clip = np.stack([np.asarray(sample_image(112, 140, seed)) for seed in range(3)])
    with Image.open(save_picture(encoder, clip, tmp_path / "clip.png")) as picture:
        assert picture.width > 2 * SIDE or picture.height > SIDE


def test_a_picture_that_cannot_be_written_leaves_the_one_before(
    tiny_qwen3_vl: Path, tmp_path: Path, vitrt: Vitrt
) -> None:
    picture = tmp_path / "out.png"
    command = "show", tiny_qwen3_vl, photo(tmp_path / "a.png", 1), "--output", picture
    assert vitrt(*command, "--device", "cpu").code == OK
    before = picture.read_bytes()
    with file_size_limit(100):
        done = vitrt(*command, "--device", "cpu")
    assert done.code == FAILED and f"cannot write {tmp_path}" in done.err
    assert picture.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "out.png"]


def test_urls_are_images(tiny_qwen3_vl: Path, tmp_path: Path, vitrt: Vitrt) -> None:
    image = photo(tmp_path / "a b.png", 1)
    content = base64.b64encode(image.read_bytes()).decode()
    panels = []
    for source in (str(image), image.as_uri(), f"data:image/png;base64,{content}"):
        output = tmp_path / "x.png"
        done = vitrt("show", tiny_qwen3_vl, source, "--output", output, "--device", "cpu")
        assert done.code == OK, done
        panels.append(np.asarray(Image.open(tmp_path / "x.png"))[40:])  # without the label
    np.testing.assert_array_equal(panels[0], panels[1])
    assert len(panels[0]) == len(panels[2])  # which is wider, for a longer label
    done = vitrt("show", tiny_qwen3_vl, image.as_uri(), "--output", image, "--device", "cpu")
    assert done.code == FAILED and "is the image itself" in done.err
