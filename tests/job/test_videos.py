"""`vitrt encode` of a folder with videos among its images."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support.ranks import run_ranks
from tests.support.videos import write_video
from vitrt import FeatureStore, VisionEncoder
from vitrt.cli import main
from vitrt.sources import folder as folder_file


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    write_video(folder / "sub" / "clip.mp4", 50, rate=25)
    write_video(folder / "odd.MKV", 7, rate=2)
    Image.new("RGB", (90, 60), "red").save(folder / "still.png")
    return folder


def command(model: Path, inputs: Path, output: Path) -> list[str]:
    folders = [str(model), str(inputs), "--output", str(output)]
    return ["-m", "vitrt", "encode", *folders, "--device", "cpu"]


def encode(model: Path, inputs: Path, output: Path, *more: str) -> int:
    return main([*command(model, inputs, output)[2:], *more])


def test_a_folder_of_images_and_videos(tiny_qwen3_vl: Path, inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert encode(tiny_qwen3_vl, inputs, output) == 0
    store = FeatureStore(output)
    assert sorted(store) == ["odd.MKV", "still.png", "sub/clip.mp4"]
    encoder = VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cpu")
    for name in store:
        (expected,) = encoder.encode([inputs / name])
        stored = store[name]
        assert stored.grid_thw == expected.grid_thw
        assert stored.times == pytest.approx(expected.times) if expected.times else not stored.times
        torch.testing.assert_close(stored.embeddings, expected.embeddings, rtol=1e-4, atol=1e-5)
    lines = [json.loads(line) for line in (output / "manifest-00000.jsonl").open()]
    times = {line["id"]: line.get("times") for line in lines}
    assert times["still.png"] is None
    assert times["odd.MKV"] == [0.25, 1.25, 2.25, 3.0]  # the last frame stands twice
    assert len(times["sub/clip.mp4"]) == store["sub/clip.mp4"].grid_thw[0] == 2
    assert main(["check", str(output)]) == 0
    before = (output / "manifest-00000.jsonl").read_bytes()
    assert encode(tiny_qwen3_vl, inputs, output) == 0  # nothing is left to do
    assert (output / "manifest-00000.jsonl").read_bytes() == before


def test_other_frames_are_another_run(
    tiny_qwen3_vl: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert encode(tiny_qwen3_vl, inputs, output, "--fps", "5", "--max-frames", "8") == 0
    assert FeatureStore(output)["sub/clip.mp4"].grid_thw[0] == 4
    for other, said in (
        (["--fps", "2"], "video is fps=5.0, max_frames=8 there and fps=2.0, max_frames=768 now. "),
        (
            ["--num-frames", "8", "--max-frames", "8"],
            "video is fps=5.0, num_frames=None there and ",
        ),
        (["--fps", "5", "--max-frames", "8", "--frames", "all"], "video is first of animations "),
    ):
        assert encode(tiny_qwen3_vl, inputs, output, *other) == 1
        assert said in capsys.readouterr().err
    assert encode(tiny_qwen3_vl, inputs, output, "--video-max-pixels", "40000") == 1
    assert encode(tiny_qwen3_vl, inputs, tmp_path / "x", "--fps", "2", "--num-frames", "8") == 1
    assert "exclude each other" in capsys.readouterr().err


def test_a_pooled_video_keeps_its_times(tiny_qwen3_vl: Path, inputs: Path, tmp_path: Path) -> None:
    assert encode(tiny_qwen3_vl, inputs, tmp_path / "out", "--pool", "mean") == 0
    assert FeatureStore(tmp_path / "out")["odd.MKV"].times == (0.25, 1.25, 2.25, 3.0)


def test_ranks_share_one_long_clip(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_video(folder / "long.mp4", 96, (96, 128), codec="libx264")
    Image.new("RGB", (90, 60), "red").save(folder / "still.png")
    limits = ["--fps", "25"]
    for bound in ("--video-min-pixels", "--video-max-pixels"):
        limits += [bound, str(96 * 192 * 192)]  # 11 MB
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from vitrt.cli import main\n"
        "from vitrt.images import prepared, processor\n"
        "processor.MAX_WHOLE_BYTES = 10 << 20\n"  # that a worker decodes whole
        "prepared.MAX_HELD_BYTES = processor.MAX_HELD_BYTES = 4 << 20\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = command(tiny_qwen3_vl, folder, tmp_path / "two")[2:]
    code, said = run_ranks(2, str(program), *arguments, *limits, "-v")
    assert code == 0, said
    assert "of long.mp4 for another rank" in said
    assert encode(tiny_qwen3_vl, folder, tmp_path / "one", *limits) == 0
    one, two = FeatureStore(tmp_path / "one"), FeatureStore(tmp_path / "two")
    assert sorted(two) == sorted(one) == ["long.mp4", "still.png"]
    lines = [line for path in (tmp_path / "two").glob("manifest-*") for line in path.open()]
    assert len(lines) == 2  # each once
    for name in one:
        assert two[name].grid_thw == one[name].grid_thw and two[name].times == one[name].times
        torch.testing.assert_close(two[name].embeddings, one[name].embeddings, rtol=1e-4, atol=1e-5)
    assert not list((tmp_path / "two").glob(".part*"))
    assert main(["check", str(tmp_path / "two")]) == 0


def test_without_pyav_videos_are_left_out_and_counted(
    tiny_qwen3_vl: Path,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(folder_file, "find_spec", lambda name: None if name == "av" else find(name))
    folder_file._reads_videos.cache_clear()
    try:
        assert encode(tiny_qwen3_vl, inputs, tmp_path / "out") == 0
    finally:
        folder_file._reads_videos.cache_clear()
    assert list(FeatureStore(tmp_path / "out")) == ["still.png"]
    said = capsys.readouterr().err
    assert "2 files left out by their suffix" in said and "1 .mp4" in said and "1 .mkv" in said
