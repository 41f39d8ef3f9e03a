"""The registry, the sdpa backend and the work list; all installed backends on a GPU."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from types import MappingProxyType

import numpy as np
import pytest
import torch

from tests.support.attention_cases import (
    dense_reference,
    make_rotary,
    make_segments,
    no_rotary,
    rotated,
)
from vitrt.attention import (
    AutoBackend,
    BackendSpec,
    get_backend,
    register,
    resolve_attention,
    usable,
)
from vitrt.attention.auto import Rule
from vitrt.attention.registry import _SPECS
from vitrt.attention.sdpa import SdpaBackend, _batches
from vitrt.kernels.segments import TILE_ROWS, tile_list

MIXES = [
    [1],
    [7],
    [64] * 20,  # one run of windows
    [64, 64, 32, 64, 64, 32, 16, 16],  # ragged edges between
    [64, 4, 64, 8, 64, 4],
    [300, 5, 300],
    [1100, 3, 1100, 1100],  # runs long enough for calls of their own, apart
    [12, 0, 12],  # an empty segment
    [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5],
]


@pytest.mark.parametrize("lengths", MIXES, ids=str)
@pytest.mark.parametrize("into_out", [False, True])
def test_sdpa_equals_dense(lengths: list[int], into_out: bool) -> None:
    torch.manual_seed(len(lengths))
    tokens = sum(lengths)
    qkv = torch.randn(tokens, 3, 2, 24)
    out = torch.full((tokens, 48), math.nan) if into_out else None
    got = SdpaBackend()(qkv, make_segments(lengths), no_rotary(tokens, 24), out)
    assert not into_out or got is out
    expected = dense_reference(qkv, lengths)
    # Outputs are averages of standard normals: float32 rounding over at most 24 + 1100 terms stays
    # far under this.
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_sdpa_leaves_padding_rows_alone() -> None:
    lengths = [8, 4, 8]
    qkv = torch.randn(30, 3, 2, 16)
    qkv[20:] = math.nan
    out = torch.full((30, 32), 7.0)
    SdpaBackend()(qkv, make_segments(lengths), no_rotary(30, 16), out)
    torch.testing.assert_close(
        out[:20].double(), dense_reference(qkv, lengths), rtol=1e-5, atol=1e-5
    )
    assert (out[20:] == 7.0).all()


@pytest.mark.parametrize("lengths", [[64] * 648, [64, 32] * 300, [1296] * 32], ids=len)
def test_sdpa_makes_few_calls(lengths: list[int]) -> None:
    batches = _batches(tuple(lengths), torch.device("cpu"))
    assert len(batches) == len(set(lengths))
    assert sum(batch.count * batch.length for batch in batches) == sum(lengths)


def test_frames_do_not_attend_to_each_other() -> None:
    qkv = torch.randn(3 * 12, 3, 2, 16)
    segments, rotary = make_segments([12] * 3), no_rotary(36, 16)
    before = SdpaBackend()(qkv, segments, rotary)
    qkv[12:24] = 100.0
    after = SdpaBackend()(qkv, segments, rotary)
    assert torch.equal(before[:12], after[:12])
    assert torch.equal(before[24:], after[24:])
    assert not torch.equal(before[12:24], after[12:24])


@pytest.mark.parametrize(
    "lengths", [[1], [TILE_ROWS], [TILE_ROWS + 1], [5, 300, 0, 128, 257]], ids=str
)
def test_tile_list_covers_each_row_once(lengths: list[int]) -> None:
    cu = np.concatenate([[0], np.cumsum(lengths)])
    tiles = tile_list(cu)
    assert tiles.dtype == np.int32
    assert tiles.shape[1] == 3
    rows = []
    for first, start, end in tiles:
        assert (start, end) in pairwise(cu)
        assert start <= first < end
        rows += range(first, min(first + TILE_ROWS, end))
    assert sorted(rows) == list(range(sum(lengths)))
    spans = [end - start for _, start, end in tiles]
    assert spans == sorted(spans, reverse=True)


def test_usable_gives_every_name_a_reason_on_cpu() -> None:
    reasons = dict(usable("cpu", torch.float32, 80))
    assert list(reasons) == ["sdpa", "triton", "fa2", "fa3", "fa4", "short", "window"]
    assert reasons.pop("sdpa") is None
    assert all(reasons.values())
    assert "cpu" in str(reasons["triton"])


@pytest.mark.parametrize("name", ["triton", "fa2", "fa3", "fa4", "short"])
def test_named_backend_that_cannot_run_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' cannot run on cpu .*Usable here: auto, sdpa"):
        resolve_attention(name, device="cpu", dtype=torch.float32, head_dim=80)


def test_unknown_and_misplaced_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no such backend; known are auto, sdpa, triton"):
        resolve_attention("flash", device="cpu", dtype=torch.float32, head_dim=80)
    with pytest.raises(ValueError, match="window layers only"):
        resolve_attention("window", device="cpu", dtype=torch.float32, head_dim=80)


def test_auto_on_cpu_is_sdpa_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vitrt"):
        choice = resolve_attention("auto", device="cpu", dtype=torch.float32, head_dim=80)
        resolve_attention("auto", device="cpu", dtype=torch.float32, head_dim=80, window_patches=64)
    assert choice.full.name == choice.window.name == "sdpa"
    assert choice.for_batch([9], 2).choice == choice
    assert [r.getMessage() for r in caplog.records] == [
        "attention: sdpa",
        "attention: sdpa in full layers, sdpa in window layers",
    ]


def test_registered_backend_serves_both_kinds_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrt.attention.registry._SPECS", dict(_SPECS))
    register(BackendSpec("mine", lambda *_: SdpaBackend(), lambda *_: None))
    choice = resolve_attention("mine", device="cpu", dtype=torch.float32, head_dim=80)
    assert choice.full is choice.window
    with pytest.raises(ValueError, match="'mine' is taken"):
        register(BackendSpec("mine", lambda *_: SdpaBackend(), lambda *_: None))
    with pytest.raises(ValueError, match="'auto' is taken"):
        register(BackendSpec("auto", lambda *_: SdpaBackend(), lambda *_: None))


class Fake(SdpaBackend):
    """A backend that a test can tell from others."""

    capturable = True

    def __init__(self, name: str) -> None:
        self.name = name


def pretend_hopper(
    monkeypatch: pytest.MonkeyPatch,
    installed: set[str],
    broken: str = "",
    most_window: Mapping[str, int] = MappingProxyType({}),
) -> None:
    def spec(name: str) -> BackendSpec:
        def load(*_: object) -> Fake:
            if name == broken:
                raise ImportError("undefined symbol: _ZN2at4_ops")
            return Fake(name)

        return BackendSpec(
            name,
            load,
            lambda *_: None if name in installed else "not installed",
            most_window=most_window.get(name),
        )

    names = [name for name in _SPECS if name != "window"]
    specs = {name: spec(name) for name in names} | {"window": _SPECS["window"]}
    monkeypatch.setattr("vitrt.attention.registry._SPECS", specs)
    monkeypatch.setattr("vitrt.attention.auto.cuda_capability", lambda device: (9, 0))


def test_auto_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_hopper(monkeypatch, {"sdpa", "triton", "fa3", "fa4"})
    choice = resolve_attention("auto", device="cuda", dtype=torch.bfloat16, head_dim=80)
    assert choice.for_batch([4096], 16).choice.full.name == "fa4"
    assert choice.for_batch([512], 16).choice.full.name == "triton"
    assert choice.for_batch([256] * 8, 16).choice.full.name == "triton"
    assert choice.for_batch([256] * 9, 16).choice.full.name == "fa3"
    pretend_hopper(monkeypatch, {"sdpa", "triton", "fa3", "fa4", "short"})
    choice = resolve_attention("auto", device="cuda", dtype=torch.bfloat16, head_dim=80)
    assert choice.for_batch([60, 4], 16).choice.full.name == "short"
    assert choice.for_batch([64, 4], 16).choice.full.name == "triton"
    assert repr(choice.full) == "auto(short up to 64, fa4 from 768, triton up to 2048, fa3)"
    assert choice.full.capturable
    single = resolve_attention("auto", device="cuda", dtype=torch.float32, head_dim=80)
    assert single.full.name == single.window.name == "sdpa"


def test_windows_larger_than_a_kernel_takes_go_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Towers of other window sizes than the released ones still run."""
    ask = partial(resolve_attention, device="cuda", dtype=torch.bfloat16, head_dim=80)
    pretend_hopper(monkeypatch, {"sdpa", "triton", "fa3", "fa4"})
    monkeypatch.setattr("vitrt.attention.probe.not_triton", lambda device: None)
    assert ask("auto", window_patches=64).window.name == "window"
    assert ask("auto", window_patches=196).window.name == "fa3"
    assert ask("auto", window_patches=800).window.name == "fa4"
    pretend_hopper(monkeypatch, {"sdpa", "triton"}, most_window={"triton": 128})
    assert ask("auto", window_patches=128).window.name == "triton"
    assert ask("auto", window_patches=196).window.name == "sdpa"
    assert ask("triton", window_patches=128).window.name == "triton"
    with pytest.raises(ValueError, match=r"'triton' takes windows of at most 128 .* up to 196"):
        ask("triton", window_patches=196)


def test_auto_falls_back_and_a_named_backend_does_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_hopper(monkeypatch, {"sdpa", "triton", "fa3"}, broken="fa3")
    choice = resolve_attention("auto", device="cuda", dtype=torch.bfloat16, head_dim=72)
    assert choice.full.name == "triton"
    assert "'fa3' is installed but does not load: undefined symbol" in caplog.text
    with pytest.raises(ValueError, match="'fa3' is installed but does not load"):
        resolve_attention("fa3", device="cuda", dtype=torch.bfloat16, head_dim=72)


def test_auto_selects_by_segments() -> None:
    few, long, rest = (Fake(name) for name in ("few", "long", "rest"))
    rest.capturable = False
    rules = (Rule("few", most=64), Rule("long", from_longest=2048), Rule("rest"))
    auto = AutoBackend(list(zip(rules, (few, long, rest), strict=True)))
    assert auto.select([64]) is auto.select([60, 4]) is few
    assert auto.select([2048]) is auto.select([1, 2048, 1]) is long
    assert auto.select([2047] * 9) is auto.select([64, 1]) is rest
    assert auto.capturable is False
    assert repr(auto) == "auto(few up to 64, long from 2048, rest)"


def test_auto_rotates_for_backends_that_do_not() -> None:
    """Asked for attention by itself, as a layer asks any backend."""
    tokens = 24
    rotary = make_rotary(tokens, 16)
    rotating = Fake("rotating")
    rotating.applies_rotary = True
    auto = AutoBackend([(Rule("rotating", most=8), rotating), (Rule("rest"), Fake("rest"))])
    assert auto.applies_rotary
    qkv = torch.randn(tokens, 3, 2, 16)
    expected = dense_reference(rotated(qkv, rotary), [20, 4])
    got = auto(qkv.clone(), make_segments([20, 4]), rotary)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    plain = dense_reference(qkv[:8], [8])
    got = auto(qkv[:8].clone(), make_segments([8]), rotary)
    torch.testing.assert_close(got.double(), plain, rtol=1e-5, atol=1e-5)


GPU_MIXES = [[64, 48, 16, 4], [1296, 1296], [3080], [5, 300, 1, 127, 129, 2100]]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "triton", "fa2", "fa3", "fa4", "short"])
@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
@pytest.mark.parametrize("lengths", GPU_MIXES, ids=str)
def test_backend_on_gpu(name: str, head_dim: int, lengths: list[int]) -> None:
    reason = dict(usable("cuda", torch.bfloat16, head_dim))[name]
    if reason is not None:
        pytest.skip(reason)
    backend = get_backend(name, device="cuda", dtype=torch.bfloat16, head_dim=head_dim)
    torch.manual_seed(head_dim)
    tokens, padding, heads = sum(lengths), 40, 3
    qkv = torch.randn(tokens + padding, 3, heads, head_dim, device="cuda").bfloat16()
    qkv[tokens:] = 0  # rope_ zeroes padding rows for the kernels that read past a segment's end
    segments = make_segments(lengths, room=5, device="cuda")
    out = torch.full((tokens + padding, heads * head_dim), math.nan, device="cuda").bfloat16()
    rotary = no_rotary(tokens, head_dim, "cuda")
    assert backend(qkv, segments, rotary, out) is out
    expected = dense_reference(qkv, lengths)
    error = (out[:tokens].double().cpu() - expected).norm() / expected.norm()
    # The output is rounded to bf16 once (2^-9 relative at most, 2^-9 / sqrt(3) rms) and so are the
    # probabilities.
    assert error < 2**-9 * math.sqrt(2)
    assert torch.equal(backend(qkv, segments, rotary)[:tokens], out[:tokens])
    if name in ("triton", "short"):
        assert out[tokens:].isnan().all()


@pytest.mark.gpu
def test_auto_on_gpu_uses_the_window_kernel() -> None:
    choice = resolve_attention("auto", device="cuda", dtype=torch.bfloat16, head_dim=80)
    assert choice.window.name == "window"
    assert choice.window.applies_rotary
    assert choice.full.capturable
    assert choice.for_batch([16], 16).choice.full.name == "short"
    assert not choice.for_batch([4096], 16).choice.full.applies_rotary
