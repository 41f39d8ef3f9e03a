"""The drop-in and the hand-over: transformers must notice nothing but the time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.checkpoints import (
    FAMILIES,
    full_size_checkpoint,
    reference_model,
    tiny_checkpoint,
    visual_of,
)
from tests.support.graphs import FakePool
from vitrt.engine.graph_runner import GraphRunner
from vitrt.features import ImageFeatures
from vitrt.integrations.transformers import (
    accelerate,
    accept_features,
    feature_inputs,
    placeholder_inputs,
    restore,
)

# Odd windows, a single row, and sizes that differ: (t, h, w) in patches.
PROMPTS: dict[str, tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]] = {
    "one image": ([(1, 10, 6)], []),
    "three images": ([(1, 4, 4), (1, 2, 18), (1, 8, 6)], []),
    "a video": ([], [(3, 6, 8)]),
    "image and video": ([(1, 6, 4)], [(2, 4, 6)]),
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("integration") / request.param
    return reference_model(tiny_checkpoint(request.param, folder))


def blank(grid: tuple[int, int, int]) -> ImageFeatures:
    """Features that are only counted."""
    t, h, w = grid
    return ImageFeatures(torch.zeros(t * h * w // 4, 1), None, grid)


def prompt(model: Any, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(text inputs, pixel inputs) of one sequence, as a processor would make them."""
    images, videos = PROMPTS[name]
    config = model.config
    runs = config.model_type.startswith("qwen2") or "omni" in config.model_type
    frames = (lambda t: 1) if runs else (lambda t: t)
    ids = [7, 8]
    for _ in images:
        ids += [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id, 9]
    for t, _, _ in videos:
        for second in range(frames(t)):
            ids += [20 + second, config.vision_start_token_id, config.video_token_id]
            ids += [config.vision_end_token_id]
    ids += [11, 12, 13]
    text = placeholder_inputs(config, ids, [blank(g) for g in images], [blank(g) for g in videos])
    if "omni" in config.model_type and videos:
        text["video_second_per_grid"] = torch.ones(len(videos))
    generator = torch.Generator().manual_seed(5)
    vision = config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels: dict[str, Any] = {}
    for grids, values, key in (
        (images, "pixel_values", "image_grid_thw"),
        (videos, "pixel_values_videos", "video_grid_thw"),
    ):
        if grids:
            pixels[key] = torch.tensor(grids)
            rows = int(pixels[key].prod(-1).sum())
            pixels[values] = torch.randn(rows, width, generator=generator)
    return text, pixels


def generated(model: Any, inputs: dict[str, Any], **options: Any) -> list[int]:
    # Random language models fall into a rut at once, where every input gives the same tokens; the
    # penalty keeps the choice open at each of them.
    options |= {"do_sample": False, "repetition_penalty": 3.0, "pad_token_id": 0}
    out = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, **options)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def precomputed(model: Any, pixels: dict[str, Any], values: str, grids: str) -> list[ImageFeatures]:
    """Features of every image by the tower that the model has now."""
    if values not in pixels:
        return []
    out = visual_of(model)(pixels[values], grid_thw=pixels[grids])
    counts = (pixels[grids].prod(-1) // 4).tolist()
    rows = out.pooler_output.split(counts)
    levels = getattr(out, "deepstack_features", None)
    deepstack = torch.stack(levels).split(counts, dim=1) if levels else [None] * len(counts)
    sizes = [tuple(grid) for grid in pixels[grids].tolist()]
    return [ImageFeatures(*parts) for parts in zip(rows, deepstack, sizes, strict=True)]


@pytest.fixture(scope="module")
def untouched(model: Any) -> dict[str, tuple[list[int], list[int]]]:
    """What transformers' own tower leads to: the tokens of each prompt, greedy and by beams."""
    found = {}
    for name in PROMPTS:
        text, pixels = prompt(model, name)
        greedy = generated(model, text | pixels)
        found[name] = (greedy, generated(model, text | pixels, num_beams=2))
    return found


@pytest.mark.parametrize("name", PROMPTS)
def test_generate_gives_the_same_tokens(model: Any, name: str, untouched: Any) -> None:
    text, pixels = prompt(model, name)
    wanted, beams = untouched[name]
    other = {
        key: value + 0.5 if value.is_floating_point() else value for key, value in pixels.items()
    }
    assert generated(model, text | other) != wanted, "the pixels must matter"
    original = visual_of(model)
    accelerate(model)
    try:
        assert visual_of(model) is not original
        assert generated(model, text | pixels) == wanted
        assert generated(model, text | pixels, num_beams=2) == beams
    finally:
        restore(model)
    assert visual_of(model) is original
    assert generated(model, text | pixels) == wanted


@pytest.mark.parametrize("name", PROMPTS)
def test_features_in_place_of_pixels(model: Any, name: str, untouched: Any) -> None:
    text, pixels = prompt(model, name)
    wanted, beams = untouched[name]
    images = precomputed(model, pixels, "pixel_values", "image_grid_thw")
    videos = precomputed(model, pixels, "pixel_values_videos", "video_grid_thw")
    inputs = feature_inputs(images, videos)
    accept_features(model)
    try:
        assert generated(model, text | inputs) == wanted
        assert generated(model, text | inputs, num_beams=2) == beams
        with pytest.raises(ValueError, match="do not fit grid_thw"):
            model(**text, **pixels)
    finally:
        restore(model)


@pytest.mark.parametrize("grids", [[(1, 10, 6)], [(1, 4, 4), (2, 6, 14), (1, 2, 18)]])
def test_the_same_outputs(model: Any, grids: list[tuple[int, int, int]]) -> None:
    grid_thw = torch.tensor(grids)
    vision = model.config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(int(grid_thw.prod(-1).sum()), width)
    want = visual_of(model)(pixels, grid_thw=grid_thw)
    pair = visual_of(model)(pixels, grid_thw=grid_thw, return_dict=False)
    accelerate(model)
    try:
        got = visual_of(model)(pixels, grid_thw=grid_thw)
        got_pair = visual_of(model)(pixels, grid_thw=grid_thw, return_dict=False)
    finally:
        restore(model)
    assert type(got) is type(want)
    assert list(got) == list(want)
    close(got.pooler_output, want.pooler_output)
    close(got.last_hidden_state, want.last_hidden_state)
    for mine, theirs in zip(
        getattr(got, "deepstack_features", None) or [],
        getattr(want, "deepstack_features", None) or [],
        strict=True,
    ):
        close(mine, theirs)
    assert not got.pooler_output.is_inference()
    close(got_pair[0], pair[0])
    close(got_pair[1], pair[1])


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).norm() / want.norm()) <= 1e-5


def test_memory_is_shared_where_the_layout_is_the_same(model: Any) -> None:
    loaded = dict(visual_of(model).named_parameters())
    weights = accelerate(model)
    try:
        tower = visual_of(model).engine.tower
        storages = {p.untyped_storage().data_ptr() for p in loaded.values()}
        own = [p for p in tower.parameters() if p.untyped_storage().data_ptr() not in storages]
    finally:
        restore(model)
    assert sum(p.nbytes for p in own) == weights.added_bytes
    assert set(weights.shared) | set(weights.copied) == set(loaded)
    # Gate and up are interleaved (Qwen2.5-VL), odd widths padded, and what is apart is joined.
    apart = (
        (".attn.q.", ".attn.k.", ".attn.v.") if model.config.model_type[:8] == "qwen2_5_" else ()
    )
    for name in weights.copied:
        assert name.startswith("blocks.") and any(part in name for part in (".mlp.", *apart)), name
    padded = sum(weights.copied.values())
    assert padded <= weights.added_bytes <= 1.5 * padded  # narrow layers: 200 or 220 to 256


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("qwen2.5-vl-7b", {"fullatt_block_indexes": [1]}),
        ("qwen3-vl-8b", {"deepstack_visual_indexes": [0, 1, 2]}),
    ],
)
def test_memory_of_a_full_width_tower(
    name: str, levels: dict[str, list[int]], tmp_path: Path
) -> None:
    """Every block is as wide as the others: a few of them tell."""
    folder = full_size_checkpoint(name, tmp_path / name, depth=3, **levels)
    model = reference_model(folder, torch.bfloat16)
    weights = accelerate(model)
    copied = sum(weights.copied.values())
    assert weights.added_bytes <= 1.1 * copied
    assert bool(copied) == (name == "qwen2.5-vl-7b")
    if name == "qwen3-vl-8b":
        assert weights.added_bytes == 0  # 4304 is wide enough as it is: nothing changes


def test_a_changed_model_cannot_be_saved_or_moved(model: Any, tmp_path: Path) -> None:
    names = set(model.state_dict())
    accelerate(model)
    try:
        with pytest.raises(ValueError, match="before saving"):
            model.save_pretrained(tmp_path / "saved")
        with pytest.raises(ValueError, match="bfloat16"):
            model.to(torch.bfloat16)
        model.to("cpu")
        with pytest.raises(ValueError, match="changed already"):
            accelerate(model)
    finally:
        restore(model)
    model.float()
    assert set(model.state_dict()) == names
    with pytest.raises(ValueError, match="nothing to restore"):
        restore(model)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("family", FAMILIES[:2])
def test_on_a_gpu(
    family: str, graphs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers embeds patches by a convolution, for which TF32 is on by default.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = reference_model(tiny_checkpoint(family, tmp_path / family)).cuda()
    width = model.config.vision_config.patch_size**2 * 6
    batches = [
        (torch.randn(t * h * w, width, device="cuda"), torch.tensor([[t, h, w]], device="cuda"))
        for t, h, w in [(1, 10, 6), (1, 6, 10), (3, 4, 6), (1, 10, 6)]
    ]
    wanted = [visual_of(model)(*batch).pooler_output for batch in batches]
    accelerate(model, cuda_graphs=graphs)
    # Three rounds, so that graphs are recorded and replayed; what came first must not change.
    rounds = [[visual_of(model)(*batch).pooler_output for batch in batches] for _ in range(3)]
    for outputs in rounds:
        for got, want in zip(outputs, wanted, strict=True):
            close(got, want)
    assert (visual_of(model).engine.stats().hits.total() > 0) == graphs


def test_a_quantised_tower_is_refused(model: Any) -> None:
    norm = visual_of(model).blocks[0].norm1
    weight = norm.weight
    norm.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    try:
        with pytest.raises(ValueError, match=r"torch\.float32, torch\.int8"):
            accelerate(model)
    finally:
        norm.weight = weight


def test_a_model_without_a_tower_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear holds no visual tower of qwen2_vl, qwen2_5_vl"):
        accelerate(torch.nn.Linear(2, 2))


def test_placeholders_are_counted(model: Any) -> None:
    token = model.config.image_token_id
    with pytest.raises(ValueError, match=f"holds 1 placeholders {token}; the features take 2"):
        placeholder_inputs(model.config, [1, token, 2], [blank((1, 4, 4)), blank((1, 2, 2))])
    text = placeholder_inputs(model.config, [1, token, 2], [blank((1, 4, 4))])
    assert text["input_ids"].tolist() == [[1, token, token, token, token, 2]]
    if "omni" not in model.config.model_type:
        assert text["mm_token_type_ids"].tolist() == [[0, 1, 1, 1, 1, 0]]


def test_placeholders_may_come_as_a_tokenizer_gives_them(model: Any) -> None:
    ids = [1, model.config.image_token_id, 2]
    want = placeholder_inputs(model.config, ids, [blank((1, 4, 4))])
    for given in (torch.tensor(ids), np.array(ids), tuple(ids)):
        got = placeholder_inputs(model.config, given, [blank((1, 4, 4))])
        assert all(torch.equal(got[name], value) for name, value in want.items())
    for batch in (torch.tensor([ids]), [ids], torch.tensor([1.0])):
        with pytest.raises(ValueError, match="token ids of one prompt"):
            placeholder_inputs(model.config, batch)


def test_generate_replays_graphs(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is by default: the last hidden states come out of them, too."""
    monkeypatch.setattr("vitrt.engine.graph_runner.GraphPool", FakePool)
    text, pixels = prompt(model, "one image")
    want = visual_of(model)(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"])
    accelerate(model)
    try:
        engine = visual_of(model).engine
        engine.runner = GraphRunner(engine.tower, engine.attention, limit_bytes=1 << 30)
        for _ in range(3):
            generated(model, text | pixels)
        stats = engine.stats()
        assert stats.hits.total() == 2 and stats.eager == {"first of its bucket": 1}
        got = visual_of(model)(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"])
        assert stats.hits.total() == 3
    finally:
        restore(model)
    close(got.pooler_output, want.pooler_output)
    close(got.last_hidden_state, want.last_hidden_state)


def test_a_compiled_caller_works_at_every_grid(model: Any) -> None:
    accelerate(model)
    torch._dynamo.reset()
    visual = visual_of(model)
    scaled = torch.compile(
        lambda p, g: visual(p, grid_thw=g).pooler_output * 2, backend="eager", dynamic=False
    )
    try:
        width = visual.engine.config.patch_dim
        for side in (4, 6, 8, 10, 12, 14, 16, 18, 20, 22):
            grid = torch.tensor([(1, 4, side)])
            pixels = torch.randn(4 * side, width)
            want = visual(pixels, grid_thw=grid).pooler_output * 2
            assert torch.equal(scaled(pixels, grid), want)
            for whole in (torch.compile(visual, backend="eager"), copy.deepcopy(visual)):
                assert torch.equal(whole(pixels, grid_thw=grid).pooler_output * 2, want)
    finally:
        restore(model)
    assert not torch._dynamo.utils.counters["recompile_limit"]


def test_last_hidden_state_can_be_left_out(model: Any) -> None:
    accelerate(model, last_hidden_state=False)
    try:
        width = visual_of(model).engine.config.patch_dim
        out = visual_of(model)(torch.randn(16, width), grid_thw=torch.tensor([[1, 4, 4]]))
    finally:
        restore(model)
    assert out.last_hidden_state is None
    assert out.pooler_output.shape[0] == 4
