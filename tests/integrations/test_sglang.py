"""SGLang's plugin: against what SGLang's sources say, and in models built the way it builds them.

`sglang_sources` reads an installed SGLang, or what was recorded of several versions; the skip
reason of `test_an_installed_sglang_was_read` says which.
"""

from __future__ import annotations

import functools
import logging
import pickle
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests.integrations import sglang_sources
from tests.support.checkpoints import reference_model, tiny_checkpoint
from tests.support.engine_models import (
    ARCHITECTURE,
    GRIDS,
    OwnTower,
    QuantMethod,
    UnquantizedLinearMethod,
    constructor_keywords,
    family,
    features_of,
    folder,
    pixels_of,
    weights_of,
)
from vitrt.integrations import sglang
from vitrt.integrations.engine_tower import EngineTower

SOURCES = sglang_sources.all_sources()
__all__ = ["family", "folder"]  # fixtures


# SGLang's side of the interface


@pytest.mark.skipif(
    "installed" not in SOURCES,
    reason=f"no SGLang here: the interface is as recorded of {', '.join(SOURCES)}",
)
def test_an_installed_sglang_was_read() -> None:
    assert SOURCES["installed"]["models"].keys() == sglang.ARCHITECTURES.keys()


@pytest.mark.parametrize("version", SOURCES)
def test_sources_have_what_the_plugin_needs(version: str, family: str, folder: Path) -> None:
    found = SOURCES[version]
    assert found["entry_point"] and found["allow_list"] and found["ranks"]
    assert found["register"] == ["cls", "target", "hook", "hook_type", "source"]
    assert {"AROUND", "REPLACE"} <= set(found["hook_types"])
    for architecture, model in found["models"].items():
        assert model["init"][:3] == ["config", "quant_config", "prefix"], architecture
        assert model["load_weights"] == ["weights"], architecture
        if architecture in sglang.TOWERS:
            keywords = constructor_keywords(model)
            assert "vision_config" in keywords
            assert keywords <= set(sglang.TOWER_ARGUMENTS), architecture
            assert model["data_parallel"]
            if sharing := model["sharing"]:
                assert sharing["_get_visual_feature"] == ["items", "grid_thw"]
                assert sharing["_materialize_visual_items"][:2] == ["items", "indices"]
        else:
            assert set(model["bases"]) <= set(sglang.TOWERS), architecture
    assert all(forward == ["x", "grid_thw"] for forward in found["towers"].values())
    assert found["share"][:3] == ["vision_model", "pixel_values", "grid_thw_list"]
    assert "rope_type" in found["share"]
    assert all(found["encoder_processes"].values())
    vision = reference_model(folder).config.vision_config
    tower = sglang._make_tower(OwnTower, vision)
    # Towers of other kinds have the last; only they are asked for it.
    for name in {*found["shared"], "out_hidden_size"} - {"merge_kernel_size"}:
        assert hasattr(tower, name), name
    for model in found["models"].values():
        for name in model["reads"]:
            assert hasattr(tower, name), name


# A model of SGLang's shape


class HookType(Enum):
    AROUND = "around"
    REPLACE = "replace"


class HookRegistry:
    hooks: ClassVar[list[tuple[str, Any, HookType]]] = []

    @classmethod
    def register(cls, target: str, hook: Any, hook_type: HookType) -> None:
        cls.hooks.append((target, hook, hook_type))

    @classmethod
    def apply_hooks(cls) -> None:
        for target, hook, hook_type in cls.hooks:
            owner, name = target.rsplit(".", 1)
            place = pkgutil.resolve_name(owner)
            around = hook_type is HookType.AROUND
            setattr(place, name, wrapped(getattr(place, name), hook) if around else hook)


def wrapped(original: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    return wrapper


def own_model(module: ModuleType, name: str, tower: str) -> type[nn.Module]:
    """A class that makes its tower, renames and skips weights as SGLang's do."""

    class Model(nn.Module):
        def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
            super().__init__()
            self.use_data_parallel = False
            make = getattr(module, tower)
            self.visual = make(
                config.vision_config,
                norm_eps=1e-6,
                quant_config=quant_config,
                prefix=f"{prefix}.visual",
                use_data_parallel=False,
                **config.more,
            )
            self.lm_head = nn.Linear(2, 2, bias=False)

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
            parameters = dict(self.named_parameters())
            for name, tensor in weights:
                name = name.replace("attn.qkv.", "attn.qkv_proj.").replace("model.vis", "vis")
                if name in parameters:
                    parameters[name].data.copy_(tensor)

        def _get_visual_feature(self, items: list[Tensor], grid_thw: Tensor) -> Tensor:
            if not self.use_data_parallel:
                pixels = self._materialize_visual_items(items, range(len(items)))
                return self.visual(pixels, grid_thw=grid_thw)
            parts = [
                self.visual(self._materialize_visual_items(items, [image]), grid_thw=grid[None])
                for image, grid in enumerate(grid_thw)
            ]
            return torch.cat(parts)

        def _materialize_visual_items(self, items: list[Tensor], indices: Iterable[int]) -> Tensor:
            return torch.cat([items[index] for index in indices])

    Model.__name__ = name
    Model.__module__ = module.__name__
    return Model


def share(visual: Any, pixels: Tensor, grids: list[list[int]], rope_type: str) -> Tensor:
    """What SGLang's ranks do together, each with the patches of its images."""
    assert rope_type == "rope_3d"
    parts = pixels.split([t * h * w for t, h, w in grids])
    return torch.cat([visual(part, [grid]) for part, grid in zip(parts, grids, strict=True)])


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Modules of SGLang's names, hooked."""
    ranks = SimpleNamespace(count=1)
    modules = {name: ModuleType(name) for name in ("sglang", "sglang.srt", "sglang.srt.models")}
    modules["sglang"].__version__ = "0.5.23"  # type: ignore[attr-defined]
    for name in (
        *("plugins", "plugins.hook_registry", "runtime_context"),
        *("multimodal", "multimodal.mm_utils"),
    ):
        modules[f"sglang.srt.{name}"] = ModuleType(f"sglang.srt.{name}")
    hooks = modules["sglang.srt.plugins.hook_registry"]
    vars(hooks).update(HookRegistry=HookRegistry, HookType=HookType)
    context = modules["sglang.srt.runtime_context"]
    vars(context)["get_parallel"] = lambda: SimpleNamespace(tp_size=ranks.count)
    vars(modules["sglang.srt.multimodal.mm_utils"])["run_dp_sharded_mrope_vision_model"] = share
    for architecture, module_name in sglang.ARCHITECTURES.items():
        name = f"sglang.srt.models.{module_name}"
        module = modules.setdefault(name, ModuleType(name))
        if architecture in sglang.TOWERS:
            tower = sglang.TOWERS[architecture]
            setattr(module, tower, OwnTower)
            setattr(module, architecture, own_model(module, architecture, tower))
    base = modules["sglang.srt.models.qwen3_vl"].Qwen3VLForConditionalGeneration
    for architecture, module_name in sglang.ARCHITECTURES.items():
        module = modules[f"sglang.srt.models.{module_name}"]
        if architecture not in sglang.TOWERS:
            members = {"__module__": module.__name__}
            setattr(module, architecture, type(architecture, (base,), members))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, module)
    HookRegistry.hooks.clear()
    yield SimpleNamespace(modules=modules, ranks=ranks)
    HookRegistry.hooks.clear()


def load_plugins() -> None:
    sglang.register()
    HookRegistry.apply_hooks()


def settings(folder: Path, **changes: Any) -> SimpleNamespace:
    """The parts of a model's config that are looked at."""
    vision = reference_model(folder).config.vision_config
    return SimpleNamespace(**({"vision_config": vision, "more": {}} | changes))


def build(architecture: str, config: SimpleNamespace, **more: Any) -> Any:
    module = sys.modules[f"sglang.srt.models.{sglang.ARCHITECTURES[architecture]}"]
    return getattr(module, architecture)(config, prefix="model", **more)


# The model


@torch.inference_mode()
def test_features_are_transformers(family: str, folder: Path, engine: SimpleNamespace) -> None:
    load_plugins()
    config = settings(folder)
    model = build(ARCHITECTURE[family], config)
    assert isinstance(model.visual, EngineTower) and not model.use_data_parallel
    module = sys.modules[f"sglang.srt.models.{family}"]
    assert getattr(module, sglang.TOWERS[ARCHITECTURE[family]]) is OwnTower
    head = torch.randn(2, 2)
    stream = {f"model.{name}": tensor for name, tensor in weights_of(folder).items()}
    model.load_weights(iter([*reversed(stream.items()), ("lm_head.weight", head)]))
    assert torch.equal(model.lm_head.weight, head)

    pixels = pixels_of(model)
    output = model.visual(pixels, grid_thw=torch.tensor(GRIDS))
    assert output.shape[1] == model.visual.out_hidden_size
    torch.testing.assert_close(output, features_of(folder, pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fault", ["missing", "renamed", "doubled", "misshapen"])
def test_a_wrong_stream_of_weights_is_named(
    fault: str, family: str, folder: Path, engine: SimpleNamespace
) -> None:
    """SGLang itself would skip them in silence."""
    load_plugins()
    weights = list(weights_of(folder).items())
    name, tensor = next((n, t) for n, t in weights if n.endswith("attn.qkv.bias"))
    place = weights.index((name, tensor))
    if fault == "missing":
        del weights[place]
    elif fault == "renamed":
        weights[place] = (f"{name}_new", tensor)
        name = f"{name}_new"
    elif fault == "doubled":
        weights.append((name, tensor))
    else:
        weights[place] = (name, tensor[1:])
    model = build(ARCHITECTURE[family], settings(folder))
    with pytest.raises(ValueError, match=re.escape(name.removeprefix("visual."))):
        model.load_weights(weights)


def test_weights_may_be_replaced_later_under_both_names(
    family: str, folder: Path, engine: SimpleNamespace
) -> None:
    load_plugins()
    model = build(ARCHITECTURE[family], settings(folder))
    weights = weights_of(folder)
    model.load_weights(weights.items())
    pixels = pixels_of(model)
    before = model.visual(pixels, GRIDS)
    name = next(name for name in weights if name.endswith("blocks.0.attn.qkv.bias"))
    model.load_weights([(name.replace("qkv", "qkv_proj"), weights[name] + 1)])
    assert not torch.equal(before, model.visual(pixels, GRIDS))
    model.load_weights(weights.items())
    assert torch.equal(before, model.visual(pixels, GRIDS))


def test_a_tensor_parallel_engine_shares_out_images(
    family: str, folder: Path, engine: SimpleNamespace
) -> None:
    load_plugins()
    engine.ranks.count = 2
    assert build(ARCHITECTURE[family], settings(folder)).use_data_parallel


def test_derived_models_are_hooked_once(tmp_path: Path, engine: SimpleNamespace) -> None:
    folder = tiny_checkpoint("qwen3_vl", tmp_path / "it")
    load_plugins()
    for architecture in ("Qwen3VLMoeForConditionalGeneration", "Qwen3_5ForConditionalGeneration"):
        model = build(architecture, settings(folder))
        assert isinstance(model.visual, EngineTower)
        model.load_weights(weights_of(folder).items())
        assert model.visual(pixels_of(model), GRIDS).isfinite().all()


# SGLang's own tower instead


def test_what_derives_from_a_model_elsewhere_stays_sglangs(
    tmp_path: Path, engine: SimpleNamespace
) -> None:
    """Qwen3-Omni's thinker derives from Qwen3-VL and makes a tower of another kind."""
    load_plugins()
    base = engine.modules["sglang.srt.models.qwen3_vl"].Qwen3VLForConditionalGeneration
    thinker = type("Qwen3OmniMoeThinkerForConditionalGeneration", (base,), {})
    model = thinker(settings(tiny_checkpoint("qwen3_vl", tmp_path / "it")))
    assert isinstance(model.visual, OwnTower)
    model.load_weights([("lm_head.weight", torch.ones(2, 2))])
    assert torch.equal(model.lm_head.weight, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("vision", "quantised", "reason"),
    [
        ({"disable_merger_proj": True}, None, "disable_merger_proj"),
        ({"model_type": "new"}, None, "'new'"),
        ({}, QuantMethod(), "QuantMethod"),
    ],
)
def test_what_vitrt_cannot_run_is_left_to_sglang(
    vision: dict[str, Any],
    quantised: Any,
    reason: str,
    family: str,
    folder: Path,
    engine: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    load_plugins()
    config = settings(folder)
    values = config.vision_config.to_dict() | vision
    config.vision_config = SimpleNamespace(**values, to_dict=lambda: values)
    model = build(ARCHITECTURE[family], config, quant_config=quantised)
    assert isinstance(model.visual, OwnTower)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert reason in caplog.text and "\n" not in caplog.records[0].getMessage()


@torch.inference_mode()
def test_what_sglang_pads_on_a_cpu_is_as_the_checkpoint_has_it(
    family: str, folder: Path, engine: SimpleNamespace
) -> None:
    load_plugins()
    config = settings(folder)
    vision = config.vision_config
    for name, padding in (("num_heads", 0), ("intermediate_size", 16)):
        setattr(vision, f"original_{name}", getattr(vision, name))
        setattr(vision, name, getattr(vision, name) + padding)
    model = build(ARCHITECTURE[family], config)
    assert isinstance(model.visual, EngineTower)
    model.load_weights(weights_of(folder).items())
    assert model.visual(pixels_of(model), GRIDS).isfinite().all()


def test_a_quantised_model_may_leave_its_tower_out(
    family: str, folder: Path, engine: SimpleNamespace
) -> None:
    load_plugins()
    model = build(ARCHITECTURE[family], settings(folder), quant_config=UnquantizedLinearMethod())
    assert isinstance(model.visual, EngineTower)


def test_an_unknown_argument_of_the_tower_is_left_to_sglang(
    family: str, folder: Path, engine: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    load_plugins()
    with pytest.raises(TypeError, match="new_argument"):  # by OwnTower, which got it unchanged
        build(ARCHITECTURE[family], settings(folder, more={"new_argument": 1}))
    assert "new_argument" in caplog.text


def test_models_that_are_not_there_are_named(
    engine: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    del engine.modules["sglang.srt.models.qwen3_5"].Qwen3_5MoeForConditionalGeneration
    load_plugins()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "Qwen3_5MoeForConditionalGeneration" in caplog.text
    assert len(HookRegistry.hooks) == len(sglang.ARCHITECTURES) - 1 + 2 * len(sglang.TOWERS)


def test_a_tower_of_another_name_is_left_alone(
    family: str, folder: Path, engine: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    load_plugins()
    module = engine.modules[f"sglang.srt.models.{family}"]
    tower = sglang.TOWERS[ARCHITECTURE[family]]
    delattr(module, tower)
    with pytest.raises(AttributeError, match=tower):  # by the model of this test
        build(ARCHITECTURE[family], settings(folder))
    assert f"has no {tower}" in caplog.text


@pytest.mark.parametrize("version", ["0.5.16", "0.6.0", "1.5.20", "dev"])
def test_another_version_is_named(
    version: str, engine: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    engine.modules["sglang"].__version__ = version
    load_plugins()
    assert version in caplog.text and "0.5.17" in caplog.text
    assert HookRegistry.hooks


@pytest.mark.parametrize("version", ["0.5.17", "0.5.20.post1", "0.5.23+cu130"])
def test_versions_that_were_read_say_nothing(
    version: str, engine: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    engine.modules["sglang"].__version__ = version
    load_plugins()
    assert not caplog.records


# Encoders on their own


def test_ranks_of_an_encoder_that_load_no_plugins_decide_alike(
    family: str, folder: Path, engine: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    """One rank without collectives beside others with them would wait for ever."""
    load_plugins()
    engine.ranks.count = 2
    model = build(ARCHITECTURE[family], settings(folder, encoder_only=True))
    assert isinstance(model.visual, OwnTower) and "without plugins" in caplog.text
    engine.ranks.count = 1
    model = build(ARCHITECTURE[family], settings(folder, encoder_only=True))
    assert isinstance(model.visual, EngineTower)


@torch.inference_mode()
@pytest.mark.parametrize("ranks", [1, 2])
def test_images_of_one_item_are_shared_out(
    ranks: int, family: str, folder: Path, engine: SimpleNamespace
) -> None:
    """An encoder on its own packs those of a request; an engine has an item for each."""
    load_plugins()
    engine.ranks.count = ranks
    model = build(ARCHITECTURE[family], settings(folder))
    model.load_weights(weights_of(folder).items())
    pixels, grids = pixels_of(model), torch.tensor(GRIDS)
    each = list(pixels.split(grids.prod(1).tolist()))
    wanted = features_of(folder, pixels)
    for items in ([pixels], [torch.cat(each[:2]), each[2]], each):
        found = model._get_visual_feature(items, grids)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_version_that_shares_out_patches_needs_no_hook(engine: SimpleNamespace) -> None:
    names = {
        architecture: set(model["sharing"])
        for architecture, model in SOURCES["0.5.23"]["models"].items()
        if "sharing" in model
    }
    assert any(names.values()) and not all(names.values())
    for architecture, methods in names.items():
        if not methods:
            module = engine.modules[f"sglang.srt.models.{sglang.ARCHITECTURES[architecture]}"]
            delattr(getattr(module, architecture), "_get_visual_feature")
    load_plugins()
    hooked = {target for target, _, _ in HookRegistry.hooks if "_get_visual_feature" in target}
    assert len(hooked) == sum(map(bool, names.values()))


@pytest.mark.parametrize("version", ["0.5.17", "0.5.23"])
def test_processes_of_an_encoder_load_the_plugin(
    version: str,
    tmp_path: Path,
    engine: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []
    originals = {}
    for process, names in SOURCES[version]["encoder_processes"].items():
        for name in names:
            path = f"sglang.srt.disaggregation.{name}"
            parts = path.split(".")
            for end in range(3, len(parts) + 1):
                full = ".".join(parts[:end])
                module = sys.modules.get(full) or ModuleType(full)
                monkeypatch.setitem(sys.modules, full, module)
                setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], module)
            originals[f"{path}.{process}"] = functools.partial(
                lambda process, *args: calls.append((process, args)), process
            )
            setattr(sys.modules[path], process, originals[f"{path}.{process}"])
    plugins = engine.modules["sglang.srt.plugins"]
    vars(plugins)["load_plugins"] = lambda: calls.append("plugins")
    monkeypatch.setattr(sys, "argv", ["sglang", "serve", "--encoder-only"])
    load_plugins()
    assert len(originals) == 2
    for target, original in originals.items():
        owner, name = target.rsplit(".", 1)
        sent = pickle.dumps(getattr(sys.modules[owner], name))
        monkeypatch.setattr(sys.modules[owner], name, original)  # as it is in the new process
        calls.clear()
        pickle.loads(sent)("settings", 1)
        assert calls == ["plugins", (name, ("settings", 1))]

    engine.ranks.count = 2
    folder = tiny_checkpoint("qwen3_vl", tmp_path / "it")
    model = build("Qwen3VLForConditionalGeneration", settings(folder, encoder_only=True))
    assert isinstance(model.visual, EngineTower)
