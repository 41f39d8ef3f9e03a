"""The benchmark: what it runs, that it notices a wrong output, that a broken peer ends nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.support.bench_run import bench
from tests.support.checkpoints import reference_tower
from tests.support.scripts import run_script
from vitrt import cli
from vitrt.bench import transformers_peers
from vitrt.bench.ablate import ablate, native_rope_
from vitrt.bench.contenders import UnavailableError, Vitrt
from vitrt.bench.profiling import Span, kernel_group, summarise
from vitrt.bench.runs import run_bench
from vitrt.bench.timing import Samples, measure
from vitrt.bench.transformers_peers import Compiled, Eager
from vitrt.bench.workloads import Workload, build_workloads
from vitrt.compare.errors import compare, float32_reference, relative_error
from vitrt.compare.reference import build_tower, find_model, save_checkpoint
from vitrt.encoder import VisionEncoder
from vitrt.kernels.rope import rope_ref
from vitrt.kernels.segments import Rotary
from vitrt.layers.rotary import rotary_tables

CPU = torch.device("cpu")
MODELS = ("qwen3-vl-8b", "qwen2.5-vl-7b")


@pytest.fixture(scope="module", params=MODELS)
def setting(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, VisionEncoder, Workload, Tensor]:
    """transformers' tiny tower, vitrt's on the same weights, a mixed batch and its pixels."""
    source = find_model(request.param, tiny=True)
    tower = build_tower(source, device=CPU, dtype=torch.float32)
    folder = save_checkpoint(tower, source, tmp_path_factory.mktemp("bench"))
    encoder = VisionEncoder.from_pretrained(folder, device="cpu", dtype="float32")
    workload = Workload("odd", ((1, 6, 10), (2, 4, 2), (1, 14, 22)))
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(workload.patches, source.config.patch_dim, generator=generator)
    return tower, encoder, workload, pixels


def test_workloads_are_the_published_grids() -> None:
    qwen3 = {w.name: w.grids for w in build_workloads(16)}
    qwen2 = {w.name: w.grids for w in build_workloads(14)}
    assert qwen3["1x560"] == ((1, 36, 36),)
    assert qwen2["1x560"] == ((1, 40, 40),)
    assert qwen3["1x1120x700"] == ((1, 44, 70),)
    assert qwen2["1x1120x700"] == ((1, 50, 80),)
    assert qwen3["32x560"] == ((1, 36, 36),) * 32
    assert qwen2["16x1120x700"] == ((1, 50, 80),) * 16
    assert qwen3["1x4k"] == qwen2["1x4k"] == ((1, 128, 256),)
    assert qwen3["mixed16"][0] == (1, 16, 40)
    assert qwen3["mixed16"][15] == (1, 46, 10)
    assert qwen3["1x224"] == ((1, 14, 14),)


def test_tiny_workloads_keep_whole_merged_tokens() -> None:
    for workload in build_workloads(14, tiny=True):
        assert all(h % 2 == 0 and w % 2 == 0 and h and w for _, h, w in workload.grids)


def test_an_unknown_workload_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"32x561.*32x560"):
        build_workloads(14, ("32x561",))


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_sm90_tst_192x192_64x4_1x2_h_bz_coopB_bias_TNT", "gemm"),
        (
            "void cutlass::device_kernel<flash::FlashAttnFwdSm90<cutlass::gemm::X>>",
            "full attention",
        ),
        ("_window_attention_kernel", "window attention"),
        ("_rope_kernel", "rope"),
        ("_add_rms_norm_kernel", "norm"),
        ("void at::native::vectorized_layer_norm_kernel<c10::BFloat16>", "norm"),
        ("kernel_cutlass_kernel_quack_gemm_sm90_GemmGatedSm90_swiglu", "gemm"),
        ("_swiglu_kernel", "activation"),
        ("_patchify_kernel", "patches"),
        ("Memcpy DtoD (Device -> Device)", "other"),
    ],
)
def test_kernels_fall_into_groups(name: str, group: str) -> None:
    assert kernel_group(name) == group


def test_idle_is_what_no_kernel_covers() -> None:
    spans = [
        Span("_rope_kernel", 100.0, 10.0),
        Span("gemm", 105.0, 20.0),  # overlaps: 15 us more of busy time
        Span("gemm", 145.0, 5.0),  # after 20 us of nothing
    ]
    profile = summarise(reversed(spans), forwards=2)
    assert profile.total_ms == pytest.approx(0.025)
    assert profile.groups["idle"] == pytest.approx(0.010)
    assert profile.groups["gemm"] == pytest.approx(0.0125)
    assert profile.kernels[0].calls == 1.0


def test_errors_never_pass_on_nan_or_another_shape() -> None:
    reference = torch.randn(5, 7)
    assert relative_error(reference * 1.5, reference) == pytest.approx(0.5)
    assert relative_error(reference.fill_diagonal_(math.nan), torch.ones(5, 7)) == math.inf
    assert relative_error(torch.ones(1, 7), torch.ones(5, 7)) == math.inf
    missing = compare((torch.ones(2), ()), (torch.ones(2), (torch.ones(2),)))
    assert missing.worst == math.inf


def test_timing_counts_and_takes_inputs_in_turn() -> None:
    seen = []
    inputs = [torch.tensor([i]) for i in range(3)]
    timing = measure(lambda x: seen.append(int(x)), inputs, CPU, seconds=1e-4, latency=True)
    assert timing.wall_ms is not None and timing.wall_ms >= timing.host_ms
    assert seen[-timing.calls :][:4] == [0, 1, 2, 0]


def test_vitrt_and_transformers_hold_the_same_weights(setting: Any) -> None:
    tower, encoder, workload, pixels = setting
    expected = float32_reference(tower, pixels, workload.grids)
    assert compare(Vitrt(encoder).forward_for(workload.grids)(pixels), expected).worst < 1e-5
    assert len(expected[1]) == len(encoder.config.deepstack_visual_indexes)


@pytest.mark.parametrize("model", [*MODELS, "qwen2-vl-7b", "qwen3.5-0.8b", "qwen2.5-omni-7b"])
def test_flash_attention_from_any_module_serves_transformers_eager_and_compiled(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import modeling_flash_attention_utils as utils

    source = find_model(model, tiny=True)
    tower = build_tower(source, device=CPU, dtype=torch.bfloat16)
    grids = ((1, 6, 10), (2, 4, 2), (1, 14, 22))
    pixels = torch.randn(384, source.config.patch_dim).bfloat16()
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn"):
        monkeypatch.setattr(utils, name, None)
    monkeypatch.setattr(utils, "_process_flash_kwargs_fn", None)
    module: Any = types.ModuleType("flash_of_a_test")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    module.flash_attn_func = module.flash_attn_with_kvcache = lambda *_: None
    monkeypatch.setitem(globals(), "LONGEST", [])
    transformers_peers.give_flash_attention(module)
    assert "flash_attn_interface" not in sys.modules

    expected = Eager(tower, "sdpa").forward_for(grids)(pixels)
    got = Eager(tower, "flash_attention_3").forward_for(grids)(pixels)
    assert compare(got, expected).worst < 0.02  # two roundings of bfloat16 through three layers
    assert len(LONGEST) == tower.config.depth
    assert max(LONGEST) == 14 * 22

    # The whole tower is one graph where the attention call is, so the peer is as fast as it can be.
    torch._dynamo.utils.counters.clear()
    forward = Compiled(tower, "flash_attention_3", backend="eager").forward_for(grids)
    assert compare(forward(pixels), got).worst < 1e-6
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


LONGEST: list[int] = []  # max_seqlen of every attention call


@torch.library.custom_op("vitrt_test::varlen_attention", mutates_args=())
def _varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float
) -> Tensor:
    bounds = cu_seqlens.tolist()
    assert longest == max(b - a for a, b in pairwise(bounds))
    LONGEST.append(longest)
    out = torch.empty_like(q)
    for a, b in pairwise(bounds):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) * scale
        out[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[a:b])
    return out


@_varlen_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float) -> Tensor:
    return torch.empty_like(q)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """What FlashAttention-3's modules offer, without a GPU."""
    assert softmax_scale is not None
    return _varlen_attention(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about hosts without a GPU")
def test_fa3_says_why_it_cannot_run() -> None:
    with pytest.raises(UnavailableError, match="CUDA"):
        transformers_peers.load_fa3()


def test_native_rope_is_the_rope_of_the_kernels() -> None:
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(37, 3, 2, 24, generator=generator)
    positions = torch.randint(0, 50, (37, 2), generator=generator, dtype=torch.int32)
    rotary = Rotary(positions, *rotary_tables(24, 50))
    expected = qkv.clone()
    rope_ref(expected, rotary)
    native_rope_(qkv, rotary)
    torch.testing.assert_close(qkv, expected, rtol=0, atol=1e-6)


def test_ablations_compute_the_same_and_leave_the_encoder_as_it_was(setting: Any) -> None:
    _, encoder, workload, pixels = setting
    before = encoder(pixels, torch.tensor(workload.grids)).embeddings
    caches = encoder.tower.plans, encoder.tower.frames
    rows = ablate(encoder, workload, [pixels], seconds=1e-3)
    assert {row.part for row in rows} >= {"RoPE kernel", "cached positions", "attention=auto"}
    assert all(row.ratio is not None and row.ratio > 0 for row in rows), rows
    assert (encoder.tower.plans, encoder.tower.frames) == caches
    assert torch.equal(encoder(pixels, torch.tensor(workload.grids)).embeddings, before)


def test_a_run_prints_its_tables_and_writes_them_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    options = ("--workloads", "1x224,mixed16", "--profile", "--peers", "sdpa,fa3", "--json")
    assert bench("qwen2.5-vl-7b", *options, str(file)) == 0
    text = capsys.readouterr().out
    assert "qwen2.5-vl-7b (tiny) (random weights)" in text
    assert "DISAGREES" not in text
    report = json.loads(file.read_text())
    (model,) = report["models"]
    single, mixed = model["workloads"]
    assert single["workload"] == "1x224" and len(mixed["grids"]) == 4
    for row in model["workloads"]:
        ours = row["timings"]["vitrt"]
        assert ours["share"] == pytest.approx(
            row["flops"] / ours["rate_ms"] / 1e9 / report["ceiling_tflops"]
        )
        assert row["timings"]["sdpa"]["over_vitrt"]["rate"] > 0
        assert row["clocks"] is None or row["clocks"]["watts"] > 0
        assert row["errors"]["vitrt"]["embeddings"] < 1e-5
        assert sum(row["profile"]["groups"].values()) == pytest.approx(row["profile"]["total_ms"])
    if not torch.cuda.is_available():
        assert "CUDA" in model["unavailable"]["fa3"] and "not run: fa3: " in text
    assert single["timings"]["vitrt"]["wall_ms"] > 0 and single["plan_ms"] > 0


def test_a_json_file_that_cannot_be_written_is_found_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrt.bench.runs.run_bench", lambda *_: pytest.fail("it ran"))
    with pytest.raises(ValueError, match="missing/bench.json lies in a folder that does not exist"):
        bench("qwen3-vl-8b", "--json", str(tmp_path / "missing/bench.json"))
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder"):
        bench("qwen3-vl-8b", "--json", str(tmp_path))


def test_tables_are_printed_even_if_the_json_file_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "short-lived"
    folder.mkdir()

    def lose_the_folder(*arguments: Any) -> Any:
        folder.rmdir()
        return run_bench(*arguments)

    monkeypatch.setattr("vitrt.bench.runs.run_bench", lose_the_folder)
    options = ("--workloads", "1x224", "--peers", "none", "--json", str(folder / "bench.json"))
    with pytest.raises(FileNotFoundError):
        bench("qwen3-vl-8b", *options)
    assert "1x224" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    turn = Samples.take_turn

    def interrupted(*args: Any, **options: Any) -> None:
        calls.append(args)
        if len(calls) == 8:  # in the second workload
            os.kill(os.getpid(), signal.SIGTERM)
        turn(*args, **options)

    monkeypatch.setattr(Samples, "take_turn", interrupted)
    file = tmp_path / "bench.json"
    options = ("--workloads", "1x224,mixed16", "--peers", "none", "--json", str(file))
    assert bench("qwen2.5-vl-7b", *options) == 130
    assert "interrupted" in capsys.readouterr().out
    report = json.loads(file.read_text())
    first, second = report["models"][0]["workloads"]
    assert report["interrupted"] and first["timings"]["vitrt"] and not second["timings"]


def test_a_wrong_output_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = Vitrt.forward_for

    def wrong(self: Vitrt, grids: Any) -> Any:
        forward = right(self, grids)
        return lambda pixels: (forward(pixels)[0] * (1 + 1e-4), forward(pixels)[1])

    monkeypatch.setattr(Vitrt, "forward_for", wrong)
    assert bench("qwen3-vl-8b", "--workloads", "1x224", "--peers", "none") == 1
    assert "DISAGREES" in capsys.readouterr().out


def test_a_lower_precision_is_held_against_transformers_own_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "bench.json"
    options = ("--workloads", "1x224", "--peers", "none", "--dtype", "bfloat16", "--json")
    code = bench("qwen3-vl-8b", *options, str(file))
    row = json.loads(file.read_text())["models"][0]["workloads"][0]
    ours, theirs = row["errors"]["vitrt"], row["reference_errors"]
    worst = max(
        a / b
        for a, b in zip(
            [ours["embeddings"], *ours["deepstack"]],
            [theirs["embeddings"], *theirs["deepstack"]],
            strict=True,
        )
    )
    assert row["error_ratio"] == pytest.approx(worst)
    assert code == (0 if worst <= 1.05 else 1)


def test_a_peer_that_breaks_is_reported_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Eager, grids: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Eager, "forward_for", broken)
    assert bench("qwen3-vl-8b", "--workloads", "1x224", "--peers", "sdpa") == 0
    text = capsys.readouterr().out
    assert "failed on 1x224: sdpa: RuntimeError: out of luck" in text


def test_real_weights_are_taken_from_a_checkpoint(tiny_qwen2_5_vl: Path) -> None:
    source = find_model(str(tiny_qwen2_5_vl))
    assert source.checkpoint is not None
    tower = build_tower(source, device=CPU, dtype=torch.float32)
    expected = reference_tower(tiny_qwen2_5_vl).state_dict()
    assert set(tower.state_dict()) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tower.state_dict().items())


def test_a_config_alone_means_random_weights(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes((tiny_qwen3_vl / "config.json").read_bytes())
    for name in (str(file), str(tmp_path)):
        assert find_model(name).checkpoint is None
        assert find_model(name).config == find_model(str(tiny_qwen3_vl)).config


@pytest.mark.parametrize(
    "arguments", [("--workloads", "5x5"), ("--peers", "sglang"), ("no-such-model",)]
)
def test_bad_arguments_are_named(arguments: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=arguments[-1]):
        bench(*arguments)


def encode(model: Path, images: Path, output: Path, *options: str) -> Path:
    command = ["encode", str(model), str(images), "--output", str(output), "--device", "cpu"]
    assert cli.main([*command, *options]) == 0
    return output


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(7)
    for index, (height, width) in enumerate(((90, 140), (200, 75))):
        noise = generator.integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((width, height)).save(folder / f"{index}.png")
    return folder


def test_compare_holds_stored_features_against_transformers(
    tiny_qwen3_vl: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path of its own from file to features: transformers' processor and tower."""
    features = encode(tiny_qwen3_vl, photos, tmp_path / "features")
    capsys.readouterr()
    assert run_script("compare.py", features, "--model", tiny_qwen3_vl, "--images", photos) == 0
    text = capsys.readouterr().out
    assert "within the bound of 1e-05" in text
    rows = {line.rsplit(maxsplit=4)[0] for line in text.splitlines()[1:-1]}
    assert rows == {"embeddings", "deepstack 0", "deepstack 1", "deepstack 2"}


def test_compare_sees_another_dtype_and_a_missing_image(
    tiny_qwen3_vl: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = encode(tiny_qwen3_vl, photos, tmp_path / "exact")
    rounded = encode(tiny_qwen3_vl, photos, tmp_path / "rounded", "--dtype", "bfloat16")
    assert run_script("compare.py", rounded, exact) == 1
    assert "OVER the bound" in capsys.readouterr().out
    assert run_script("compare.py", rounded, exact, "--bound", "0.05") == 0
    part = encode(tiny_qwen3_vl, photos / "0.png", tmp_path / "part")
    assert run_script("compare.py", part, exact, "--bound", "0.05") == 1
    assert "1 images only in the reference: 1.png" in capsys.readouterr().out


def test_end_to_end_rates_are_measured_on_every_image(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    options = ("--tiny", "--images", 12, "--size", "140x90", "--workers", 2, "--json", file)
    assert run_script("bench/end_to_end.py", *options) == 0
    rates = json.loads(file.read_text())
    assert min(rates["decode"], rates["device"], rates["end_to_end"]) > rates["whole"] > 0
    assert rates["of_device"] == pytest.approx(rates["end_to_end"] / rates["device"])
