"""vLLM's plugin: against what vLLM's sources say, and inside models built the way vLLM builds them.

`engine_sources` reads an installed vLLM, or what was recorded of several versions; the skip reason
of `test_an_installed_vllm_was_read` says which.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.integrations import engine_sources
from tests.support.checkpoints import reference_model
from tests.support.engine_models import (
    ARCHITECTURE,
    GRIDS,
    OwnTower,
    QuantMethod,
    constructor_keywords,
    family,
    features_of,
    folder,
    pixels_of,
    weights_of,
)
from vitrt.config import RuntimeConfig
from vitrt.engine.batch import PixelValues
from vitrt.engine.engine import Engine
from vitrt.engine.loader import load_tower
from vitrt.features import ImageFeatures
from vitrt.integrations import vllm, vllm_models
from vitrt.integrations.engine_tower import EngineTower

SOURCES = engine_sources.all_sources()
__all__ = ["family", "folder"]  # fixtures


# vLLM's side of the interface


@pytest.mark.skipif(
    "installed" not in SOURCES,
    reason=f"no vLLM here: the interface is as recorded of {', '.join(SOURCES)}",
)
def test_an_installed_vllm_was_read() -> None:
    assert SOURCES["installed"]["models"].keys() == vllm.ARCHITECTURES.keys()


@pytest.mark.parametrize("version", SOURCES)
def test_sources_have_what_the_plugin_needs(version: str) -> None:
    found = SOURCES[version]
    assert found["entry_point"] and found["allow_list"]
    assert found["register_model"] == ["model_arch", "model_cls"]
    for architecture, model in found["models"].items():
        assert model["init"] == ["vllm_config", "prefix"], architecture
        keywords = constructor_keywords(model)
        assert keywords <= set(vllm_models.TOWER_ARGUMENTS), architecture
        assert "vision_config" in keywords
        assert model["sets_use_data_parallel"]
        for name in model["reads"]:
            assert name in ("dtype", "device", "spatial_merge_size", "out_hidden_size")
    for tower in found["towers"].values():
        assert tower["forward"] == ["x", "grid_thw", "encoder_metadata"]
        assert tower["load_weights"] == ["weights"]


# A model of vLLM's shape


def own_model(module: ModuleType, name: str, tower: str) -> type[nn.Module]:
    """A class that makes its tower and hands weights on as vLLM's do."""

    class Model(nn.Module):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__()
            self.use_data_parallel = False
            make = getattr(module, tower)
            self.visual = make(
                vllm_config.vision_config,
                norm_eps=1e-6,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.visual",
                **vllm_config.more,
            )

        def load_weights(self, weights: Any) -> set[str]:
            names = self.visual.load_weights((n.split(".", 1)[1], w) for n, w in weights)
            return {f"visual.{name}" for name in names}

    Model.__name__ = name
    Model.__module__ = module.__name__
    return Model


class Registry:
    def __init__(self) -> None:
        self.models: dict[str, Any] = {}

    def get_supported_archs(self) -> set[str]:
        return {*ARCHITECTURE.values(), "LlamaForCausalLM"}

    def register_model(self, model_arch: str, model_cls: str) -> None:
        self.models[model_arch] = model_cls


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """Modules of vLLM's names, where none is installed or loaded."""
    models = "vllm.model_executor.models"
    registry = Registry()
    for name in ("vllm", "vllm.model_executor", models):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    loaded = ModuleType(f"{models}.registry")
    loaded.ModelRegistry = registry  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, loaded.__name__, loaded)
    for architecture, (module_name, tower) in vllm.ARCHITECTURES.items():
        name = f"{models}.{module_name}"
        if architecture in ARCHITECTURE.values():
            module = ModuleType(name)
            setattr(module, tower, OwnTower)
            setattr(module, architecture, own_model(module, architecture, tower))
            monkeypatch.setitem(sys.modules, name, module)
    vllm_models._model_class.cache_clear()
    yield registry
    vllm_models._model_class.cache_clear()


def settings(folder: Path, **changes: Any) -> SimpleNamespace:
    """The parts of a VllmConfig that are looked at."""
    vision = reference_model(folder).config.vision_config
    values = {
        "vision_config": vision,
        "quant_config": None,
        "lora_config": None,
        "additional_config": {},
        "more": {},
        "compilation_config": SimpleNamespace(cudagraph_mm_encoder=False),
        "parallel_config": SimpleNamespace(tensor_parallel_size=1),
    }
    return SimpleNamespace(**(values | changes))


def build(family: str, config: SimpleNamespace) -> Any:
    model = getattr(vllm_models, ARCHITECTURE[family])
    return model(vllm_config=config, prefix="model")


# Registration


def test_registers_by_name_what_this_vllm_has(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys.modules["vllm"], "__version__", f"{vllm.TRIED[-1]}+cpu", raising=False)
    vllm.register()
    vllm.register()
    assert registry.models == {
        name: f"vitrt.integrations.vllm_models:{name}" for name in ARCHITECTURE.values()
    }
    assert not caplog.records


@pytest.mark.parametrize("version", ["1.0.0", "0.25.1", "0.3.0", "2.26.0", "dev"])
def test_another_version_is_named(
    version: str,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sys.modules["vllm"], "__version__", version, raising=False)
    vllm.register()
    assert all(named in caplog.text for named in (version, *vllm.TRIED))
    assert registry.models


def test_only_models_of_vllm_are_made() -> None:
    with pytest.raises(AttributeError, match="NoSuchModel"):
        _ = vllm_models.NoSuchModel


# The model


@torch.inference_mode()
def test_features_are_transformers(family: str, folder: Path, registry: Registry) -> None:
    model = build(family, settings(folder))
    assert isinstance(model.visual, EngineTower)
    assert (
        getattr(
            sys.modules[f"vllm.model_executor.models.{family}"],
            vllm.ARCHITECTURES[ARCHITECTURE[family]][1],
        )
        is OwnTower
    )
    named = model.load_weights(reversed(weights_of(folder).items()))
    assert named == {name for name, _ in model.named_parameters()}
    assert not any(parameter.requires_grad for parameter in model.parameters())

    pixels = pixels_of(model)
    output = model.visual(pixels, grid_thw=torch.tensor(GRIDS))
    assert output.shape == (len(pixels) // 4, model.visual.out_hidden_size)
    torch.testing.assert_close(output, features_of(folder, pixels), rtol=1e-4, atol=1e-4)

    model.visual._engine.max_batch_patches = 64  # room for one image at a time
    torch.testing.assert_close(
        model.visual(pixels, [list(grid) for grid in GRIDS]), output, rtol=1e-4, atol=1e-4
    )


@torch.inference_mode()
def test_defaults_of_an_engine_that_loads_change_nothing(
    family: str, folder: Path, registry: Registry
) -> None:
    """vLLM loads a model with its dtype as PyTorch's default."""
    weights = weights_of(folder)
    config = settings(folder)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = build(family, config)
        model.load_weights(weights.items())
    finally:
        torch.set_default_dtype(torch.float32)
    visual = model.visual
    assert {parameter.dtype for parameter in visual.parameters()} == {visual.dtype}
    assert visual.dtype == torch.bfloat16
    tower = load_tower(
        visual.config,
        ((name.removeprefix("visual."), tensor) for name, tensor in weights.items()),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )
    pixels = torch.randn(60, visual.config.patch_dim, generator=torch.Generator().manual_seed(3))
    expected = Engine(tower, RuntimeConfig(max_batch_tokens=64)).run(
        PixelValues(pixels, [(1, 10, 6)])
    )
    assert torch.equal(
        visual(pixels, [[1, 10, 6]])[:, : expected.embeddings.shape[1]], expected.embeddings
    )


@pytest.mark.parametrize("fault", ["missing", "renamed", "doubled", "misshapen"])
def test_a_wrong_stream_of_weights_is_named(
    fault: str, family: str, folder: Path, registry: Registry
) -> None:
    weights = list(weights_of(folder).items())
    name, tensor = weights[3]
    if fault == "missing":
        del weights[3]
    elif fault == "renamed":
        weights[3] = (f"{name}_new", tensor)
        name = f"{name}_new"
    elif fault == "doubled":
        weights.append((name, tensor))
    else:
        weights[3] = (name, tensor[1:])
    model = build(family, settings(folder))
    with pytest.raises(ValueError, match=re.escape(name.removeprefix("visual."))):
        model.load_weights(weights)


def test_weights_may_be_replaced_later(family: str, folder: Path, registry: Registry) -> None:
    model = build(family, settings(folder))
    weights = weights_of(folder)
    model.load_weights(weights.items())
    pixels = torch.randn(4, model.visual.config.patch_dim)
    before = model.visual(pixels, [[1, 2, 2]])
    name = next(name for name in weights if name.endswith("blocks.0.attn.proj.bias"))
    model.load_weights([(name, weights[name] + 1)])
    changed = model.visual(pixels, [[1, 2, 2]])
    assert not torch.equal(before, changed)
    model.load_weights([(name, weights[name])])
    assert torch.equal(before, model.visual(pixels, [[1, 2, 2]]))


def test_a_tensor_parallel_engine_shares_out_images(
    family: str, folder: Path, registry: Registry
) -> None:
    config = settings(folder, parallel_config=SimpleNamespace(tensor_parallel_size=2))
    assert build(family, config).use_data_parallel
    assert not build(family, settings(folder)).use_data_parallel


# vLLM's own tower instead


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"compilation_config": SimpleNamespace(cudagraph_mm_encoder=True)}, "cudagraph_mm"),
        ({"lora_config": SimpleNamespace(enable_tower_connector_lora=True)}, "lora"),
        ({"quant_config": QuantMethod()}, "quantised"),
        ({"vision_config": SimpleNamespace(to_dict=lambda: {"model_type": "new"})}, "'new'"),
    ],
)
def test_what_vitrt_cannot_run_is_left_to_vllm(
    changes: dict[str, Any],
    reason: str,
    family: str,
    folder: Path,
    registry: Registry,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build(family, settings(folder, **changes))
    assert isinstance(model.visual, OwnTower)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert reason in caplog.text
    assert "\n" not in caplog.records[0].getMessage()


def test_an_unknown_argument_of_the_tower_is_left_to_vllm(
    folder: Path, registry: Registry, caplog: pytest.LogCaptureFixture, family: str
) -> None:
    with pytest.raises(TypeError, match="new_argument"):  # by OwnTower, which got it unchanged
        build(family, settings(folder, more={"new_argument": 1}))
    assert "new_argument" in caplog.text


def test_a_choice_that_does_not_exist_ends_the_start(
    folder: Path, registry: Registry, family: str
) -> None:
    with pytest.raises(ValueError, match="atention"):
        build(family, settings(folder, additional_config={"vitrt": {"atention": "triton"}}))


# Helpers


def test_ec_folder_holds_each_image_under_its_key(tmp_path: Path) -> None:
    features = ImageFeatures(torch.randn(4, 6), torch.randn(2, 4, 6), (1, 4, 4))
    vllm.fill_ec_cache(tmp_path, {"a": features})
    (file,) = (tmp_path / "a").iterdir()
    assert file.name == "encoder_cache.safetensors"
    assert torch.equal(load_file(file)["ec_cache"], features.concatenated())
    for key in ("", "..", "a/b"):
        with pytest.raises(ValueError, match="multi_modal_uuids"):
            vllm.fill_ec_cache(tmp_path, {key: features})
