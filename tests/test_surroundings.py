"""What the caller has set for torch must neither break an encoder nor change its features."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.threads import Arrivals, in_threads
from vitrt import VisionEncoder
from vitrt.engine.eager_runner import EagerRunner

FAMILIES = ("qwen2_5_vl", "qwen3_vl")


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}")


def photos(count: int = 3) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (64, 96 + 32 * i, 3), dtype=np.uint8) for i in range(count)]


def all_features(encoder: VisionEncoder) -> torch.Tensor:
    return torch.cat([features.embeddings for features in encoder.encode(photos())])


@pytest.fixture
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_a_default_device_is_not_taken(folder: Path, default_device: None):
    """Serving engines set one; what belongs on the host stays there."""
    encoder = VisionEncoder.from_pretrained(folder, device="cpu")
    got = all_features(encoder)
    streamed = list(encoder.stream(photos()))
    config = encoder.config
    values = torch.zeros(4, config.patch_dim, device="cpu")
    output = encoder(values, [(1, 2, 2)], return_hidden=True)
    torch.set_default_device(None)
    want = all_features(VisionEncoder.from_pretrained(folder, device="cpu"))
    assert torch.equal(got, want)
    assert len(streamed) == 3 and output.grid_thw.tolist() == [[1, 2, 2]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_left_outside(folder: Path, dtype: torch.dtype):
    encoder = VisionEncoder.from_pretrained(folder, device="cpu")
    want = all_features(encoder)
    with torch.autocast("cpu", dtype):
        assert torch.equal(all_features(encoder), want)
        half = VisionEncoder.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
        assert half.encode(photos())[0].embeddings.dtype == torch.bfloat16


def test_a_default_dtype_changes_nothing(folder: Path):
    want = all_features(VisionEncoder.from_pretrained(folder, device="cpu"))
    torch.set_default_dtype(torch.float64)
    try:
        got = all_features(VisionEncoder.from_pretrained(folder, device="cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)


def test_forwards_of_several_threads_take_turns(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The first one in waits until all the others have come, and then leaves them time to enter."""
    encoder = VisionEncoder.from_pretrained(folder, device="cpu")
    waiting, all_came = Arrivals(4), []
    running, most = 0, 0
    run, whole = EagerRunner.run, EagerRunner.forward

    def arrive(self, *args, **kwargs):
        waiting.arrive()
        return run(self, *args, **kwargs)

    def forward(self, *args, **kwargs):
        nonlocal running, most
        running += 1
        most = max(most, running)
        all_came.append(waiting.all_came.wait(30))
        time.sleep(0.01)
        try:
            return whole(self, *args, **kwargs)
        finally:
            running -= 1

    monkeypatch.setattr(EagerRunner, "run", arrive)
    monkeypatch.setattr(EagerRunner, "forward", forward)
    in_threads(4, lambda: all_features(encoder))
    assert all(all_came) and len(all_came) >= 4
    assert most == 1


def test_features_travel_without_their_batch(folder: Path):
    encoder = VisionEncoder.from_pretrained(folder, device="cpu")
    features = encoder.encode([photos(1)[0]] * 16, layers=[-1])[3]
    alone = sum(
        tensor.nbytes
        for tensor in (features.embeddings, features.deepstack, features.hidden)
        if tensor is not None
    )
    packed = pickle.dumps(features)
    assert len(packed) < alone + 4096
    for other in (pickle.loads(packed), copy.deepcopy(features), features.clone()):
        for tensor in (other.embeddings, other.deepstack, other.hidden):
            assert tensor is None or tensor.untyped_storage().nbytes() == tensor.nbytes
        assert torch.equal(other.embeddings, features.embeddings)
        assert torch.equal(other.hidden, features.hidden)
        assert (other.grid_thw, other.layers) == (features.grid_thw, features.layers)
    assert features in [None, features]  # compared by identity, not by tensors
    for method in (VisionEncoder.encode, VisionEncoder.stream):
        assert "clone()" in str(method.__doc__)


def test_an_image_alone_holds_nothing_else(folder: Path):
    """Nor do hidden states, which are copied on their way to raster order anyway."""
    encoder = VisionEncoder.from_pretrained(folder, device="cpu")
    for images in (photos(1), photos(1) * 4):
        features = encoder.encode(images, layers=[0, -1])[-1]
        for name, tensor in features.tensors().items():
            if len(images) == 1 or name == "hidden":
                assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_max_batch_tokens_are_patches(folder: Path):
    """The public name says tokens, and where it is documented, what it counts."""
    assert "max_batch_tokens: patches per forward" in str(VisionEncoder.from_pretrained.__doc__)
    assert "patches of one forward" in str(VisionEncoder.max_batch_tokens.__doc__)
    encoder = VisionEncoder.from_pretrained(folder, device="cpu", max_batch_tokens=64)
    assert encoder.max_batch_tokens == encoder.engine.max_batch_patches == 64
    sizes: list[int] = []
    plan = encoder.tower.plan
    encoder.tower.plan = lambda grids: sizes.append(plan(grids).num_patches) or plan(grids)
    encoder.encode(photos(1) * 3)
    assert max(sizes) <= 64 < sum(sizes)


@pytest.mark.parametrize("call", ["encode", "stream"])
def test_one_image_is_not_a_list_of_images(folder: Path, call: str, tmp_path: Path):
    encoder = VisionEncoder.from_pretrained(folder, device="cpu")
    image = Image.fromarray(photos(1)[0])
    image.save(tmp_path / "x.png")
    file = tmp_path / "x.png"
    for one in (photos(1)[0], image, file, str(file), file.read_bytes()):
        with pytest.raises(ValueError, match=r"images is one image.*give a list"):
            list(getattr(encoder, call)(one))
    stack = np.stack([photos(1)[0]] * 2)
    with pytest.raises(ValueError, match=r"\[array\] if it is a clip, list\(array\) if it is 2"):
        list(getattr(encoder, call)(stack))
    several = [
        list(stack),
        np.array([str(file)] * 2),
        np.array([file, image], "O"),
    ]
    for images in (*several, (file, image), iter([file, image])):
        assert len(list(getattr(encoder, call)(images))) == 2
    (clip,) = getattr(encoder, call)([stack])
    assert clip.grid_thw[0] == 1  # two frames make one temporal patch


def test_odd_grids_and_values_are_named(folder: Path):
    encoder = VisionEncoder.from_pretrained(folder, device="cpu")
    values = torch.zeros(16, encoder.config.patch_dim)
    for grid in ([1, 4, 4], [[1, 4.9, 4.2]], [[True, 4, 4]], [[1, 4]], torch.tensor([1, 4, 4])):
        with pytest.raises(ValueError, match="rows of three integers"):
            encoder(values, grid)
    with pytest.raises(ValueError, match=r"ndarray.*must be a tensor"):
        encoder(values.numpy(), [(1, 4, 4)])
    huge = torch.tensor([[1, 2**20, 2**20]])  # a plan of so many patches would fill the memory
    with pytest.raises(ValueError, match=rf"shape \(16, .*grid_thw holds {2**40} patches"):
        encoder(values, huge)


def test_a_clip_over_the_budget_goes_in_several_forwards(folder: Path):
    clip = np.random.default_rng(1).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    encoder = VisionEncoder.from_pretrained(folder, device="cpu")
    small = VisionEncoder.from_pretrained(folder, device="cpu", max_batch_tokens=40)
    for ask in ({}, {"layers": [0, -1]}):
        (want,) = encoder.encode([clip], **ask)
        sizes: list[int] = []
        plan = small.tower.plan

        def spy(grids, sizes=sizes, plan=plan):
            sizes.append(plan(grids).num_patches)
            return plan(grids)

        small.tower.plan = spy
        results = [small.encode([clip], **ask), list(small.stream([clip], **ask))]
        small.tower.plan = plan
        frame = want.grid_thw[1] * want.grid_thw[2]
        assert max(sizes) == max(40 // frame, 1) * frame
        for (got,) in results:
            assert got.grid_thw == want.grid_thw and got.layers == want.layers
            torch.testing.assert_close(got.embeddings, want.embeddings, rtol=1e-4, atol=1e-4)
            if want.deepstack is not None:
                torch.testing.assert_close(got.deepstack, want.deepstack, rtol=1e-4, atol=1e-4)
            if ask:
                torch.testing.assert_close(got.hidden, want.hidden, rtol=1e-4, atol=1e-4)
