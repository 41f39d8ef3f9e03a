"""The command line: what it writes, prints and returns."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from tests.support.commands import Vitrt, vitrt
from tests.support.folders import photo
from tests.support.shards import write_parquet, write_remote, write_tar
from vitrt import FeatureStore, VisionEncoder
from vitrt.commands import COMMANDS, encode
from vitrt.commands.console import Parser, graceful_interrupts
from vitrt.commands.options import from_args
from vitrt.config import RuntimeConfig
from vitrt.job.options import EncodeOptions
from vitrt.job.progress import Progress
from vitrt.job.progress_display import ProgressDisplay
from vitrt.job.stop import Stop
from vitrt.store.check import check_folder
from vitrt.store.lock import FolderLock

__all__ = ["vitrt"]  # a fixture

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-6  # of batches that hold other images


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six images of several formats and sizes."""
    folder = tmp_path / "photos"
    for index, name in enumerate(
        ("a.png", "b.JPG", "deep/c.webp", "deep/er/d.tif", "e.bmp", "f.gif")
    ):
        photo(folder / "source.png", index, 60 + 31 * index, 150 - 13 * index)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(folder / "source.png").save(folder / name)
    (folder / "source.png").unlink()
    return folder


IDS = ["a.png", "b.JPG", "e.bmp", "f.gif", "deep/c.webp", "deep/er/d.tif"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_encode_writes_what_the_encoder_returns(
    family: str, request: pytest.FixtureRequest, photos: Path, tmp_path: Path, vitrt: Vitrt
) -> None:
    model = request.getfixturevalue(f"tiny_{family}")
    done = vitrt("encode", model, photos, "--output", tmp_path / "out")
    assert done.code == 0, done.err
    assert re.search(r"6 images \(\d+ tokens\) encoded", done.out)
    assert "6/6 images" in done.err
    store = FeatureStore(tmp_path / "out")
    assert list(store) == IDS
    assert check_folder(tmp_path / "out").problems == []
    encoder = VisionEncoder.from_pretrained(model, device="cpu")
    for name, wanted in zip(IDS, encoder.encode([photos / name for name in IDS]), strict=True):
        found = store[name]
        assert found.grid_thw == wanted.grid_thw
        error = (found.embeddings - wanted.embeddings).norm() / wanted.embeddings.norm()
        assert error <= TOLERANCE
        assert (found.deepstack is None) == (wanted.deepstack is None) == (family == "qwen2_5_vl")
        if found.deepstack is not None and wanted.deepstack is not None:
            error = (found.deepstack - wanted.deepstack).norm() / wanted.deepstack.norm()
            assert error <= TOLERANCE


def test_verbose_says_how_forwards_ran(
    tiny_qwen3_vl: Path, photos: Path, tmp_path: Path, vitrt: Vitrt
) -> None:
    for options in ([], ["--layers", "0"]):
        command = ("encode", tiny_qwen3_vl, photos, "--device", "cpu", *options)
        quiet = vitrt(*command, "--output", tmp_path / f"quiet{len(options)}")
        assert quiet.code == 0 and "forwards:" not in quiet.err
        done = vitrt(*command, "--output", tmp_path / f"verbose{len(options)}", "--verbose")
        assert re.search(r"forwards: 0 graph replays, \d+ eager \(graphs are off\)", done.err)


def test_encode_again_does_nothing_and_skipping_is_exit_code_3(
    tiny_qwen3_vl: Path, photos: Path, tmp_path: Path, vitrt: Vitrt
) -> None:
    command = ("encode", tiny_qwen3_vl, photos, "--output", tmp_path / "out")
    assert vitrt(*command).code == 0
    again = vitrt(*command)
    assert again.code == 0 and "6 were there already" in again.out
    (photos / "bad.png").write_text("no image")
    skipped = vitrt(*command)
    assert skipped.code == 3
    assert "1 skipped: see" in skipped.out and "skipped: bad.png: not an image" in skipped.err
    (line,) = (tmp_path / "out/errors-00000.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "bad.png" and "not an image" in json.loads(line)["message"]
    (photos / "bad.png").unlink()
    assert vitrt(*command).code == 0
    assert list(FeatureStore(tmp_path / "out")) == IDS


def test_files_that_are_left_out_are_named(
    tiny_qwen3_vl: Path, photos: Path, tmp_path: Path, vitrt: Vitrt
) -> None:
    for name in ("IMG_1", "x.psd", "y.psd"):
        (photos / name).write_bytes((photos / "a.png").read_bytes())
    command = ("encode", tiny_qwen3_vl, photos, "--output", tmp_path / "out")
    done = vitrt(*command)
    text = "3 files left out by their suffix (2 .psd, 1 with none; --all-files tries them)"
    assert done.code == 0 and text in done.out and text in done.err
    end = json.loads(vitrt(*command, "--log-json").err.splitlines()[-1])
    assert end["left_out"] == {".psd": 2, "": 1}
    done = vitrt(*command, "--all-files")
    assert done.code == 0 and "3 images (" in done.out and "left out" not in done.out + done.err
    assert sorted(FeatureStore(tmp_path / "out")) == sorted([*IDS, "IMG_1", "x.psd", "y.psd"])


def test_a_list_of_contents_is_not_echoed(
    tiny_qwen3_vl: Path, tmp_path: Path, vitrt: Vitrt
) -> None:
    (tmp_path / "list.txt").write_text("data:image/png;base64," + "A" * 100_000 + "\n")
    done = vitrt("encode", tiny_qwen3_vl, f"@{tmp_path}/list.txt", "--output", tmp_path / "out")
    assert done.code == 3 and "(100022 characters): cannot be read" in done.err
    assert len(done.out + done.err) < 3000


def test_all_files_never_tries_those_that_it_writes(
    tiny_qwen3_vl: Path, photos: Path, vitrt: Vitrt
) -> None:
    command = ("encode", tiny_qwen3_vl, photos, "--all-files", "--output")
    done = vitrt(*command, photos / "deep/out")
    assert done.code == 1 and "lies in INPUT" in done.err and not (photos / "deep/out").exists()
    assert vitrt(*command, photos / ".out").code == 0  # hidden, so that no walk meets it
    assert vitrt(*command, photos / ".out").code == 0


def test_inputs_of_every_kind_together(
    tiny_qwen3_vl: Path, photos: Path, tmp_path: Path, vitrt: Vitrt
) -> None:
    images = {name: (photos / name).read_bytes() for name in IDS}
    tar, table = tmp_path / "a.tar", tmp_path / "b.parquet"
    write_tar(images, tar)
    write_parquet(images, table)
    url = write_remote(images, "memory://photos")
    command = ["encode", tiny_qwen3_vl, tar, table, url, "--output", tmp_path / "out"]
    done = vitrt(*command)
    assert done.code == 0 and f"{3 * len(IDS)} images (" in done.out
    store = FeatureStore(tmp_path / "out")
    for name in IDS:
        wanted = store[name].embeddings
        for image_id in (f"a.tar/{name.rpartition('.')[0]}", f"b.parquet/{IDS.index(name)}"):
            error = (store[image_id].embeddings - wanted).norm() / wanted.norm()
            assert error <= TOLERANCE, image_id
    assert vitrt("check", tmp_path / "out").code == 0
    assert f"{3 * len(IDS)} were there already" in vitrt(*command).out
    command[2:5] = [table, "--id-column", "name"]
    assert "6 of them again" in vitrt(*command).out  # of the names at the URL, from elsewhere


def test_changed_files_are_counted(
    tiny_qwen3_vl: Path, photos: Path, tmp_path: Path, vitrt: Vitrt
) -> None:
    command = ("encode", tiny_qwen3_vl, photos, "--output", tmp_path / "out")
    first = vitrt(*command)
    assert first.code == 0 and "had changed" not in first.out
    for name in ("a.png", "e.bmp"):
        os.utime(photos / name, (5, 5))
    photo(photos / "new.png", 9)
    again = vitrt(*command)
    assert again.code == 0
    assert "3 images (" in again.out and "4 were there already" in again.out
    assert "2 of them again, because their files had changed" in again.out
    os.utime(photos / "a.png", (6, 6))
    end = json.loads(vitrt(*command, "--log-json").err.splitlines()[-1])
    assert (end["images"], end["replaced"], end["resumed"]) == (1, 1, 6)


def test_fail_on_error(tiny_qwen3_vl: Path, photos: Path, tmp_path: Path, vitrt: Vitrt) -> None:
    (photos / "bad.png").write_text("no image")
    command = ("encode", tiny_qwen3_vl, photos, "--output", tmp_path / "out")
    failed = vitrt(*command, "--on-error", "fail")
    assert failed.code == 1 and "error: bad.png: not an image" in failed.err
    assert check_folder(tmp_path / "out").problems == []


def test_options_reach_the_run(
    tiny_qwen3_vl: Path, photos: Path, tmp_path: Path, vitrt: Vitrt
) -> None:
    done = vitrt(
        "encode", tiny_qwen3_vl, photos / "a.png", photos / "b.JPG",
        "--output", tmp_path / "out", "--dtype", "bfloat16", "--attention", "sdpa",
        "--device", "cpu",
        "--max-pixels", 8192, "--min-pixels", 4096, "--max-batch-tokens", 16, "--workers", 1,
        "--shard-mib", 0.001, "--no-cuda-graphs", "--warmup", "--resize", "torch",
    )  # fmt: skip
    assert done.code == 0, done.err
    store = FeatureStore(tmp_path / "out")
    assert list(store) == ["a.png", "b.JPG"]
    assert store["a.png"].embeddings.dtype == torch.bfloat16
    assert len(store["a.png"].embeddings) <= 8192 // 32**2
    metadata = store.metadata_of("features-00000-00001.safetensors")
    assert metadata["dtype"] == "bfloat16" and metadata["max_pixels"] == "8192"
    assert metadata["resize"] == "torch" and metadata["model"] == str(tiny_qwen3_vl)


def test_pool_mean(tiny_qwen3_vl: Path, photos: Path, tmp_path: Path, vitrt: Vitrt) -> None:
    for pool in ("none", "mean"):
        output = tmp_path / pool
        assert vitrt("encode", tiny_qwen3_vl, photos, "--output", output, "--pool", pool).code == 0
    whole, pooled = FeatureStore(tmp_path / "none"), FeatureStore(tmp_path / "mean")
    ((ids, table),) = pooled.pooled_tables()
    assert ids == IDS
    for name, row in zip(ids, table, strict=True):
        assert torch.equal(row, pooled[name].pooled())
        assert torch.allclose(row, whole[name].pooled(), rtol=0, atol=1e-6)
    assert check_folder(tmp_path / "mean").problems == []


def test_another_model_or_limit_is_refused(
    tiny_qwen3_vl: Path, tiny_qwen2_5_vl: Path, photos: Path, tmp_path: Path, vitrt: Vitrt
) -> None:
    output = tmp_path / "out"
    assert vitrt("encode", tiny_qwen3_vl, photos, "--output", output).code == 0
    before = {path: path.read_bytes() for path in output.iterdir()}
    other = vitrt("encode", tiny_qwen2_5_vl, photos, "--output", output)
    assert other.code == 1 and f"model is {tiny_qwen3_vl} there and {tiny_qwen2_5_vl}" in other.err
    limit = vitrt("encode", tiny_qwen3_vl, photos, "--output", output, "--max-pixels", 9000)
    assert limit.code == 1 and "max_pixels is 65536 there and 9000 now" in limit.err
    dtype = vitrt("encode", tiny_qwen3_vl, photos, "--output", output, "--dtype", "bfloat16")
    assert dtype.code == 1 and "dtype is float32 there and bfloat16 now" in dtype.err
    assert before == {path: path.read_bytes() for path in output.iterdir()}
    replaced = vitrt("encode", tiny_qwen2_5_vl, photos, "--output", output, "--overwrite")
    assert replaced.code == 0
    assert FeatureStore(output)["a.png"].deepstack is None
    assert check_folder(output).problems == []


def test_weights_that_changed_in_place_are_noticed(
    tiny_qwen3_vl: Path, photos: Path, tmp_path: Path, vitrt: Vitrt
) -> None:
    model = shutil.copytree(tiny_qwen3_vl, tmp_path / "model")
    output = tmp_path / "out"
    assert vitrt("encode", model, photos, "--output", output).code == 0
    moved = model.rename(tmp_path / "moved")
    assert vitrt("encode", moved, photos, "--output", output).code == 0
    assert vitrt("extract", moved, "--output", tmp_path / "tower").code == 0
    assert vitrt("encode", tmp_path / "tower", photos, "--output", output).code == 0
    tower = tmp_path / "tower/model.safetensors"
    changed = bytearray(tower.read_bytes())
    changed[-5] ^= 1  # in the mantissa of the last tensor
    tower.write_bytes(changed)
    refused = vitrt("encode", tmp_path / "tower", photos, "--output", output)
    assert refused.code == 1 and "holds the features of another run" in refused.err


def test_a_folder_in_use(tiny_qwen3_vl: Path, photos: Path, tmp_path: Path, vitrt: Vitrt) -> None:
    (tmp_path / "out").mkdir()
    with FolderLock(tmp_path / "out"):
        done = vitrt("encode", tiny_qwen3_vl, photos, "--output", tmp_path / "out")
    assert done.code == 1 and f"another job (process {os.getpid()} on" in done.err


def test_json_log(tiny_qwen3_vl: Path, photos: Path, tmp_path: Path, vitrt: Vitrt) -> None:
    (photos / "bad.png").write_text("no image")
    done = vitrt("encode", tiny_qwen3_vl, photos, "--output", tmp_path / "out", "--log-json")
    assert done.code == 3 and done.out == ""
    events = [json.loads(line) for line in done.err.splitlines()]
    assert {event["event"] for event in events} == {"log", "progress", "end"}
    end = events[-1]
    assert end["event"] == "end" and end["exit_code"] == 3
    assert end["images"] == 6 and end["skipped"] == 1 and end["listed"] == 7
    assert any(e.get("level") == "warning" and "bad.png" in e["message"] for e in events)


def test_large_images_can_be_refused_by_size(
    tiny_qwen3_vl: Path, photos: Path, tmp_path: Path, vitrt: Vitrt
) -> None:
    Image.fromarray(np.zeros((301, 401, 3), np.uint8)).save(photos / "large.png")
    command = ("encode", tiny_qwen3_vl, photos, "--output", tmp_path / "out")
    refused = vitrt(*command, "--max-image-pixels", 120_700)
    assert refused.code == 3 and "large.png: cannot be read as an image" in refused.err
    assert "(120701 pixels) exceeds limit of 120700 pixels" in refused.err
    (line,) = (tmp_path / "out/errors-00000.jsonl").read_text().splitlines()
    assert "--max-image-pixels" in json.loads(line)["message"]
    assert vitrt(*command, "--max-image-pixels", 120_699).code == 3
    assert vitrt(*command, "--max-image-pixels", 120_701).code == 0


def test_info(tiny_qwen3_vl: Path, tiny_qwen2_5_vl: Path, tmp_path: Path, vitrt: Vitrt) -> None:
    done = vitrt("info", ROOT / "configs/qwen3-vl-8b")
    assert done.code == 0, done.err
    assert "qwen3_vl" in done.out and "576.4 million" in done.out
    assert "deepstack from layers 8, 16, 24" in done.out
    assert re.search(r"700 x 1120 +704 x 1120 +3080 +770 ", done.out)
    for name in ("sdpa", "triton", "fa3"):
        assert re.search(rf"  {name} +(usable|no: \w+)", done.out)
    windows = vitrt("info", tiny_qwen2_5_vl, "--max-pixels", 30000)
    assert "windows of 112 pixels except in layers 2, 4" in windows.out
    assert "3136 to 30000" in windows.out
    assert vitrt("info", tmp_path).code == 1


def test_extract(tiny_qwen2_5_vl: Path, photos: Path, tmp_path: Path, vitrt: Vitrt) -> None:
    done = vitrt("extract", tiny_qwen2_5_vl, "--output", tmp_path / "tower")
    assert done.code == 0 and "tensors" in done.out
    tower = sorted(path.name for path in (tmp_path / "tower").iterdir())
    assert tower == ["config.json", "model.safetensors", "preprocessor_config.json"]
    for name, model in (("whole", tiny_qwen2_5_vl), ("alone", tmp_path / "tower")):
        assert vitrt("encode", model, photos, "--output", tmp_path / name).code == 0
    whole, alone = FeatureStore(tmp_path / "whole"), FeatureStore(tmp_path / "alone")
    for name in IDS:
        assert torch.equal(whole[name].embeddings, alone[name].embeddings)


def test_check(tiny_qwen3_vl: Path, photos: Path, tmp_path: Path, vitrt: Vitrt) -> None:
    output = tmp_path / "out"
    assert vitrt("encode", tiny_qwen3_vl, photos, "--output", output).code == 0
    clean = vitrt("check", output)
    assert clean.code == 0 and "6 images" in clean.out and "no problem" in clean.out
    shard = output / "features-00000-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    broken = vitrt("check", output)
    assert (
        broken.code == 1 and "6 images of features-00000-00000.safetensors are lost" in broken.out
    )
    assert vitrt("encode", tiny_qwen3_vl, photos, "--output", output).code == 0
    assert vitrt("check", output).code == 0
    missing = vitrt("check", tmp_path)
    assert missing.code == 1 and "manifest" in missing.err


def test_help_and_version(vitrt: Vitrt) -> None:
    whole = vitrt("--help")
    assert whole.code == 0
    for command in COMMANDS:
        assert re.search(rf"^ +{command} +\w", whole.out, re.MULTILINE)
        done = vitrt(command, "--help")
        assert done.code == 0 and f"vitrt {command}" in done.out
    assert vitrt().code == vitrt("no-such-command").code == 1
    version = vitrt("--version")
    assert version.code == 0 and version.out.startswith("vitrt ")


def test_help_imports_no_torch() -> None:
    """Of the whole, and of each command: seconds on a machine that has not read torch yet."""
    code = (
        "import sys\nfrom contextlib import suppress\nfrom vitrt.cli import main\n"
        f"for command in [[], *([name] for name in {list(COMMANDS)!r})]:\n"
        "    with suppress(SystemExit): main([*command, '--help'])\n"
        "    print('\\nHEAVY', command, {'torch', 'transformers', 'PIL'} & set(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    lines = [line for line in out.splitlines() if line.startswith("HEAVY")]
    assert len(lines) == 1 + len(COMMANDS)
    assert all(line.endswith("set()") for line in lines), lines


@pytest.mark.parametrize("config", [RuntimeConfig, EncodeOptions])
def test_defaults_of_options_are_those_of_the_dataclasses(config: type) -> None:
    parser = Parser()
    encode.add_arguments(parser)
    args = parser.parse_args(["model", "photos", "--output", "out"])
    assert from_args(config, args) == config()
    declared = {field.name for field in fields(config)} & vars(args).keys()
    assert declared >= {"device", "max_batch_tokens"} or declared >= {"shard_mib", "merged"}


def test_options_are_read_as_their_fields_are_typed() -> None:
    parser = Parser()
    encode.add_arguments(parser)
    line = "model photos --output out --no-merged --layers=2,-1 --warmup --no-cuda-graphs"
    args = parser.parse_args([*line.split(), "--shard-mib", "0.5", "--min-pixels", "64"])
    options, runtime = from_args(EncodeOptions, args), from_args(RuntimeConfig, args)
    assert (options.merged, options.layers, options.warmup) == (False, (2, -1), True)
    assert (options.shard_mib, runtime.min_pixels, runtime.cuda_graphs) == (0.5, 64, False)
    for wrong in (["--pool", "max"], ["--min-pixels", "1.5"], ["--layers", "a"]):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args([*line.split(), *wrong])
        assert stopped.value.code == 1


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    """As `vitrt info MODEL | head -1` has it."""
    command = [sys.executable, "-m", "vitrt", "info", str(ROOT / "configs/qwen3-vl-8b")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert "error" not in process.stderr.read()
    assert process.wait(60) == 0


def test_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vitrt", "--version"], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith(b"vitrt ")


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Enough images that a run can be interrupted."""
    folder = tmp_path / "many"
    first = photo(folder / "00000.png", 0, 200, 200)
    for index in range(1, 1500):
        os.link(first, folder / f"{index:05}.png")
    return folder


@pytest.fixture
def running(
    tiny_qwen3_vl: Path, many: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[subprocess.Popen[str]]:
    """A run whose first shard was just written; a parameter is further options of it."""
    command = [sys.executable, "-m", "vitrt", "encode", str(tiny_qwen3_vl), str(many)]
    command += ["--output", str(tmp_path / "out"), "--shard-mib", "0.2", "--workers", "1"]
    command += getattr(request, "param", ())
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("features-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("number", "running", "advice"),
    [
        (signal.SIGINT, (), "interrupted, the same command carries on"),
        (signal.SIGTERM, ("--overwrite",), "interrupted, run it without --overwrite to carry on"),
    ],
    indirect=["running"],
)
def test_an_interrupt_finishes_the_shard_in_hand(
    number: int, running: subprocess.Popen[str], advice: str, many: Path, tmp_path: Path
) -> None:
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert "finishing the shard in hand" in err and advice in out
    store = FeatureStore(tmp_path / "out")
    encoded = re.match(r"(\d+) images", out)
    assert encoded is not None and len(store) == int(encoded[1]) < 1500
    result = check_folder(tmp_path / "out")
    assert result.problems == []


@pytest.mark.parametrize("running", [("--log-json",)], indirect=True)
def test_an_interrupt_is_logged_as_json(running: subprocess.Popen[str]) -> None:
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    events = [json.loads(line) for line in err.splitlines()]
    (said,) = (e for e in events if "finishing the shard in hand" in e.get("message", ""))
    assert said.keys() == {"event", "time", "level", "message"}
    assert (said["event"], said["level"]) == ("log", "warning")
    end = events[-1]
    assert end["event"] == "end" and end["exit_code"] == 130
    assert not end["all_listed"] and end["seconds_left"] is None


def test_an_interrupt_that_comes_twice_is_one(
    running: subprocess.Popen[str], tiny_qwen3_vl: Path, many: Path, tmp_path: Path, vitrt: Vitrt
) -> None:
    """As torchrun has it, which passes on what its ranks have got already."""
    running.send_signal(signal.SIGINT)
    time.sleep(0.005)
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    encoded = re.match(r"(\d+) images", out)
    assert encoded is not None, err
    assert len(FeatureStore(tmp_path / "out")) == int(encoded[1])
    for path in sorted(many.iterdir())[150:]:
        path.unlink()
    done = vitrt("encode", tiny_qwen3_vl, many, "--output", tmp_path / "out")
    assert done.code == 0
    assert {f"{index:05}.png" for index in range(150)} <= set(FeatureStore(tmp_path / "out"))
    assert check_folder(tmp_path / "out").problems == []


def test_a_later_interrupt_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    exits: list[int] = []
    monkeypatch.setattr("vitrt.commands.console.os._exit", exits.append)
    moments = iter([100.0, 100.1, 101.9, 102.0])
    clock = SimpleNamespace(monotonic=lambda: next(moments))
    monkeypatch.setattr("vitrt.commands.console.time", clock)
    stop = Stop()
    stop.then(lambda: None)
    with graceful_interrupts(stop):
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert stop.requested and not exits
        signal.raise_signal(signal.SIGINT)
    assert exits == [130]


def test_an_interrupt_when_nobody_reads(running: subprocess.Popen[str], tmp_path: Path) -> None:
    assert running.stdout is not None and running.stderr is not None
    running.stdout.close()
    running.stderr.close()
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 130
    assert check_folder(tmp_path / "out").problems == []


@pytest.mark.parametrize("streams", ["2>&-", ">&-", "<&- >&- 2>&-", ">/dev/full 2>&1", "gone"])
def test_streams_that_fail_fail_no_run(
    streams: str, tiny_qwen3_vl: Path, photos: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "vitrt", "encode", str(tiny_qwen3_vl), str(photos)]
    command += ["--output", str(tmp_path / "out"), "--device", "cpu"]
    (photos / "bad.png").write_text("no image")
    if streams == "gone":
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=write, check=False)
        os.close(write)
    else:
        shell = ["sh", "-c", f'exec "$@" {streams}', "sh", *command]
        done = subprocess.run(shell, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 3, done
    assert set(FeatureStore(tmp_path / "out")) == set(IDS)
    assert check_folder(tmp_path / "out").problems == []


def test_an_empty_path_is_not_the_folder_that_it_runs_in(
    tiny_qwen3_vl: Path,
    photos: Path,
    tmp_path: Path,
    vitrt: Vitrt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where a shell's variable is not set: --output "$OUT"."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for command in (
        ["encode", tiny_qwen3_vl, photos, "--output", ""],
        ["extract", tiny_qwen3_vl, "--output", "", "--overwrite"],
        ["show", tiny_qwen3_vl, photos / "a.png", "--output", ""],
        ["check", ""],
        ["export", "", "--to", "parquet"],
        ["export", tmp_path, "--to", "parquet", "--output", ""],
        ["bench", tiny_qwen3_vl, "--json", ""],
    ):
        done = vitrt(*command)
        assert done.code == 1 and "the path is empty" in done.err, command
    assert not list((tmp_path / "here").iterdir())


def test_a_name_that_standard_output_cannot_encode(
    tiny_qwen3_vl: Path, photos: Path, tmp_path: Path
) -> None:
    """The work is done, so the exit code says so; and what was written can be read back."""
    for encoding, name in (("utf-8:strict", b"out\xff"), ("ascii:strict", "aé".encode())):
        output = tmp_path / os.fsdecode(name)
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        for command in (["encode", tiny_qwen3_vl, photos, "--output", output], ["check", output]):
            done = subprocess.run(
                [sys.executable, "-m", "vitrt", *map(os.fspath, command)],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                check=False,
            )
            assert done.returncode == 0, done
            assert b"6 images" in done.stdout
        assert set(FeatureStore(output)) == set(IDS)


def test_what_a_file_is_named_does_not_reach_the_terminal_as_it_is(
    tiny_qwen3_vl: Path, photos: Path, tmp_path: Path, vitrt: Vitrt
) -> None:
    name = "\x1b[2Jx\nerror: y.png"
    (photos / name).write_text("no image")
    for options in ([], ["--on-error", "fail"]):
        output = tmp_path / f"out{len(options)}"
        done = vitrt("encode", tiny_qwen3_vl, photos, "--output", output, *options)
        assert "\x1b" not in done.err and "\\x1b[2Jx" in done.err
        assert options or r"skipped: \x1b[2Jx\nerror: y.png: not an image" in done.err
        (line,) = (output / "errors-00000.jsonl").read_text().splitlines()
        assert json.loads(line)["id"] == name


def test_a_broken_display_goes_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("vitrt.job.progress_display._BAR_SECONDS", 0.001)
    for stream in (Broken(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        progress = Progress()
        progress.listing = lambda: (100, False)
        for style in ("auto", "bar", "lines", "json"):
            if stream is not None or style != "bar":
                with ProgressDisplay(progress, style):  # type: ignore[arg-type]
                    time.sleep(0.02)
    log = threading.Thread(target=tqdm.write, args=["", io.StringIO()], daemon=True)
    log.start()
    log.join(5)
    assert not log.is_alive()  # tqdm's lock is free


def test_an_interrupt_before_the_run_ends_at_once() -> None:
    stop, before = Stop(), signal.getsignal(signal.SIGINT)
    with graceful_interrupts(stop), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    calls: list[str] = []
    stop.then(lambda: calls.append("stopped"))
    assert not stop.requested
    with graceful_interrupts(stop):
        signal.raise_signal(signal.SIGTERM)
    assert stop.requested and calls == ["stopped"]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("module", ["numpy.lib", "datetime"])
def test_an_interrupt_while_numpy_is_imported_ends_the_command(
    module: str, tiny_qwen3_vl: Path
) -> None:
    """C code of torch's imports the first of them, and of NumPy's the other, without it."""
    program = """if True:
        import runpy, signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)

        class Finder:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name == "MODULE":
                    sys.meta_path.remove(Finder)
                    signal.raise_signal(signal.SIGINT)

        sys.meta_path.insert(0, Finder)
        runpy.run_module("vitrt", run_name="__main__")
    """.replace("MODULE", module)
    for command in (["info", tiny_qwen3_vl], ["check", tiny_qwen3_vl]):
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, command)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 130, done
        assert done.stderr == "error: interrupted\n" and done.stdout == ""


def test_reporters(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrt.job.progress_display._LINE_SECONDS", 0.02)
    monkeypatch.setattr("vitrt.job.progress_display._BAR_SECONDS", 0.02)
    progress = Progress()
    progress.listing = lambda: (100, False)
    progress.count_batch(10, 640, 0.01)
    for style, sign in (("lines", "10/100+ images"), ("json", '"images": 10'), ("bar", "10%")):
        with ProgressDisplay(progress, style):  # type: ignore[arg-type]
            time.sleep(0.2)
        err = capsys.readouterr().err
        assert err.count(sign) > 2
        assert style == "bar" or "tokens" in err
    with ProgressDisplay(progress, "none"):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""
    with ProgressDisplay(progress, "auto"):  # no terminal here
        time.sleep(0.05)
    assert "10/100+ images" in capsys.readouterr().err
