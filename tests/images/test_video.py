"""Video files: the frames that are taken and their pixels, against transformers; what is broken."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from tests.support.video_reference import run_video_processors
from tests.support.videos import hold_at_most, read_all, write_video
from vitrt.config import RuntimeConfig
from vitrt.images.config import PreprocessorConfig, VideoConfig
from vitrt.images.cores import Cores
from vitrt.images.inputs import ImageError
from vitrt.images.levels import normalisation_table, patches_reference
from vitrt.images.prepared import LazyImage
from vitrt.images.processor import ImageProcessor
from vitrt.images.sampling import sample_frames
from vitrt.images.video import VideoFile

HALF = (0.5, 0.5, 0.5)
CLIP = VideoConfig("clip", 1024, 4_000_000, HALF, HALF)
FRAME = VideoConfig("frame", 1024, 20_000, HALF, HALF)


def processor(video: VideoConfig = CLIP, **user: Any) -> ImageProcessor:
    patch = 14 if video.rule == "frame" else 16
    config = PreprocessorConfig(1024, 20_000, HALF, HALF, patch, 2, 2, video)
    return ImageProcessor.from_configs(config, RuntimeConfig(**user))


CONTAINERS = [
    (".mp4", "libx264"),
    (".mp4", "mpeg4"),
    (".mkv", "libx264"),
    (".avi", "mpeg4"),
    (".mov", "libx264"),
]


def random_case(rng: np.random.Generator, folder: Path, number: int) -> dict[str, Any]:
    suffix, codec = CONTAINERS[number % len(CONTAINERS)]
    frames = int(
        rng.choice([2, 3, 4, 5, 7, 12, 25, 31, 60, 99, 150, 400], p=[0.08] * 10 + [0.1] * 2)
    )
    rate = [24, 25, 30, 10, 5, 60, Fraction(30000, 1001), 1][rng.integers(8)]
    size = tuple(int(side) for side in 2 * rng.integers(8, 40, 2))
    path = folder / f"{number}{suffix}"
    write_video(path, frames, size, rate=rate, codec=codec, seed=number)
    rule = ["frame", "clip"][rng.integers(2)]
    settings: dict[str, Any] = {
        "patch_size": 14 if rule == "frame" else 16,
        "size": {"shortest_edge": 1024, "longest_edge": int(rng.integers(20_000, 2_000_000))},
        "fps": float(rng.choice([0.5, 1, 2, 2, 3.7, 8])),
    }
    kind = rng.integers(4)
    if kind == 0:
        settings |= {"fps": None, "num_frames": int(rng.integers(2, frames + 1))}
    elif kind == 1:
        settings |= {"min_frames": int(rng.integers(2, 9)), "max_frames": int(rng.integers(9, 30))}
    return {"rule": rule, "settings": settings, "path": str(path), "frames": frames}


def test_100_files_equal_transformers(tmp_path: Path) -> None:
    """Sampling, size and pixels, decoded through the same library."""
    rng = np.random.default_rng(1)
    cases = [random_case(rng, tmp_path, number) for number in range(100)]
    # Matroska does not count its frames; transformers' reader takes the header's word.
    counted = [case for case in cases if not case["path"].endswith(".mkv")]
    references = run_video_processors(counted, [], tmp_path)
    for case, theirs in zip(counted, references, strict=True):
        ours = processor(VideoConfig.from_dict(case["settings"], case["rule"]))
        prepared = ours.prepare(case["path"])
        assert list(prepared.grid_thw) == theirs["grid"] == list(ours.grid_of(case["path"])), case
        table = normalisation_table(ours.video.image_mean, ours.video.image_std, "torch")
        values = patches_reference(prepared, table, ours.patch_size, 2, 2)
        np.testing.assert_array_equal(values, theirs["values"], err_msg=str(case))
        rate = case_rate(case["path"])
        indices = theirs["indices"] + theirs["indices"][-1:] * (len(theirs["indices"]) % 2)
        middles = [(a + b) / 2 / rate for a, b in zip(indices[::2], indices[1::2], strict=True)]
        assert prepared.times == pytest.approx(middles, abs=2e-3), case
    for case in cases:
        if case not in counted:
            assert len(VideoFile(case["path"], "").times) == case["frames"]


def case_rate(path: str) -> float:
    with av.open(path) as container:
        return float(container.streams.video[0].average_rate)


def test_sampling_of_every_length_equals_transformers(tmp_path: Path) -> None:
    """2 to 400 frames, and a few longer ones, by both rules."""
    cases = []
    for rule in ("frame", "clip"):
        for total in [*range(2, 401), 2999, 90_000]:
            for rate, more in (
                (29.97, {"fps": 2.0}),
                (7.5, {"fps": 3.3, "max_frames": 50}),
                (24.0, {"fps": None, "num_frames": min(total // 2 * 2, 8)}),
            ):
                cases.append({"rule": rule, "settings": more, "total": total, "rate": rate})
    theirs = run_video_processors(cases, [], tmp_path)
    for case, reference in zip(cases, theirs, strict=True):
        video = VideoConfig.from_dict(case["settings"], case["rule"])
        ours = sample_frames(video, case["total"], case["rate"], 2)
        # Rounding gives theirs one frame too many at times, behind the last.
        assert ours == [i for i in reference["indices"] if i < case["total"]][: len(ours)], case
        assert len(reference["indices"]) - len(ours) in (0, 1)


def test_odd_sampling() -> None:
    assert sample_frames(CLIP, 1, 25, 2) == [0]
    assert sample_frames(replace(CLIP, fps=None), 1000, None, 2)[-1] == 999
    with pytest.raises(ValueError, match="num_frames 9, rounded to 8, of a video of 5 frames"):
        sample_frames(replace(FRAME, fps=None, num_frames=9), 5, 25, 2)


def test_a_video_as_path_url_bytes_and_open_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip ü.mp4", 20)
    expected = processor().prepare(path)
    assert expected.grid_thw[0] == 2 and expected.shape[0] == 4
    for same in (str(path), path.as_uri(), path.read_bytes(), path.open("rb")):
        prepared = processor().prepare(same)
        np.testing.assert_array_equal(prepared.pixels, expected.pixels)
        assert prepared.times == expected.times
    row = {"bytes": path.read_bytes(), "path": "clip.mp4"}
    np.testing.assert_array_equal(processor().prepare(row).pixels, expected.pixels)


def test_what_the_user_chooses(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 100, rate=25)
    frames = {"fps": 5.0}, {"num_frames": 12}, {"max_frames": 6}, {"min_frames": 30}
    assert [processor(**user).grid_of(path)[0] for user in frames] == [10, 6, 3, 15]
    assert processor(FRAME, num_frames=7).grid_of(path)[0] == 4
    with pytest.raises(ImageError, match="a.mp4: num_frames 999"):
        processor(FRAME, num_frames=999).prepare(path)
    for wrong, said in (
        ({"fps": 0}, "fps must be a finite number above 0"),
        ({"fps": 2, "num_frames": 4}, "exclude each other"),
        ({"min_frames": 9, "max_frames": 8}, "min_frames 9 is larger than max_frames 8"),
        ({"frames": "some"}, "frames must be one of first, all, got 'some'"),
    ):
        with pytest.raises(ValueError, match=said):
            RuntimeConfig(**wrong)


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotation(tmp_path: Path, rotation: int) -> None:
    lying = write_video(tmp_path / "turned.mp4", 4, (64, 96), rotation=rotation)
    ours = processor(replace(CLIP, fps=None))
    prepared = ours.prepare(lying)
    frames = np.rot90(read_all(lying), rotation // 90, axes=(1, 2))
    np.testing.assert_array_equal(
        prepared.pixels, ours.prepare(np.ascontiguousarray(frames)).pixels
    )
    assert prepared.grid_thw == ours.grid_of(lying)


def test_a_variable_frame_rate_keeps_its_times(tmp_path: Path) -> None:
    stamps = [0, 40, 80, 1000, 2000, 2040, 2080, 5000]
    path = write_video(tmp_path / "v.mkv", 8, codec="libx264", stamps=stamps)
    prepared = processor(replace(CLIP, fps=None)).prepare(path)
    assert prepared.times == pytest.approx([0.02, 0.54, 2.02, 3.54], abs=2e-3)


def test_a_container_without_counts_and_durations(tmp_path: Path) -> None:
    for name, codec in (("a.ts", "libx264"), ("a.webm", "libvpx-vp9"), ("a.mkv", "mpeg4")):
        path = write_video(tmp_path / name, 30, codec=codec)
        with av.open(str(path)) as container:
            assert container.streams.video[0].frames == 0
        prepared = processor().prepare(path)
        frames = read_all(path)
        assert len(frames) == 30
        clip = processor().prepare(frames[sample_frames(CLIP, 30, 25, 2)])
        np.testing.assert_array_equal(prepared.pixels, clip.pixels)


def refused(image: Any, said: str, **user: Any) -> None:
    with pytest.raises(ImageError, match=said) as caught:
        processor(**user).prepare(image).pixels  # noqa: B018
    assert len(str(caught.value)) < 400


def test_broken_videos_are_named(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", 60, codec="libx264").read_bytes()
    path = tmp_path / "broken.mp4"
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, f"{path}: not an image, and cannot be read as a video: ")
    refused(whole[:200], "bytes object of length 200: not an image, and cannot be")
    # The index at the front, so that the tail alone is missing.
    with av.open(str(tmp_path / "whole.mp4")) as source:
        options = {"movflags": "faststart"}
        with av.open(str(tmp_path / "front.mp4"), "w", options=options) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)
    front = (tmp_path / "front.mp4").read_bytes()
    path.write_bytes(front[: len(front) * 2 // 3])
    refused(
        path,
        "broken.mp4: not an image.* a video: truncated: its header counts 60",
    )
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    refused(
        tmp_path / "sound.mp4",
        "sound.mp4: not an image.*: it has no video stream",
    )
    (tmp_path / "text.mp4").write_bytes(b"no video at all")
    refused(tmp_path / "text.mp4", "not an image in a format that Pillow can read")


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    refused(path, r"a video is read through PyAV: pip install 'vitrt\[video\]'")


def test_a_long_video_is_decoded_run_by_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "long.mp4", 61, codec="libx264")
    ours = processor(replace(CLIP, fps=None))
    whole = ours.prepare(path)
    assert whole.shape[0] == 62 and not whole.is_lazy
    run = 5 * 2 * 3 * 64 * 96
    hold_at_most(2 * run, monkeypatch)
    lazy = ours.prepare(path)
    assert isinstance(lazy, LazyImage)
    assert lazy.nbytes - lazy.source.nbytes == run  # the first of them, and an open decoder
    assert lazy.source.nbytes >= 64 * 96 * 3 / 2 * 9
    assert (lazy.grid_thw, lazy.shape, lazy.times) == (whole.grid_thw, whole.shape, whole.times)
    opened = []
    decode = lazy.source._decode
    monkeypatch.setattr(lazy.source, "_decode", lambda start: (opened.append(1), decode(start))[1])
    runs = list(lazy.runs())
    assert [each.grid_thw[0] for each in runs] == [5] * 6 + [1] and not opened
    np.testing.assert_array_equal(np.concatenate([each.pixels for each in runs]), whole.pixels)
    assert lazy.nbytes == 0
    pieces = lazy.split(10**9)
    assert [piece.grid_thw[0] for piece in pieces] == [5] * 6 + [1]
    np.testing.assert_array_equal(np.concatenate([p.pixels for p in pieces]), whole.pixels)
    assert sum((piece.times for piece in pieces), ()) == whole.times
    assert len(opened) == 1  # once for all
    assert lazy.source._frames is None  # and its decoder is let go of
    np.testing.assert_array_equal(pieces[2].pixels, whole.pixels[20:30])  # what came before: again
    small = lazy.split(whole.num_patches // 31)
    assert [piece.grid_thw[0] for piece in small] == [1] * 31
    span = ours.prepare(path, span=(3, 9))
    np.testing.assert_array_equal(span.pixels, whole.pixels[6:18])
    assert span.times == whole.times[3:9]


@pytest.mark.parametrize(
    ("name", "codec", "rotation"),
    [
        ("a.mp4", "libx264", 0),  # whose frames are stored in another order
        ("b.mkv", "libx264", 0),
        ("c.ts", "libx264", 0),
        ("d.mp4", "mpeg4", 90),
        ("e.webm", "libvpx-vp9", 0),
        ("f.avi", "mpeg4", 0),
    ],
)
def test_a_frame_amid_a_video_is_decoded_from_the_key_before_it(
    name: str, codec: str, rotation: int, tmp_path: Path
) -> None:
    path = write_video(tmp_path / name, 61, codec=codec, gop=10, rotation=rotation)
    whole: dict[int, np.ndarray] = {}
    VideoFile(str(path), name).read(range(61), lambda _, f: whole.update({len(whole): f}))
    video = VideoFile(str(path), name)
    decode, decoded = video._decode, []

    def counted(start: int = 0) -> Iterator[Any]:
        for frame in decode(start):
            decoded.append(frame)
            yield frame

    video._decode = counted  # type: ignore[method-assign]
    for index in (60, 37, 38, 20, 19, 3):
        found = []
        video.read([index], lambda _, frame, found=found: found.append(frame))
        np.testing.assert_array_equal(found[0], whole[index])
    if name != "f.avi":  # whose frames have no stamps of their own
        assert len(video._keys) >= 5 and len(decoded) <= 6 * 10


@pytest.mark.parametrize("name", ["a.mp4", "b.mkv", "c.ts", "d.webm", "e.avi"])
def test_what_nobody_wants_nor_refers_to_is_not_decoded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = {"d.webm": "libvpx-vp9", "e.avi": "mpeg4"}.get(name, "libx264")
    path = write_video(tmp_path / name, 121, codec=codec)
    whole, decoded = read_all(path), []
    decode = VideoFile._decode

    def counted(self: VideoFile, start: int = 0) -> Iterator[Any]:
        for frame in decode(self, start):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(VideoFile, "_decode", counted)
    for wanted in ([0, 15, 16, 40, 41, 42, 99, 120], [7, 8, 8], [118]):
        decoded.clear()
        video, found = VideoFile(str(path), name), []
        video.wanted = wanted
        for start in range(0, len(wanted), 3):
            video.read(wanted[start : start + 3], lambda _, frame, to=found: to.append(frame))
        np.testing.assert_array_equal(found, [whole[index] for index in wanted])
        assert video._frames is None and len(decoded) <= wanted[-1] + 1
        if codec == "libx264" and wanted[-1] > 100:
            assert len(decoded) < 0.8 * wanted[-1]


def test_a_wanted_frame_that_is_left_out_is_decoded_all_the_same(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 61, codec="libx264")
    video, whole, found = VideoFile(str(path), "a"), read_all(path), []
    video.wanted = [3, 30, 60]
    decode, lost = video._decode, []

    def loses_one(start: int = 0) -> Iterator[Any]:
        for frame in decode(start):
            if frame.pts == video._stamps[30] and not lost:
                lost.append(frame)
            else:
                yield frame

    video._decode = loses_one  # type: ignore[method-assign]
    video.read(video.wanted, lambda _, frame: found.append(frame))
    assert lost and not video._skips
    np.testing.assert_array_equal(found, [whole[index] for index in (3, 30, 60)])


def test_a_file_that_ends_early_is_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every frame is decoded, another try would find no more of them."""
    path = write_video(tmp_path / "a.avi", 12)
    video, starts = VideoFile(str(path), "a"), []
    decode = video._decode

    def cut(start: int = 0) -> Iterator[Any]:
        starts.append(start)
        yield from islice(decode(start), 8)

    monkeypatch.setattr(video, "_decode", cut)
    video._stamps, video._keys = [], [0]  # as of a file that does not stamp every frame
    video.wanted = [2, 11]
    with pytest.raises(ImageError, match="it ends before frame 11 of 12"):
        video.read(video.wanted, lambda _, frame: None)
    assert starts == [0]


def test_clips_that_are_decoded_at_once_share_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr("vitrt.images.video.CORES", Cores())
    path = write_video(tmp_path / "a.mp4", 30, codec="libx264")
    videos = [VideoFile(str(path), "a") for _ in range(5)]
    for video in videos:
        video.read([0], lambda _, frame: None)
    assert [video._threads for video in videos] == [16, 12, 8, 6, 5]
    for video in videos:
        video._close()
    videos[0].read([0], lambda _, frame: None)
    assert videos[0]._threads == 16


def test_stamps_that_a_decoder_does_not_give_are_not_trusted(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 61, codec="libx264", gop=10)
    video, whole = VideoFile(str(path), "a"), read_all(path)
    video._stamps = [stamp + 1 for stamp in video._stamps]
    found: list[np.ndarray] = []
    video.read([45, 46], lambda _, frame: found.append(frame))
    np.testing.assert_array_equal(found, whole[45:47])


def test_a_video_of_one_frame_is_an_image(tmp_path: Path) -> None:
    path = write_video(tmp_path / "one.mp4", 1)
    prepared = processor().prepare(path)
    image = processor().prepare(read_all(path)[0])
    assert prepared.grid_thw == image.grid_thw and prepared.times is None
    np.testing.assert_array_equal(prepared.pixels, image.pixels)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_animations(file_format: str) -> None:
    rng = np.random.default_rng(0)
    frames = [
        Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)).resize((96, 64)).quantize(64)
        for _ in range(5)
    ]
    rgb = [frame.convert("RGB") for frame in frames]
    buffer = io.BytesIO()
    first, *rest = frames if file_format == "GIF" else rgb
    options = {"lossless": True} if file_format == "WEBP" else {}
    first.save(buffer, file_format, save_all=True, append_images=rest, duration=200, **options)
    content = buffer.getvalue()
    alone = processor().prepare(content)
    assert alone.grid_thw[0] == 1 and alone.times is None
    ours = processor(frames="all")
    for same in (content, Image.open(io.BytesIO(content))):
        clip = ours.prepare(same)
        assert clip.grid_thw == ours.grid_of(same)
        assert clip.times == pytest.approx((0.1, 0.5, 0.8))
        expected = ours.prepare(np.stack([np.asarray(frame) for frame in rgb]))
        np.testing.assert_array_equal(clip.pixels, expected.pixels)
    still = ours.prepare(rgb[0])
    assert still.grid_thw == alone.grid_thw
    refused(content[: len(content) // 2], "cannot be read as an image", frames="all")
