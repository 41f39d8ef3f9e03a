"""Hidden states of chosen layers, in raster order, against transformers' own blocks.

The references here order patches by plain loops: nothing of vitrt's or transformers' index
arithmetic is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.support.checkpoints import FAMILIES, reference_tower, tiny_checkpoint
from tests.support.ranks import run_ranks
from vitrt import FeatureStore, VisionEncoder
from vitrt.cli import main
from vitrt.commands.console import FAILED, OK
from vitrt.engine.request import Request
from vitrt.parallel.context import SINGLE
from vitrt.store.check import check_folder

TOLERANCE = 1e-5  # relative L2
MERGE = 2
WINDOW = 4  # merged cells a side

# (frames of the input, merged rows, merged columns): windows cut off on either side, clips with an
# odd frame, a single row, and a column.
BATCHES = [
    [(1, 3, 5)],
    [(1, 5, 3)],
    [(1, 1, 9)],
    [(1, 7, 1)],
    [(1, 4, 8)],
    [(4, 3, 5)],
    [(5, 5, 2)],
    [(1, 2, 3), (3, 5, 6), (1, 7, 9), (2, 1, 4), (1, 3, 2)],
]


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm())


def arrays(batch: Sequence[tuple[int, int, int]], factor: int, seed: int = 0) -> list[np.ndarray]:
    """Random images and clips that need no resizing."""
    rng = np.random.default_rng(seed)
    images = []
    for frames, rows, columns in batch:
        shape = (frames, rows * factor, columns * factor, 3)
        image = rng.integers(0, 256, shape, dtype=np.uint8)
        images.append(image[0] if frames == 1 else image)
    return images


CLIPS = {"video_max_pixels": 10**8}  # of these none is resized
Place = tuple[int, int, int]  # frame, row, column of a patch


def merge_order(t: int, h: int, w: int) -> Iterator[Place]:
    """The patches of pixel_values: the four of a merged token follow each other."""
    for frame in range(t):
        for row in range(h // MERGE):
            for column in range(w // MERGE):
                yield from cell(frame, row, column)


def window_order(t: int, h: int, w: int) -> Iterator[Place]:
    """The patches of Qwen2.5-VL's blocks: window after window."""
    rows, columns = h // MERGE, w // MERGE
    for frame in range(t):
        for top in range(0, rows, WINDOW):
            for left in range(0, columns, WINDOW):
                for row in range(top, min(top + WINDOW, rows)):
                    for column in range(left, min(left + WINDOW, columns)):
                        yield from cell(frame, row, column)


def cell(frame: int, row: int, column: int) -> Iterator[Place]:
    for down in range(MERGE):
        for across in range(MERGE):
            yield frame, MERGE * row + down, MERGE * column + across


def pixel_values(encoder: VisionEncoder, image: np.ndarray) -> tuple[Tensor, Place]:
    """transformers' input for an image that needs no resizing, and its grid."""
    size = encoder.config.patch_size
    clip = image if image.ndim == 4 else image[None]
    if len(clip) % 2:
        clip = np.concatenate([clip, clip[-1:]])
    mean, std = encoder.preprocessor.image_mean, encoder.preprocessor.image_std
    values = (clip / 255 - np.array(mean)) / np.array(std)
    grid = (len(clip) // 2, clip.shape[1] // size, clip.shape[2] // size)
    patches = [
        values[2 * t : 2 * t + 2, r * size : (r + 1) * size, c * size : (c + 1) * size]
        .transpose(3, 0, 1, 2)
        .reshape(-1)
        for t, r, c in merge_order(*grid)
    ]
    return torch.from_numpy(np.stack(patches)).float(), grid


def reference_hidden(
    reference: Any, encoder: VisionEncoder, images: Sequence[np.ndarray]
) -> list[Tensor]:
    """[depth, t, h, w, width] of each image: what leaves transformers' blocks."""
    weight = next(reference.parameters())
    inputs = [pixel_values(encoder, image) for image in images]
    states: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, output: states.append(output))
        for block in reference.blocks
    ]
    try:
        with torch.inference_mode():
            reference(
                torch.cat([values for values, _ in inputs]).to(weight.device, weight.dtype),
                grid_thw=torch.tensor([grid for _, grid in inputs], device=weight.device),
            )
    finally:
        for hook in hooks:
            hook.remove()
    order = window_order if hasattr(reference, "fullatt_block_indexes") else merge_order
    stacked = torch.stack(states).cpu()
    results, first = [], 0
    for _, grid in inputs:
        raster = torch.full((len(states), *grid, stacked.shape[-1]), torch.nan, dtype=stacked.dtype)
        for place in order(*grid):
            raster[(slice(None), *place)] = stacked[:, first]
            first += 1
        results.append(raster)
    assert first == stacked.shape[1]
    return results


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(request.param, tmp_path_factory.mktemp("dense") / request.param)


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[VisionEncoder, Any]:
    return VisionEncoder.from_pretrained(folder, device="cpu", **CLIPS), reference_tower(folder)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_hidden_states_are_those_of_transformers(pair, batch):
    encoder, reference = pair
    images = arrays(batch, encoder.processor.factor)
    wanted = reference_hidden(reference, encoder, images)
    plain = encoder.encode(images)
    features = encoder.encode(images, layers=range(encoder.config.depth))
    for found, whole, expected in zip(features, plain, wanted, strict=True):
        assert found.layers == tuple(range(encoder.config.depth))
        assert found.hidden.shape[1:4] == found.grid_thw
        for layer, states in enumerate(found.hidden):
            assert relative_l2(states, expected[layer]) <= TOLERANCE, f"layer {layer}"
        # Asking for more changes nothing about the rest.
        assert torch.equal(found.embeddings, whole.embeddings)
        assert (found.deepstack is None) == (whole.deepstack is None)
        assert found.deepstack is None or torch.equal(found.deepstack, whole.deepstack)


def test_layers_come_in_the_order_asked_for(pair):
    encoder, reference = pair
    images = arrays([(1, 3, 5), (2, 2, 4)], encoder.processor.factor)
    wanted = reference_hidden(reference, encoder, images)
    for found, expected in zip(encoder.encode(images, layers=[4, -1, 0]), wanted, strict=True):
        assert found.layers == (4, 5, 0)
        for states, layer in zip(found.hidden, (4, 5, 0), strict=True):
            assert relative_l2(states, expected[layer]) <= TOLERANCE


def test_unmerged_stops_after_the_last_layer_asked_for(pair, monkeypatch: pytest.MonkeyPatch):
    encoder, reference = pair
    images = arrays([(1, 3, 5), (3, 4, 2)], encoder.processor.factor)
    wanted = reference_hidden(reference, encoder, images)
    ran: list[int] = []
    hooks = [
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
        for index, block in enumerate(encoder.tower.blocks)
    ]

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("merged tokens that nobody asked for")

    mergers = [encoder.tower.merger, *getattr(encoder.tower, "deepstack_mergers", [])]
    for merger in mergers:
        monkeypatch.setattr(merger, "forward", forbidden)
    try:
        features = encoder.encode(images, layers=[3, 1], merged=False)
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == [0, 1, 2, 3]
    for found, expected in zip(features, wanted, strict=True):
        assert not found.merged and found.deepstack is None
        assert found.embeddings.shape == (0, encoder.config.out_hidden_size)
        assert relative_l2(found.hidden, expected[[3, 1]]) <= TOLERANCE
        for refused in (found.spatial, found.pooled, found.concatenated):
            with pytest.raises(ValueError, match="merged=False"):
                refused()
    with pytest.raises(AssertionError, match="nobody asked for"):
        encoder.encode(images)


def test_stream_and_several_batches_give_the_same(pair):
    encoder, _ = pair
    images = arrays(
        [(1, 2, 3), (1, 5, 7), (2, 3, 3), (1, 8, 8), (1, 1, 4)], encoder.processor.factor
    )
    packed = encoder.encode(images, layers=[2, -1])
    small = VisionEncoder.from_pretrained(encoder.name, device="cpu", max_batch_tokens=100, **CLIPS)
    for other in (
        list(encoder.stream(images, layers=[2, -1])),
        small.encode(images, layers=[2, -1]),
        list(small.stream(images, workers=2, layers=[2, -1], merged=False)),
        encoder.encode_prepared([encoder.processor.prepare(i) for i in images], layers=[2, -1]),
    ):
        for found, expected in zip(other, packed, strict=True):
            assert found.grid_thw == expected.grid_thw
            assert relative_l2(found.hidden, expected.hidden) <= 1e-6


def test_default_calls_keep_no_hidden_states(pair):
    encoder, _ = pair
    features = encoder.encode(arrays([(1, 2, 3)], encoder.processor.factor))[0]
    assert features.hidden is None and features.layers == () and features.merged
    assert encoder.encode([], layers=[1]) == []


@pytest.mark.parametrize(
    ("layers", "merged", "message"),
    [
        ([6], True, r"layers holds 6; the tower has 6 layers: 0 to 5, or -6 to -1"),
        ([0, -7], True, r"layers holds -7; the tower has 6 layers"),
        ([1, 5, -1], True, r"layer 5 twice, the second time as -1"),
        (5, True, r"layers is 5; it must be a list, as in layers=\[-1\]"),
        ([1.0], True, r"layers holds 1.0; it must hold integers"),
        ("1,2", True, r"layers holds '1'; it must hold integers"),
        ([True], True, r"layers holds True; it must hold integers"),
        ([], False, r"merged=False without layers asks for nothing"),
    ],
)
def test_bad_requests_are_named(pair, layers, merged, message):
    encoder, _ = pair
    for call in (encoder.encode, encoder.stream, encoder.encode_prepared):
        with pytest.raises(ValueError, match=message):
            call([], layers=layers, merged=merged)


def test_kept_layers_leave_less_room_in_a_batch(pair):
    encoder, _ = pair
    asked = [Request(tuple(range(count))) for count in range(6)]
    rooms = [encoder.engine.patches_for(request) for request in asked]
    assert rooms[0] == encoder.max_batch_tokens
    assert rooms == sorted(rooms, reverse=True) and len(set(rooms)) == 6
    chosen = VisionEncoder.from_pretrained(
        encoder.name, device="cpu", max_batch_tokens=100, **CLIPS
    )
    assert chosen.engine.patches_for(Request((0, 1))) == 100


@pytest.fixture(scope="module")
def photos(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    photos = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(arrays([(1, 3, 5), (1, 2, 2), (1, 6, 4)], 28)):
        Image.fromarray(image).save(photos / f"{number}.png")
    return photos


@pytest.mark.parametrize("merged", [True, False])
def test_command_line_and_store(pair, photos: Path, tmp_path: Path, merged: bool):
    encoder, _ = pair
    paths = sorted(photos.iterdir())
    expected = encoder.encode(paths, layers=[4, 1, -1], merged=merged)
    command = ["encode", encoder.name, str(photos), "--output", str(tmp_path), "--device", "cpu"]
    command += ["--layers", "4,1,-1", *([] if merged else ["--no-merged"])]
    assert main(command) == OK
    assert check_folder(tmp_path).problems == []
    store = FeatureStore(tmp_path)
    for path, wanted in zip(paths, expected, strict=True):
        found = store[path.name]
        assert found.layers == wanted.layers == (4, 1, 5)
        assert found.grid_thw == wanted.grid_thw and found.merged == merged
        assert relative_l2(found.hidden, wanted.hidden) <= 1e-6
        assert found.embeddings.shape == wanted.embeddings.shape
        assert torch.allclose(found.embeddings, wanted.embeddings, atol=1e-5)
        assert (found.deepstack is None) == (wanted.deepstack is None)
    assert main(command) == OK  # nothing left to do
    if merged:
        assert main([*command[:-2], "--layers=-2,1,5"]) == OK  # the same by other names
    assert len(FeatureStore(tmp_path)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "1,4"], "layers is 4,1 there and 1,4 now"),
        (["--layers", "4"], "layers is 4,1 there and 4 now"),
        ([], "layers is 4,1 there and none now"),
        (["--layers", "4,1", "--no-merged"], "merged is True there and False now"),
        (["--layers", "4,6"], "layers holds 6; the tower has 6 layers"),
        (["--no-merged"], "merged=False without layers asks for nothing"),
        (["--layers", "4,1", "--pool", "mean"], "pool 'mean' keeps one row an image"),
    ],
)
def test_other_layers_into_the_same_folder_are_refused(
    pair, photos, tmp_path_factory, capsys, options, message
):
    encoder, _ = pair
    output = tmp_path_factory.getbasetemp() / f"refused-{encoder.config.model_type}"
    command = ["encode", encoder.name, str(photos), "--output", str(output), "--device", "cpu"]
    if not output.exists():
        assert main([*command, "--layers", "4,1"]) == OK
    before = {path: path.read_bytes() for path in output.iterdir()}
    capsys.readouterr()
    assert main([*command, *options]) == FAILED
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in output.iterdir()} == before


def test_a_folder_without_layers_takes_none_later(pair, photos, tmp_path, capsys):
    encoder, _ = pair
    command = ["encode", encoder.name, str(photos), "--output", str(tmp_path), "--device", "cpu"]
    assert main(command) == OK
    assert FeatureStore(tmp_path)["0.png"].hidden is None
    assert main([*command, "--layers", "0"]) == FAILED
    assert "layers is none there and 0 now" in capsys.readouterr().err


def test_check_finds_hidden_states_of_a_wrong_shape(pair, photos, tmp_path):
    encoder, _ = pair
    command = ["encode", encoder.name, str(photos), "--output", str(tmp_path), "--device", "cpu"]
    assert main([*command, "--layers", "0,2"]) == OK
    shard = tmp_path / "features-00000-00000.safetensors"
    with safe_open(shard, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    tensors["0.png/hidden"] = tensors["0.png/hidden"].transpose(2, 3).contiguous()
    del tensors["1.png/hidden"]
    save_file(tensors, shard, metadata)
    problems = check_folder(tmp_path).problems
    assert len(problems) == 3
    assert problems[0].startswith("0.png: hidden of shape [2, 1, ")
    assert problems[1].endswith("has no tensor '1.png/hidden'")
    assert "the file has changed since it was written" in problems[2]


@pytest.mark.gpu
def test_hidden_states_on_a_gpu(folder: Path):
    """bfloat16, graphs on: no further from float32 than transformers' own bfloat16 is."""
    encoder = VisionEncoder.from_pretrained(folder, device="cuda", cuda_graphs=True)
    images = arrays([(1, 3, 5), (2, 4, 6), (1, 8, 8)], encoder.processor.factor)
    for _ in range(3):
        encoder.encode(images)  # records a graph, which asking for hidden states must not disturb
        features = encoder.encode(images, layers=[0, 3, -1], merged=False)
    exact = reference_hidden(reference_tower(folder), encoder, images)
    peer = reference_hidden(reference_tower(folder, torch.bfloat16).cuda(), encoder, images)
    for layer, index in enumerate((0, 3, 5)):
        wanted, theirs, ours = (
            torch.cat([states[place].flatten() for states in every]).float()
            for every, place in (
                (exact, index),
                (peer, index),
                ([f.hidden.cpu() for f in features], layer),
            )
        )
        assert relative_l2(ours, wanted) <= 1.05 * relative_l2(theirs, wanted), f"layer {index}"


def test_ranks_that_share_a_tower_stop_together(pair, photos: Path, tmp_path: Path):
    """Both ranks must leave the tower after the same layer, or one waits for ever."""
    encoder, _ = pair
    if encoder.config.model_type not in ("qwen2_5_vl", "qwen3_vl"):
        pytest.skip("of each tower class one family is enough")
    command = ["-m", "vitrt", "encode", encoder.name, str(photos), "--output", str(tmp_path)]
    command += ["--device", "cpu", "--tp", "2", "--layers=3,1", "--no-merged"]
    code, output = run_ranks(2, *command)
    assert code == 0, output
    store = FeatureStore(tmp_path)
    paths = sorted(photos.iterdir())
    for path, wanted in zip(paths, encoder.encode(paths, layers=[3, 1]), strict=True):
        assert store[path.name].layers == (3, 1)
        assert relative_l2(store[path.name].hidden, wanted.hidden) <= TOLERANCE


def test_data_parallel_ranks_say_that_they_do_not_exchange_hidden_states(
    pair, monkeypatch: pytest.MonkeyPatch
):
    encoder, _ = pair
    monkeypatch.setattr(encoder.engine, "parallel", replace(SINGLE, dp_size=2))
    with pytest.raises(ValueError, match=r"2 data-parallel ranks.* does not exchange hidden"):
        encoder.encode([], layers=[1])
