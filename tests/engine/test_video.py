"""Videos through an encoder: run by run in bounded memory, with their times, beside images."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.videos import hold_at_most, write_video
from vitrt import ImageError, VisionEncoder
from vitrt.images.prepared import LazyImage, PreparedImage

MEMORY = """
import sys
import torch
from vitrt import VisionEncoder

torch.set_num_threads(1)
model, video, frames = sys.argv[1:]
encoder = VisionEncoder.from_pretrained(
    model, device="cpu", fps=1000.0, max_frames=10**6, video_max_pixels=10**9, max_batch_tokens=2048
)
encoder.encode([video], layers=())
features = encoder.encode([video])[0]
assert features.grid_thw[0] == int(frames) // 2, features.grid_thw
# Not getrusage's: its peak begins with that of the process which started this one.
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
print(peak - sum(tensor.nbytes for tensor in features.tensors().values()) // 1024)
"""


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "a.mp4", 61, (96, 128), codec="libx264")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_video_equals_its_frames_as_an_array(
    family: str, video: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(f"tiny_{family}")
    encoder = VisionEncoder.from_pretrained(model, device="cpu")
    prepared = encoder.processor.prepare(video)
    image = np.zeros((64, 64, 3), np.uint8)
    first, clip, last = encoder.encode([image, video, image])
    assert clip.times == prepared.times and len(clip.times) == clip.grid_thw[0]
    assert first.times is None and last.times is None
    (alone,) = encoder.encode_prepared([prepared])
    torch.testing.assert_close(clip.embeddings, alone.embeddings, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first.embeddings, last.embeddings, rtol=1e-5, atol=1e-5)
    assert clip.clone().times == clip.times


def test_a_long_video_run_by_run_equals_one_pass(
    tiny_qwen3_vl: Path, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cpu", fps=25.0)
    (whole,) = encoder.encode([video])
    hold_at_most(40_000, monkeypatch)
    runs = []
    run = encoder.engine.run
    monkeypatch.setattr(encoder.engine, "run", lambda b, r: (runs.append(b.grids), run(b, r))[1])
    (lazy,) = encoder.encode([video])
    assert len(runs) > 3
    assert lazy.grid_thw == whole.grid_thw and lazy.times == whole.times
    torch.testing.assert_close(lazy.embeddings, whole.embeddings, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lazy.deepstack, whole.deepstack, rtol=1e-5, atol=1e-5)
    (pieces,) = encoder.stream([video])
    torch.testing.assert_close(pieces.embeddings, whole.embeddings, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stream", [True, False])
def test_a_long_video_is_decoded_while_the_device_works(
    stream: bool, tiny_qwen3_vl: Path, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run of frames goes through the tower before the next one is decoded."""
    encoder = VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cpu", fps=25.0)
    hold_at_most(80_000, monkeypatch)
    runs = len(encoder.processor.prepare(video).split(10**9))
    decoded = [threading.Event() for _ in range(runs)]
    ready, ran = iter(decoded), iter(range(runs))
    pixels, run = LazyImage.decoded, encoder.engine.run

    def decode(self: LazyImage) -> PreparedImage:
        try:
            return pixels(self)
        finally:
            next(ready).set()

    def wait_and_run(batch: Any, request: Any) -> Any:
        number = next(ran)
        assert number + 1 == runs or decoded[number + 1].wait(20), "nothing was decoded ahead"
        assert not any(event.is_set() for event in decoded[number + 2 :]), "too much was"
        return run(batch, request)

    monkeypatch.setattr(LazyImage, "decoded", decode)
    monkeypatch.setattr(encoder.engine, "run", wait_and_run)
    before = threading.active_count()
    (features,) = encoder.stream([video]) if stream else encoder.encode([video])
    assert runs > 3 and features.grid_thw[0] == 31
    assert threading.active_count() == before


def test_one_broken_video_spoils_nobody_elses(
    tiny_qwen3_vl: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is found only when its frames are asked for."""
    hold_at_most(100_000, monkeypatch)
    broken = write_video(tmp_path / "broken.mkv", 60, (96, 128), codec="mpeg4")
    content = bytearray(broken.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    broken.write_bytes(content)
    encoder = VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cpu", fps=25.0)
    decode = type(encoder.processor.prepare(video).source)._decode

    def ends_early(self, start=0):
        for number, frame in enumerate(decode(self, start), start):
            if number > 30 and self.name.endswith("short.mp4"):
                return
            yield frame

    monkeypatch.setattr(type(encoder.processor.prepare(video).source), "_decode", ends_early)
    short = tmp_path / "short.mp4"
    short.write_bytes(video.read_bytes())
    image = np.zeros((64, 64, 3), np.uint8)
    results = list(encoder.stream([image, short, video, image], on_error="yield"))
    assert isinstance(results[1], ImageError)
    assert "short.mp4: cannot be read as a video: it ends before frame 31 of 61" in str(results[1])
    assert [r.grid_thw[0] for r in results if not isinstance(r, ImageError)] == [1, 31, 1]


def test_memory_does_not_grow_with_the_video(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    """3,000 frames against 300, all of them looked at: their pixels are 90 MB more."""
    used = []
    # What is freed goes back to the system at once, so that the peak is what was held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    for frames in (300, 3000):
        path = write_video(tmp_path / f"{frames}.mp4", frames, (96, 112), codec="mpeg4")
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tiny_qwen3_vl), str(path), str(frames)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        used.append(int(done.stdout))
    assert used[1] < 1.1 * used[0], f"{used[0]} KiB, then {used[1]} KiB"
