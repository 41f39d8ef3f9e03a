"""FlashAttention-4 launched without its package: when, with what, and how it is held to account."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.attention.test_schedule import flash_attn_4, make_schedule, on_device
from tests.support.attention_cases import dense_reference, make_segments, no_rotary
from vitrt.attention import fa4, fa4_kept
from vitrt.attention.fa4_kept import Variant
from vitrt.kernels import kept
from vitrt.kernels.segments import Segments

CPU = torch.device("cpu")


def computed(*arguments: Any) -> None:
    """A stand-in for the kernel that keeps to the arguments that FlashAttention-4 compiled."""
    q, k, v, out, lse, scale, cu_seqlens, _, used, *rest = arguments
    assert lse is None and rest == [None] * 6 + [(None, None), None, None]
    for index, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        rows = slice(start, end if used is None else start + int(used[index]))
        keys = slice(start, end)
        scores = torch.einsum("qhd,khd->hqk", q[rows].float(), k[keys].float()) * scale
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[keys].float()).to(out.dtype)


def halved(*arguments: Any) -> None:
    computed(*arguments)
    arguments[3].mul_(0.5)


@pytest.mark.parametrize("one_tile", [True, False])
@pytest.mark.parametrize("scheduled", [True, False])
def test_it_is_used_if_its_numbers_are_right(
    scheduled: bool, one_tile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = Variant("lazy", torch.bfloat16, 72, scheduled, one_tile)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for function, right in ((computed, True), (halved, False)):
        found = function, {}
        monkeypatch.setattr(kept, "load", lambda family, key, found=found: found)
        assert (fa4_kept.load(variant, CPU) is not None) == right
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(fa4_kept.CapturingError):
        fa4_kept.load(variant, CPU)


class _OnGpu:
    """What of a packed qkv on a GPU says which kernel it takes."""

    is_cuda, dtype = True, torch.bfloat16

    def __init__(self, *shape: int, address: int = 0, dense: bool = True) -> None:
        self.shape, self._address, self._dense = shape, address, dense

    def data_ptr(self) -> int:
        return self._address

    def is_contiguous(self) -> bool:
        return self._dense


def test_what_is_not_sure_goes_through_the_package() -> None:
    qkv = _OnGpu(1300, 3, 2, 72)
    segments = make_segments([1296], room=2)

    def variant_of(qkv: Any, segments: Segments) -> Variant | None:
        return fa4_kept.variant_of(qkv, segments, "lazy", False)

    assert variant_of(qkv, segments) == Variant("lazy", torch.bfloat16, 72, False, False)
    assert variant_of(qkv, make_segments([128, 7], room=2)).one_tile
    assert variant_of(qkv, make_segments([150], room=2)) is None  # one tile, or two
    assert variant_of(qkv, make_segments([1] * 250, room=10)) is None
    assert variant_of(_OnGpu(1300, 3, 2, 72, address=8), segments) is None
    assert variant_of(_OnGpu(1300, 3, 2, 72, dense=False), segments) is None
    assert variant_of(_OnGpu(0, 3, 2, 72), segments) is None
    assert variant_of(torch.zeros(1300, 3, 2, 72), segments) is None


def test_what_was_kept_is_launched_and_the_package_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[dict[str, Any]] = []
    flash_attn_4(monkeypatch, calls)
    monkeypatch.setattr(
        fa4_kept,
        "variant_of",
        lambda qkv, segments, kind, scheduled: Variant(kind, qkv.dtype, 16, scheduled, False),
    )
    loaded: list[Variant] = []

    def load(variant: Variant, device: torch.device) -> fa4_kept.Launch | None:
        loaded.append(variant)
        return None if variant.scheduled else fa4_kept._launch(computed, 16**-0.5)

    monkeypatch.setattr(fa4_kept, "load", load)
    backend = fa4.FlashAttention4(CPU, 16)
    lengths = [1160, 40]
    qkv = torch.randn(1200, 3, 2, 16)
    segments = make_segments(lengths, room=2)
    for _ in range(2):
        actual = backend(qkv, segments, no_rotary(1200, 16))
        torch.testing.assert_close(actual.double(), dense_reference(qkv, lengths), rtol=1e-5,
                                   atol=1e-5)  # fmt: skip
    assert not calls and len(loaded) == 1
    schedule = on_device(make_schedule(lengths, [1152, 40]), room=2)
    for _ in range(2):
        backend(qkv, replace(segments, schedule=schedule), no_rotary(1200, 16))
    assert len(calls) == 2 and len(loaded) == 2


def test_the_kernel_that_a_call_compiled_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    class Cache:
        def __init__(self) -> None:
            self.cache = {"old": object()}
            self.cache_path = tmp_path

        def _key_to_hash(self, key: str) -> str:
            return f"hash of {key}"

    def attend() -> None:
        pass

    attend.compile_cache = Cache()
    kept_now: list[Any] = []
    monkeypatch.setattr(kept, "keep", lambda *args: kept_now.append(args))
    variant = Variant("lazy", torch.bfloat16, 72, True, False)
    before = fa4_kept.keys(attend)
    fa4_kept.keep(variant, attend, before)
    assert not kept_now
    attend.compile_cache.cache["new"] = object()
    fa4_kept.keep(variant, attend, before)
    assert kept_now[0][2]() == (tmp_path / "hash of new.o", {})


@pytest.mark.parametrize("any_kept", [True, False])
def test_the_package_is_imported_at_once_unless_a_kernel_was_kept(
    any_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken one must be found when the backend is made, so that "auto" takes another."""
    flash_attn_4(monkeypatch, [])
    monkeypatch.setattr(fa4, "is_hopper", lambda device: True)
    monkeypatch.setattr(kept, "any_of", lambda family: any_kept)
    imported: list[bool] = []

    def forwards(own: bool, processors: int) -> Any:
        imported.append(own)
        return print, None

    monkeypatch.setattr(fa4, "_forwards", forwards)
    fa4.FlashAttention4(CPU, 72)
    assert bool(imported) != any_kept


def test_persistent_blocks_are_told_by_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without importing anything: whoever kept one could."""
    flash_attn_4(monkeypatch, [])
    monkeypatch.setattr(fa4.metadata, "version", lambda name: "4.0.0b36")
    monkeypatch.setattr(kept, "any_of", lambda family: True)

    def forwards(own: bool, processors: int) -> Any:
        raise AssertionError("imported")

    monkeypatch.setattr(fa4, "_forwards", forwards)
    monkeypatch.setattr(kept, "load", lambda family, key: (computed, {}))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    asked: list[str] = []

    def variant_of(qkv: Any, segments: Segments, kind: str, scheduled: bool) -> Variant:
        asked.append(kind)
        return Variant(kind, torch.bfloat16, qkv.shape[-1], scheduled, False)

    monkeypatch.setattr(fa4_kept, "variant_of", variant_of)
    backend = fa4.FlashAttention4(CPU, 72)
    lengths = [1296] * 6
    schedule = backend.schedule(lengths, 16)
    assert schedule is not None and schedule.key == "persistent"
    segments = replace(make_segments(lengths), schedule=on_device(schedule, room=0))
    qkv = torch.randn(sum(lengths), 3, 1, 72)
    actual = backend(qkv, segments, no_rotary(1, 72))
    torch.testing.assert_close(actual.double(), dense_reference(qkv, lengths), rtol=1e-4, atol=1e-5)
    assert asked == ["persistent-132"]


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
@pytest.mark.parametrize(
    "lengths", [[64, 48, 16, 4], [1296, 1296], [3080], [1296] * 6], ids=lambda n: str(n)[:24]
)
@pytest.mark.parametrize("how", ["plain", "scheduled", "persistent"])
def test_kept_attention_is_the_same_on_gpu(head_dim: int, lengths: list[int], how: str) -> None:
    """It is the same machine code: no bit may differ."""
    device = torch.device("cuda", torch.cuda.current_device())
    reason = fa4._unavailable(device, torch.bfloat16, head_dim)
    if reason is not None or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip(reason or "kept on Hopper alone")
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 3, head_dim, device=device).bfloat16()
    segments = make_segments(lengths, room=5, device="cuda")
    used, persistent = None, how == "persistent"
    if how == "scheduled":
        whole = [max(1, length - length % 192) for length in lengths]
        used = torch.tensor([*whole, *[0] * 5], dtype=torch.int32, device=device)
    backend = fa4.FlashAttention4(device, head_dim)
    if persistent and backend._forwards[1] is None:
        pytest.skip("not with our parts")
    variant = backend._variant(qkv, segments, used, persistent)
    assert variant is not None
    first, second = (torch.zeros(len(qkv), 3, head_dim, device=device).bfloat16() for _ in "ab")
    forward = backend._forward(persistent)
    before = fa4_kept.keys(forward)
    backend._by_package(qkv, segments, used, first, persistent)
    fa4_kept.keep(variant, forward, before)
    launch = fa4_kept.load(variant, device)
    assert launch is not None, "not kept, or it computes something else"
    launch(qkv, second, segments.cu_seqlens, used)
    assert torch.equal(first, second)
