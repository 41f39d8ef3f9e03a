"""Configs in every released spelling, and what no tower can be."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.support.checkpoints import (
    CONFIGS,
    TINY_VISION,
    model_class,
    needs_transformers,
    vision_part,
)
from vitrt import VisionEncoder
from vitrt.config import RuntimeConfig
from vitrt.images.config import PreprocessorConfig
from vitrt.job.options import EncodeOptions
from vitrt.models.config_file import read_vision_config, write_vision_config

# As released: depth, width, MLP width, heads, patch, output width.
RELEASED = {
    "qwen2-vl-2b": (32, 1280, 5120, 16, 14, 1536),
    "qwen2-vl-7b": (32, 1280, 5120, 16, 14, 3584),
    "qwen2-vl-72b": (32, 1280, 5120, 16, 14, 8192),
    "qwen2.5-omni-3b": (32, 1280, 3420, 16, 14, 2048),
    "qwen2.5-omni-7b": (32, 1280, 3420, 16, 14, 3584),
    "qwen2.5-vl-3b": (32, 1280, 3420, 16, 14, 2048),
    "qwen2.5-vl-7b": (32, 1280, 3420, 16, 14, 3584),
    "qwen2.5-vl-32b": (32, 1280, 3456, 16, 14, 5120),
    "qwen2.5-vl-72b": (32, 1280, 3456, 16, 14, 8192),
    "qwen3-vl-2b": (24, 1024, 4096, 16, 16, 2048),
    "qwen3-vl-4b": (24, 1024, 4096, 16, 16, 2560),
    "qwen3-vl-8b": (27, 1152, 4304, 16, 16, 4096),
    "qwen3-vl-32b": (27, 1152, 4304, 16, 16, 5120),
    "qwen3-vl-30b-a3b": (27, 1152, 4304, 16, 16, 2048),
    "qwen3-vl-235b-a22b": (27, 1152, 4304, 16, 16, 4096),
    "qwen3-omni-30b-a3b": (27, 1152, 4304, 16, 16, 2048),
    "qwen3.5-0.8b": (12, 768, 3072, 12, 16, 1024),
    "qwen3.5-2b": (24, 1024, 4096, 16, 16, 2048),
    "qwen3.5-4b": (24, 1024, 4096, 16, 16, 2560),
    "qwen3.5-9b": (27, 1152, 4304, 16, 16, 4096),
    "qwen3.5-27b": (27, 1152, 4304, 16, 16, 5120),
    "qwen3.5-35b-a3b": (27, 1152, 4304, 16, 16, 2048),
    "qwen3.5-122b-a10b": (27, 1152, 4304, 16, 16, 3072),
    "qwen3.5-397b-a17b": (27, 1152, 4304, 16, 16, 4096),
    "qwen3.6-27b": (27, 1152, 4304, 16, 16, 5120),
    "qwen3.6-35b-a3b": (27, 1152, 4304, 16, 16, 2048),
    "qwen3.8-27b": (27, 1152, 4304, 16, 16, 5120),
    "qwen3.8-flash-next": (27, 1152, 4304, 16, 16, 2560),
}


def released(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / name / "config.json").read_text())


def preprocessor(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / name / "preprocessor_config.json").read_text())


def test_configs_are_exactly_the_released_ones() -> None:
    assert {path.parent.name for path in CONFIGS.glob("*/config.json")} == set(RELEASED)


@pytest.mark.parametrize("name", RELEASED)
def test_released_tower(name: str) -> None:
    config = read_vision_config(released(name))
    measured = (
        config.depth,
        config.hidden_size,
        config.intermediate_size,
        config.num_heads,
        config.patch_size,
        config.out_hidden_size,
    )
    assert measured == RELEASED[name]
    images = PreprocessorConfig.from_dict(preprocessor(name))
    assert (images.patch_size, images.merge_size) == (config.patch_size, 2)
    if name.startswith("qwen2"):
        windows = name.startswith("qwen2.5")
        assert (config.window_size, config.window_cells) == ((112, 4) if windows else (None, None))
        assert config.fullatt_block_indexes == ((7, 15, 23, 31) if windows else ())
        assert config.deepstack_visual_indexes == ()
        assert config.patch_dim == 1176
        assert (images.min_pixels, images.max_pixels) == (3136, 12845056)
        assert images.image_mean == (0.48145466, 0.4578275, 0.40821073)
    else:
        levels = (5, 11, 17) if config.depth == 24 else (8, 16, 24)
        levels = levels if name.startswith("qwen3-") else ()
        assert config.deepstack_visual_indexes == levels
        assert config.num_position_embeddings == 2304
        assert config.window_cells is None
        assert config.patch_dim == 1536
        limits = (3136, 12845056) if "omni" in name else (65536, 16777216)
        assert (images.min_pixels, images.max_pixels) == limits
        assert images.image_std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("name", RELEASED)
def test_transformers_reads_the_same_tower(name: str) -> None:
    data = released(name)
    needs_transformers(data["model_type"])
    theirs = vision_part(model_class(data["model_type"]).config_class(**data))
    ours = read_vision_config(data)
    for key, value in write_vision_config(ours).items():
        if key != "model_type":
            expected = getattr(theirs, key)
            assert value == (list(expected) if isinstance(value, list) else expected), key


@pytest.mark.parametrize("family", TINY_VISION)
def test_what_transformers_saves(family: str, tmp_path: Path) -> None:
    """Whole and vision only, where `model_type` reads qwen3_vl_vision."""
    needs_transformers(family)
    kind = model_class(family).config_class
    part = {"vision_config": TINY_VISION[family]}
    saved = kind(**({"thinker_config": part} if "omni" in family else part))
    saved.save_pretrained(tmp_path)
    whole = read_vision_config(json.loads((tmp_path / "config.json").read_text()))
    vision_part(saved).save_pretrained(tmp_path)
    part = read_vision_config(json.loads((tmp_path / "config.json").read_text()))
    assert whole == part
    assert whole.model_type == family
    assert TINY_VISION[family].items() <= write_vision_config(whole).items()


@pytest.mark.parametrize("name", RELEASED)
def test_round_trip(name: str) -> None:
    config = read_vision_config(released(name))
    assert read_vision_config(json.loads(json.dumps(write_vision_config(config)))) == config


def test_old_spellings() -> None:
    data = released("qwen2.5-vl-7b")["vision_config"]
    del data["in_channels"], data["patch_size"]
    data["num_attention_heads"] = data.pop("num_heads")
    assert "in_chans" in data
    assert "spatial_patch_size" in data
    assert read_vision_config(data) == read_vision_config(released("qwen2.5-vl-7b"))


def test_heads_that_no_kernel_turns_are_refused() -> None:
    data = released("qwen3-vl-8b")
    data["vision_config"]["num_heads"] = 96  # of 12
    with pytest.raises(ValueError, match="heads of 12; the kernels need a multiple of 8"):
        read_vision_config(data)


def test_square_sizes_may_be_pairs() -> None:
    data = released("qwen3-vl-8b")
    data["vision_config"]["patch_size"] = [16, 16]
    assert read_vision_config(data).patch_size == 16


def test_what_is_left_out_means_the_default_of_the_format() -> None:
    """Older transformers saved only what differs from its class defaults."""
    vision = {"model_type": "qwen2_5_vl", "hidden_size": 1280}
    config = read_vision_config({"model_type": "qwen2_5_vl", "vision_config": vision})
    assert config == read_vision_config(released("qwen2.5-vl-7b"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vision_config": None}, "of model_type 'qwen3_vl' holds no vision_config"),
        ({"vision_config": "qwen3_vl"}, "vision_config must be an object, got 'qwen3_vl'"),
        (
            {"vision_config": {"model_type": "siglip"}},
            "vision_config.model_type 'siglip' is not supported; .* qwen2_5_vl, .*qwen3_5",
        ),
        ({"model_type": "llava", "vision_config": {"depth": 24}}, "model_type 'llava' is not"),
        (
            {"other": {"vision_config": {"model_type": "qwen2_5_vl_vision"}}},
            "two vision towers: vision_config and other.vision_config",
        ),
    ],
)
def test_no_tower_of_ours(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_vision_config(released("qwen3-vl-8b") | change)


@pytest.mark.parametrize("named", ["qwen3_vl", "qwen3_vl_vision", "qwen3_vl_vision_encoder"])
@pytest.mark.parametrize("place", ["vision_config", "vlm_config.vision_config", "a.b.tower"])
def test_a_tower_wherever_it_lies(place: str, named: str, caplog: pytest.LogCaptureFixture) -> None:
    """What surrounds it need not be known; a tower under another key says that it is one."""
    caplog.set_level("INFO")
    data = released("qwen3-vl-8b")
    part = data["vision_config"] | {"model_type": named}
    if place.endswith("tower") and named == "qwen3_vl":
        part["model_type"] = "qwen3_vl_vision"
    for key in reversed(place.split(".")):
        part = {key: part}
    outer = f"somebodys_{place}_{named}"
    assert read_vision_config(part | {"model_type": outer}) == read_vision_config(data)
    assert f"a model of type {outer} is qwen3_vl's" in caplog.text


def test_cohere_compass_is_the_tower_of_qwen3_vl() -> None:
    part = {"model_type": "cohere_compass_vision", "out_hidden_size": 4096}
    config = {"model_type": "cohere_compass", "vision_config": part}
    assert read_vision_config(config) == read_vision_config(released("qwen3-vl-8b"))


def test_the_same_tower_told_twice_is_one() -> None:
    data = released("qwen3-vl-8b")
    assert read_vision_config({"model_type": "x", "a": data, "b": data}) == read_vision_config(data)


def test_what_the_inner_config_does_not_say_the_outer_says() -> None:
    data = released("qwen2.5-vl-7b")
    data["vision_config"].pop("model_type", None)
    assert read_vision_config(data).model_type == "qwen2_5_vl"


def test_a_config_without_vision() -> None:
    data = {"model_type": "qwen3_vl", "hidden_size": 4096, "num_hidden_layers": 36}
    with pytest.raises(ValueError, match=r"qwen3_vl.*no vision_config"):
        read_vision_config(data)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("depth", 0, "depth must be a positive integer, got 0"),
        ("depth", "27", "depth.*'27'"),
        ("depth", True, "depth.*True"),
        ("patch_size", [16, 14], r"patch_size.*\[16, 14\]"),
        ("num_heads", 17, "1152 is not a multiple of num_heads 17"),
        ("num_heads", 64, "heads of 18"),
        ("hidden_act", "relu", "'gelu_pytorch_tanh', got 'relu'"),
        ("in_channels", 4, "in_channels must be 3.*got 4"),
        ("temporal_patch_size", 1, "temporal_patch_size must be 2, got 1"),
        ("num_position_embeddings", 2300, "square, got 2300"),
        ("deepstack_visual_indexes", [8, 16, 27], r"\[27\] are beyond depth 27"),
        ("deepstack_visual_indexes", [16, 8], "ascending"),
        ("deepstack_visual_indexes", [8, 8], "ascending"),
        ("deepstack_visual_indexes", 8, "ascending"),
        ("rope_parameters", {"rope_theta": 5e5}, "500000.0.*must be 10000.0"),
    ],
)
def test_impossible_towers(key: str, value: Any, said: str) -> None:
    data = released("qwen3-vl-8b")
    data["vision_config"][key] = value
    with pytest.raises(ValueError, match=said):
        read_vision_config(data)


def test_a_window_smaller_than_a_token() -> None:
    config = read_vision_config(released("qwen2.5-vl-7b"))
    with pytest.raises(ValueError, match=r"window_size 27 .* 28 pixels"):
        replace(config, window_size=27)


def test_full_attention_beyond_the_depth_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """transformers runs such a tower with windows only, so it is no error here either."""
    data = released("qwen2.5-vl-7b")
    data["vision_config"]["depth"] = 16
    assert read_vision_config(data).depth == 16
    assert "[23, 31] are beyond depth 16" in caplog.text


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"min_pixels": 10, "max_pixels": 20}, (10, 20)),
        ({"size": {"shortest_edge": 10, "longest_edge": 20}}, (10, 20)),
        ({"size": {"min_pixels": 10, "max_pixels": 20}}, (10, 20)),
        (
            {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 10, "max_pixels": 20},
            (10, 20),
        ),
        ({"size": {"shortest_edge": 10, "longest_edge": 9}, "max_pixels": 20}, (10, 20)),
        ({"size": {"shortest_edge": 10, "longest_edge": 20}, "min_pixels": None}, (10, 20)),
    ],
)
def test_pixel_limits(limits: dict[str, Any], expected: tuple[int, int]) -> None:
    data = preprocessor("qwen3-vl-8b")
    del data["size"]
    config = PreprocessorConfig.from_dict(data | limits)
    assert (config.min_pixels, config.max_pixels) == expected
    # transformers takes the same limits from the same file.
    if "min_pixels" not in limits.get("size", {}):
        theirs = transformers.Qwen2VLImageProcessorPil(**(data | limits)).size
        assert (theirs["shortest_edge"], theirs["longest_edge"]) == expected


def test_processor_config_nests_the_image_processor() -> None:
    data = preprocessor("qwen3-vl-8b")
    nested = {"processor_class": "Qwen3VLProcessor", "image_processor": data}
    assert PreprocessorConfig.from_dict(nested) == PreprocessorConfig.from_dict(data)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": None}, "neither min_pixels nor size.shortest_edge"),
        ({"size": {"shortest_edge": 5}}, "neither max_pixels nor size.longest_edge"),
        ({"size": {"shortest_edge": 0, "longest_edge": 5}}, "min_pixels.*got 0"),
        ({"min_pixels": 100, "max_pixels": 50}, "min_pixels 100 is larger than max_pixels 50"),
        ({"image_mean": [0.5]}, r"image_mean.*\[0.5\]"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std.*above 0"),
        ({"image_std": None}, "image_std"),
        ({"patch_size": None}, "no patch_size"),
        ({"do_normalize": False}, "do_normalize"),
        ({"rescale_factor": 1.0}, "rescale_factor must be 1/255, got 1.0"),
        ({"resample": 2}, "resample.*got 2"),
    ],
)
def test_impossible_preprocessors(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PreprocessorConfig.from_dict(preprocessor("qwen3-vl-8b") | change)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"dtype": "int8"}, "dtype.*bfloat16.*'int8'"),
        ({"cuda_graphs": "maybe"}, "cuda_graphs.*'maybe'"),
        ({"resize": "opencv"}, "resize.*'opencv'"),
        ({"min_pixels": -1}, "min_pixels.*-1"),
        ({"max_pixels": 0}, "max_pixels.*0"),
        ({"max_batch_tokens": 0}, "max_batch_tokens.*0"),
        ({"min_pixels": 9, "max_pixels": 8}, "min_pixels 9 is larger than max_pixels 8"),
        ({"graph_memory_mib": -1.0}, "graph_memory_mib.*-1.0"),
        ({"graph_memory_mib": True}, "graph_memory_mib must be a number.*True"),
        ({"graph_memory_mib": "4096"}, "graph_memory_mib must be a number.*'4096'"),
        ({"fps": math.inf}, "fps must be a finite number above 0, got inf"),
        ({"cuda_graphs": 0}, "cuda_graphs must be .*got 0"),
        ({"batch_invariant": "no"}, "batch_invariant must be True or False, got 'no'"),
        ({"min_pixels": [[5], [5]]}, "min_pixels must be a positive integer"),
        ({"fp8_skip_blocks": -1}, "fp8_skip_blocks must be an integer from 0 on, got -1"),
        ({"fp8_skip_blocks": True}, "fp8_skip_blocks.*got True"),
        ({"max_batch_tokens": True}, "max_batch_tokens.*got True"),
        ({"min_frames": True}, "min_frames.*got True"),
    ],
)
def test_impossible_choices(choice: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RuntimeConfig(**choice)


def test_every_choice_is_an_argument_with_the_same_default() -> None:
    """`from_pretrained` hands its arguments on by the names of RuntimeConfig's fields."""
    arguments = inspect.signature(VisionEncoder.from_pretrained).parameters
    for field in fields(RuntimeConfig):
        assert arguments[field.name].default == field.default, field.name


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"pool": "max"}, "pool must be one of none, mean, got 'max'"),
        ({"on_error": "raise"}, "on_error must be one of skip, fail, got 'raise'"),
        ({"overwrite": "no"}, "overwrite must be True or False, got 'no'"),
        ({"merged": None}, "merged must be True or False, got None"),
        ({"shard_mib": "5"}, "shard_mib must be above 0 and finite, got '5'"),
        ({"shard_mib": True}, "shard_mib must be above 0 and finite, got True"),
    ],
)
def test_options_of_a_run_are_checked(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncodeOptions(**choice)
