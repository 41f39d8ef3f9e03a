"""Contenders that take turns, the clocks beside them, and peers of other packages."""

from __future__ import annotations

import json
import math
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.bench_run import bench
from vitrt.bench import vllm_peer
from vitrt.bench.clocks import Clocks, ClockSampler, reader_for
from vitrt.bench.contenders import UnavailableError, Vitrt
from vitrt.bench.model_bench import TURNS
from vitrt.bench.results import Row
from vitrt.bench.timing import Samples, Turn
from vitrt.bench.timm_peer import Timm
from vitrt.bench.transformers_peers import Eager
from vitrt.bench.workloads import Workload
from vitrt.compare.errors import Errors, compare, float32_reference
from vitrt.compare.reference import build_tower, find_model

CPU = torch.device("cpu")
GRIDS = ((1, 6, 10), (1, 4, 2))


def samples(*turns: tuple[float, float | None]) -> Samples:
    found = Samples(lambda pixels: None, [torch.empty(0)], CPU)
    found.turns = [Turn(*turn) for turn in turns]
    return found


def test_ratios_are_those_of_turns_that_followed_one_another() -> None:
    """A card that slows down over the run slows both; the quotient of medians would not see it."""
    ours = samples((1.0, 2.0), (2.0, 4.0), (4.0, 8.0))
    theirs = samples((1.5, 4.0), (3.0, 8.0), (6.0, 12.0))
    ratio = theirs.ratio_to(ours)
    assert ratio.rate == 1.5 and ratio.wall == 2.0
    assert samples((3.0, None)).ratio_to(samples((2.0, None))).wall is None


def test_a_turn_takes_both_kinds_of_call_only_for_one_image() -> None:
    seen: list[int] = []
    mine = Samples(lambda x: seen.append(int(x)), [torch.tensor([1])], CPU)
    mine.seconds = 0.01
    seen.clear()
    mine.take_turn(0.035, single=False)
    assert len(seen) == 1 + 3 and mine.turns[0].wall_ms is None
    seen.clear()
    mine.take_turn(0.035, single=True)
    assert len(seen) == 1 + 3 + 3 and mine.turns[1].wall_ms is not None


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    turn = Samples.take_turn
    names = {}

    def named(contender: type, name: str) -> None:
        forward_for = contender.forward_for

        def wrapped(self: Any, grids: Any) -> Any:
            forward = forward_for(self, grids)
            names[forward] = name
            return forward

        monkeypatch.setattr(contender, "forward_for", wrapped)

    named(Vitrt, "vitrt")
    named(Eager, "sdpa")

    def counted(self: Samples, seconds: float, *, single: bool) -> None:
        order.append(names[self.call])
        turn(self, seconds, single=single)

    monkeypatch.setattr(Samples, "take_turn", counted)
    options = ("--workloads", "1x64", "--peers", "sdpa", "--no-check")
    assert bench("qwen3-vl-8b", *options) == 0
    assert order == ["vitrt", "sdpa"] * TURNS


def test_a_contender_that_breaks_in_the_middle_leaves_the_others_their_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward_for = Eager.forward_for

    def breaking(self: Eager, grids: Any) -> Any:
        forward, calls = forward_for(self, grids), []

        def call(pixels: Tensor) -> Any:
            calls.append(1)
            if len(calls) > 8:
                raise RuntimeError("worn out")
            return forward(pixels)

        return call

    monkeypatch.setattr(Eager, "forward_for", breaking)
    assert bench("qwen3-vl-8b", "--workloads", "1x64", "--peers", "sdpa") == 0
    assert "failed on 1x64: sdpa: RuntimeError: worn out" in capsys.readouterr().out


def test_clocks_are_medians_of_what_was_read_meanwhile() -> None:
    readings = iter([Clocks(1000.0, 300.0), *[Clocks(1500.0 + n, 600.0) for n in range(5)]])
    taken = []

    def read() -> Clocks:
        taken.append(time.monotonic())
        return next(readings)  # StopIteration at the end, as a driver that gives up

    with ClockSampler(read, period=0.001) as sampler:
        while len(taken) < 7:
            time.sleep(0.001)
    assert sampler.since(taken[1]) == Clocks(1502.0, 600.0)
    assert sampler.since(time.monotonic()) is None


def test_a_cpu_has_no_clocks() -> None:
    assert reader_for(CPU) is None
    with ClockSampler(None) as sampler:
        assert sampler.since(0.0) is None


# vLLM


class Block(nn.Module):
    do_not_compile = False


class FakeTower_VisionTransformer(nn.Module):  # noqa: N801 (as vLLM names its own)
    """What is asked of vLLM's tower, around transformers' one."""

    built: list[tuple[Any, ...]] = []  # noqa: RUF012

    def __init__(self, config: Any, norm_eps: float, prefix: str) -> None:
        super().__init__()
        self.built.append((norm_eps, prefix, torch.get_default_dtype(), CONFIGS[-1]))
        self.inner = type(TOWERS[0])._from_config(config, dtype=torch.get_default_dtype())
        self.blocks = [Block()]

    def load_weights(self, weights: Any) -> set[str]:
        self.inner.load_state_dict(dict(weights), strict=False)
        return {f"inner.{name}" for name, _ in self.inner.named_parameters()} - LEFT_OUT

    def forward(self, x: Tensor, rows: list[list[int]]) -> Tensor:
        out = self.inner(x, grid_thw=torch.tensor(rows))
        levels = getattr(out, "deepstack_features", None) or ()
        return torch.cat([out.pooler_output, *levels], dim=1)


TOWERS: list[nn.Module] = []
CONFIGS: list[Any] = []
LEFT_OUT: set[str] = set()


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules of vLLM that its towers are built with."""
    import contextlib

    @contextlib.contextmanager
    def set_current(config: Any) -> Any:
        CONFIGS.append(config)
        yield

    parts: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": "0.0", "__path__": []},
        "vllm.config": {
            "CompilationConfig": lambda **options: options,
            "VllmConfig": lambda compilation_config: compilation_config,
            "set_current_vllm_config": set_current,
        },
        "vllm.distributed": {
            "init_distributed_environment": lambda *arguments: None,
            "initialize_model_parallel": lambda *arguments: None,
        },
        "vllm.model_executor": {"__path__": []},
        "vllm.model_executor.models": {"__path__": []},
        "vllm.model_executor.models.qwen3_vl": {"Any_VisionTransformer": None},
        "vllm.model_executor.models.qwen2_5_vl": {"Any_VisionTransformer": None},
    }
    for name, values in parts.items():
        module: Any = types.ModuleType(name)
        for key, value in values.items():
            setattr(module, key, FakeTower_VisionTransformer if value is None else value)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm_peer, "_is_set_up", False)
    FakeTower_VisionTransformer.built.clear()
    CONFIGS.clear()
    LEFT_OUT.clear()


@pytest.mark.parametrize("model", ["qwen3-vl-8b", "qwen2.5-vl-7b"])
def test_vllms_tower_gets_the_weights_and_gives_the_features(model: str, fake_vllm: None) -> None:
    found = find_model(model, tiny=True)
    tower = build_tower(found, device=CPU, dtype=torch.float32)
    TOWERS[:] = [tower]
    settings = vllm_peer.build_settings(tower, found.config, CPU, torch.float32)
    assert list(settings) == ["eager", "compiled"]
    assert [config["compile_mm_encoder"] for config in CONFIGS] == [False, True]
    assert {built[:3] for built in FakeTower_VisionTransformer.built} == {
        (1e-6, "visual", torch.float32)
    }
    pixels = torch.randn(68, found.config.patch_dim, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = float32_reference(tower, pixels, GRIDS)
        for name, run in vllm_peer.runs_of(settings, GRIDS, pixels):
            output = vllm_peer.split_output(run(pixels), found.config)
            assert compare(output, expected).worst < 1e-6, name


def test_the_fastest_setting_of_vllm_is_taken(
    fake_vllm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_model("qwen3-vl-8b", tiny=True)
    peer = object.__new__(vllm_peer.Vllm)
    peer.device, peer.dtype, peer.config, peer.chosen = CPU, torch.float32, found.config, {}

    def slow(x: Tensor, rows: Any) -> Tensor:
        time.sleep(0.02)
        return torch.zeros(17, 4 * 64)

    def broken(x: Tensor, rows: Any) -> Tensor:
        raise RuntimeError("no such kernel")

    peer.settings = {"slow": slow, "broken": broken, "fast": lambda x, rows: torch.ones(17, 256)}
    monkeypatch.setattr(vllm_peer, "CHOOSING_SECONDS", 0.01)
    embeddings, levels = peer.forward_for(GRIDS)(torch.empty(0))
    assert peer.chosen == {GRIDS: "fast"} and bool((embeddings == 1).all())
    assert embeddings.shape == (17, 64) and len(levels) == 3
    peer.settings = {"broken": broken}
    with pytest.raises(UnavailableError, match="broken: RuntimeError: no such kernel"):
        peer.forward_for(GRIDS)


def test_weights_that_vllm_does_not_take_are_named(fake_vllm: None) -> None:
    found = find_model("qwen3-vl-8b", tiny=True)
    TOWERS[:] = [tower := build_tower(found, device=CPU, dtype=torch.float32)]
    LEFT_OUT.add("inner.merger.norm.weight")
    with pytest.raises(UnavailableError, match=r"other names: inner\.merger\.norm\.weight"):
        vllm_peer.build_settings(tower, found.config, CPU, torch.float32)


@pytest.mark.parametrize("name", ["vllm", "timm"])
def test_a_peer_that_is_not_installed_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_model("qwen3-vl-8b", tiny=True)
    tower = build_tower(found, device=CPU, dtype=torch.float32)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnavailableError, match="cannot be imported"):
        if name == "timm":
            Timm(tower, found.config)
        vllm_peer.build_settings(tower, found.config, CPU, torch.float32)


# timm


class FakeViT(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        FakeViT.last = self
        self.weight = nn.Parameter(torch.zeros(()))

    last: FakeViT

    def forward(self, images: Tensor) -> Tensor:
        self.images = images
        rows, columns = (n // self.options["patch_size"] for n in self.options["img_size"])
        return torch.zeros(len(images), rows * columns, self.options["embed_dim"])


@pytest.fixture
def fake_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("timm", "timm.models", "timm.models.vision_transformer"):
        module: Any = types.ModuleType(name)
        module.__path__, module.VisionTransformer = [], FakeViT
        monkeypatch.setitem(sys.modules, name, module)


def test_timm_runs_the_same_widths_on_images_of_one_size(fake_timm: None) -> None:
    found = find_model("qwen3-vl-8b")
    tower = nn.Linear(1, 1)
    peer = Timm(tower, found.config)
    assert not peer.same_tower
    output, _ = peer.forward_for(((1, 4, 6),) * 3)(torch.empty(0))
    assert output.shape == (72, 1152)
    made = FakeViT.last
    assert made.images.shape == (3, 3, 64, 96)
    assert made.options["depth"] == 27 and made.options["num_heads"] == 16
    assert int(made.options["embed_dim"] * made.options["mlp_ratio"]) == 4304
    for grids in (((1, 4, 6), (1, 6, 4)), ((2, 4, 6),)):
        with pytest.raises(UnavailableError, match="one size"):
            peer.forward_for(grids)
    with pytest.raises(UnavailableError, match="no windows"):
        Timm(tower, find_model("qwen2.5-vl-7b").config)


def test_fp8_is_a_contender_beside_bfloat16(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    options = ("--workloads", "32x560", "--peers", "fp8", "--json", str(file))
    assert bench("qwen3-vl-8b", *options, "--dtype", "bfloat16") in (0, 1)
    (row,) = json.loads(file.read_text())["models"][0]["workloads"]
    assert row["timings"]["fp8"]["over_vitrt"]["rate"] > 0 and row["errors"]["fp8"]
    out = capsys.readouterr().out
    assert "fp8: vitrt, precision fp8; " in out and "  error against float32 " in out
    assert bench("qwen3-vl-8b", *options) == 0
    assert "not run: fp8: precision 'fp8' needs dtype bfloat16" in capsys.readouterr().out


def test_fp8_has_no_bound_but_has_to_be_finite() -> None:
    row = Row(Workload("any", GRIDS), 1, promised=False)
    row.errors["vitrt"] = row.reference_errors = Errors(0.01, ())
    row.errors["vitrt"] = Errors(0.5, ())
    assert row.agrees
    row.promised = True
    assert not row.agrees
    row.promised, row.errors["vitrt"] = False, Errors(math.inf, ())
    assert not row.agrees


def test_the_table_says_ratios_first(
    fake_timm: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--workloads", "1x64,mixed16", "--peers", "sdpa,timm")
    assert bench("qwen3-vl-8b", *options) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if line.startswith("workload"))
    assert head.index("/ sdpa") < head.index("/ timm") < head.index("vitrt ms")
    single = next(line for line in lines if line.startswith("1x64 "))
    assert [word.endswith("x") for word in single.split()[1:3]] == [True, True]
    assert any("failed on mixed16: timm: a batch of timm's has images of one size" in line
               for line in lines)  # fmt: skip
