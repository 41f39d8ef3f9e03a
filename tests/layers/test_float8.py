"""Towers in e4m3: bounds that hold on any input, and features near those of bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.checkpoints import tiny_checkpoint
from vitrt import VisionEncoder
from vitrt.kernels.gemm_fp8 import E4M3, linear_fp8_ref, quantise_weight
from vitrt.kernels.to_e4m3 import LARGEST
from vitrt.layers import float8, linear, norm
from vitrt.layers.float8 import Float8Norm, product_bound, scale_for
from vitrt.layers.norm import LayerNorm, Norm, RMSNorm

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def filled(made: Norm, generator: torch.Generator) -> Norm:
    for parameter in (made.weight, made.bias):
        if parameter is not None:
            nn.init.normal_(parameter, std=2.0, generator=generator)
    return made


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), spike=st.sampled_from([0.0, 10.0, 1e6]))
def test_no_input_leaves_the_range(kind: type[Norm], seed: int, spike: float) -> None:
    """One massive channel is the worst case of a norm: its element comes near sqrt(D)."""
    generator = torch.Generator().manual_seed(seed)
    made = filled(kind(24), generator)
    x = torch.randn(64, 24, generator=generator)
    x[:, seed % 24] += spike
    scaled = Float8Norm.of(made.weight, made.bias)
    normed = made(x)
    torch.testing.assert_close(
        made(x) * scaled.scale,
        nn.functional.rms_norm(x, (24,), scaled.weight, 1e-6)
        if kind is RMSNorm
        else nn.functional.layer_norm(x, (24,), scaled.weight, scaled.bias, 1e-6),
        rtol=1e-4,
        atol=1e-3,
    )
    assert (normed * scaled.scale).abs().max() <= LARGEST * 0.86
    weight = torch.randn(40, 24, generator=generator)
    bias = torch.randn(40, generator=generator)
    result = normed @ weight.t() + bias
    bound = product_bound(made, weight, bias)
    assert (result.abs() <= bound * 1.001).all()
    assert (result * scale_for(bound)).abs().max() <= LARGEST * 0.86


def test_bounds_are_not_far_off() -> None:
    """A bound is worth its simplicity while it wastes few binades of e4m3's 14."""
    generator = torch.Generator().manual_seed(0)
    made = LayerNorm(1152)
    nn.init.normal_(made.weight, 1.0, 0.1, generator=generator)
    nn.init.normal_(made.bias, 0.0, 0.1, generator=generator)
    x = torch.randn(4096, 1152, generator=generator)
    scale = Float8Norm.of(made.weight, made.bias).scale
    assert (made(x) * scale).abs().max() > LARGEST / 16


def features(encoder: VisionEncoder, values: Tensor, grids: list[tuple[int, int, int]]) -> Tensor:
    return encoder(values, grids).embeddings.double()


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (float8, linear, norm):
        monkeypatch.setattr(module, "FEWEST_ROWS", 1)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_near(family: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(family, tmp_path)
    grids = [(1, 8, 12), (1, 6, 6)]
    exact = VisionEncoder.from_pretrained(folder, device="cpu")
    values = torch.randn(sum(h * w for _, h, w in grids), exact.config.patch_dim)
    expected = features(exact, values, grids)
    half = VisionEncoder.from_pretrained(folder, device="cpu", dtype="bfloat16")
    coarse = VisionEncoder.from_pretrained(
        folder, device="cpu", dtype="bfloat16", precision="fp8", fp8_skip_blocks=0
    )
    errors = [
        ((features(encoder, values, grids) - expected).norm() / expected.norm()).item()
        for encoder in (half, coarse)
    ]
    # An element of e4m3 is off by 2^-4 of itself at most, 2^-4 / sqrt(3) in the mean, in each of
    # two operands; products and layers average, residuals keep what came before.
    assert errors[0] < errors[1] < 0.25


@pytest.mark.usefixtures("few_rows")
def test_skipped_blocks_stay_as_they_are(tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen3_vl", tmp_path)
    encoder = VisionEncoder.from_pretrained(
        folder, device="cpu", dtype="bfloat16", precision="fp8", fp8_skip_blocks=1
    )
    plain = VisionEncoder.from_pretrained(folder, device="cpu", dtype="bfloat16")
    values, grids = torch.randn(16, encoder.config.patch_dim), [(1, 4, 4)]
    layers = [encoder.tower.block(index).attn.qkv.float8 for index in range(encoder.config.depth)]
    assert layers[0] is None and all(layer is not None for layer in layers[1:])
    assert encoder.tower.merger_norm.float8 is None
    everything = VisionEncoder.from_pretrained(
        folder, device="cpu", dtype="bfloat16", precision="fp8", fp8_skip_blocks=99
    )
    assert torch.equal(features(everything, values, grids), features(plain, values, grids))


def test_few_rows_run_as_without(tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen3_vl", tmp_path)
    encoder = VisionEncoder.from_pretrained(
        folder, device="cpu", dtype="bfloat16", precision="fp8", fp8_skip_blocks=0
    )
    plain = VisionEncoder.from_pretrained(folder, device="cpu", dtype="bfloat16")
    values, grids = torch.randn(16, encoder.config.patch_dim), [(1, 4, 4)]
    assert torch.equal(features(encoder, values, grids), features(plain, values, grids))


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_other_dtypes_are_refused(dtype: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen3_vl", tmp_path)
    with pytest.raises(ValueError, match="precision 'fp8' needs dtype bfloat16"):
        VisionEncoder.from_pretrained(folder, device="cpu", dtype=dtype, precision="fp8")


def test_the_product_takes_its_scales_back() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(n, 64, generator=generator) for n in (33, 48))
    weight[3] *= 1e-3  # a channel of its own scale
    weight[5] = 0
    bias, residual = torch.randn(48, generator=generator), torch.randn(33, 48, generator=generator)
    scale = LARGEST / x.abs().max()
    quantised, row_scale = quantise_weight(weight)
    # Rounding to e4m3 changes a value by 2^-4 of itself at most.
    torch.testing.assert_close(
        quantised.float() * row_scale[:, None],
        weight,
        rtol=2**-4,
        atol=float(row_scale.max()) * 2**-9,
    )
    x8 = (x * scale).to(E4M3)
    product = (x8.double() / scale) @ (quantised.double() * row_scale[:, None].double()).t()
    scales = row_scale / scale
    plain = linear_fp8_ref(x8, quantised, scales, bias)
    assert plain.dtype == torch.bfloat16
    torch.testing.assert_close(plain.double(), product + bias, rtol=2**-8, atol=1e-4)
    added = linear_fp8_ref(x8, quantised, scales, bias, residual=residual)
    torch.testing.assert_close(added.double(), product + bias + residual, rtol=1e-5, atol=1e-5)
    out_scale = torch.full((48,), 10.0)
    activated = linear_fp8_ref(
        x8, quantised, scales, bias, activation="gelu_tanh", out_scale=out_scale
    )
    wanted = nn.functional.gelu(product + bias, approximate="tanh") * 10
    assert activated.dtype == E4M3
    torch.testing.assert_close(activated.double(), wanted, rtol=2**-4, atol=2**-9)
    quick = linear_fp8_ref(
        x8, quantised, scales, bias, activation="quick_gelu", out_scale=out_scale
    )
    wanted = (product + bias) * torch.sigmoid(1.702 * (product + bias)) * 10
    torch.testing.assert_close(quick.double(), wanted, rtol=2**-4, atol=2**-9)
    gated = linear_fp8_ref(x8, quantised, scales, bias, activation="swiglu")
    gate, up = (product + bias)[:, 0::2], (product + bias)[:, 1::2]
    torch.testing.assert_close(gated.double(), nn.functional.silu(gate) * up, rtol=2**-8, atol=1e-4)
