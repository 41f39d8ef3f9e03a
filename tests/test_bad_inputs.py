"""Everything a user can get wrong at the command line, model or images: each has its message.

Errors of the model and of arguments end with exit code 1 and write nothing. Bad images of a folder
are skipped and named.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support.commands import Vitrt, vitrt
from tests.support.folders import photo
from vitrt import FeatureStore
from vitrt.store.check import check_folder
from vitrt.store.lock import FolderLock

__all__ = ["vitrt"]  # a fixture


# Models: a copy of a good one, spoilt.


def _edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def spoil(model: Path) -> None:
        data = json.loads((model / name).read_text())
        change(data)
        (model / name).write_text(json.dumps(data))

    return spoil


def _shard(model: Path) -> Path:
    """The shard that holds the first block."""
    index = json.loads((model / "model.safetensors.index.json").read_text())
    name = next(key for key in index["weight_map"] if "visual.blocks.0.attn.qkv.weight" in key)
    return model / str(index["weight_map"][name])


def _tensors(change: Callable[[dict[str, Any], str], object]) -> Callable[[Path], object]:
    def spoil(model: Path) -> None:
        path = _shard(model)
        tensors = load_file(path)
        change(tensors, next(n for n in tensors if n.endswith("visual.blocks.0.attn.qkv.weight")))
        save_file(tensors, path, metadata={"format": "pt"})
        index = json.loads((model / "model.safetensors.index.json").read_text())
        rest = {k: v for k, v in index["weight_map"].items() if v != path.name}
        index["weight_map"] = rest | dict.fromkeys(tensors, path.name)
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


def _cut(model: Path) -> None:
    _shard(model).write_bytes(_shard(model).read_bytes()[:-100])


CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder without config": (lambda m: (m / CONFIG).unlink(), r"config\.json"),
    "config that is no JSON": (lambda m: (m / CONFIG).write_text("{"), r"config\.json"),
    "config that is a list": (lambda m: (m / CONFIG).write_text("[]"), r"config\.json"),
    "config without vision": (_edit(CONFIG, lambda c: c.pop("vision_config")), "vision_config"),
    "vision of another family": (
        _edit(CONFIG, lambda c: c["vision_config"].update(model_type="siglip")),
        "siglip",
    ),
    "heads that do not divide": (
        _edit(CONFIG, lambda c: c["vision_config"].update(num_heads=7)),
        "num_heads 7",
    ),
    "depth that is text": (
        _edit(CONFIG, lambda c: c["vision_config"].update(depth="x")),
        "depth.*'x'",
    ),
    "more layers than saved": (
        _edit(CONFIG, lambda c: c["vision_config"].update(depth=7)),
        r"blocks\.6\.",
    ),
    "fewer layers than saved": (
        _edit(CONFIG, lambda c: c["vision_config"].update(depth=5)),
        r"blocks\.5\.",
    ),
    "no preprocessor": (lambda m: (m / PREPROCESSOR).unlink(), r"preprocessor_config\.json"),
    "preprocessor without limits": (
        _edit(
            PREPROCESSOR, lambda c: [c.pop(k, None) for k in ("size", "min_pixels", "max_pixels")]
        ),
        "min_pixels",
    ),
    "preprocessor of another patch size": (
        _edit(PREPROCESSOR, lambda c: c.update(patch_size=14)),
        "patch_size",
    ),
    "preprocessor without normalising": (
        _edit(PREPROCESSOR, lambda c: c.update(do_normalize=False)),
        "do_normalize",
    ),
    "missing shard": (lambda m: _shard(m).unlink(), r"model-0000\d-of-00003\.safetensors"),
    "truncated shard": (_cut, r"model-0000\d-of-00003\.safetensors"),
    "shard that is text": (lambda m: _shard(m).write_text("hello"), r"model-0000\d-of-00003"),
    "empty shard": (lambda m: _shard(m).write_bytes(b""), r"model-0000\d-of-00003"),
    "index that is no JSON": (
        lambda m: (m / "model.safetensors.index.json").write_text("x"),
        "index",
    ),
    "missing tensor": (_tensors(lambda t, name: t.pop(name)), r"blocks\.0\.attn\.qkv\.weight"),
    "left-over tensor": (
        _tensors(lambda t, name: t.update({name.replace("qkv", "kvq"): t[name].clone()})),
        r"blocks\.0\.attn\.kvq\.weight",
    ),
    "wrong shape": (
        _tensors(lambda t, name: t.update({name: t[name][:, 1:].contiguous()})),
        r"blocks\.0\.attn\.qkv\.weight",
    ),
    "wrong dtype": (
        _tensors(lambda t, name: t.update({name: t[name].int()})),
        r"blocks\.0\.attn\.qkv\.weight",
    ),
}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return photo(tmp_path / "photos/good.png", 0).parent


@pytest.mark.parametrize("case", MODELS)
def test_models(case: str, tiny_qwen3_vl: Path, good: Path, tmp_path: Path, vitrt: Vitrt) -> None:
    spoil, message = MODELS[case]
    model = shutil.copytree(tiny_qwen3_vl, tmp_path / "spoilt model")
    spoil(model)
    done = vitrt("encode", model, good, "--output", tmp_path / "out")
    assert done.code == 1
    assert "error: " in done.err and "Traceback" not in done.err
    assert re.search(message, done.err.split("error: ")[-1]), done.err
    assert not (tmp_path / "out").exists()


# Arguments.

ARGUMENTS: dict[str, tuple[list[str], str]] = {
    "model that is not there": (["{tmp}/nothing", "{photos}"], "nothing"),
    "model that is a file": (["{photos}/good.png", "{photos}"], r"good\.png: is a file"),
    "hub id that is not in the cache": (
        ["no-such/model-xyz", "{photos}", "--local-files-only", "--cache-dir", "{tmp}/cache"],
        "no-such/model-xyz",
    ),
    "unknown attention": (["{model}", "{photos}", "--attention", "magic"], "'magic'.*sdpa"),
    "attention that cannot run here": (
        ["{model}", "{photos}", "--device", "cpu", "--attention", "fa3"],
        "'fa3' cannot run on cpu.*sdpa",
    ),
    "unknown dtype": (["{model}", "{photos}", "--dtype", "int8"], "'int8'"),
    "unknown device": (["{model}", "{photos}", "--device", "quantum"], "quantum.*auto, cpu"),
    "device without data": (["{model}", "{photos}", "--device", "meta"], "'meta'.*auto, cpu"),
    "device of another kind": (["{model}", "{photos}", "--device", "mps"], "'mps'.*auto, cpu"),
    "device that is not there": (["{model}", "{photos}", "--device", "cuda:99"], "cuda:99"),
    "limits that cross": (
        ["{model}", "{photos}", "--min-pixels", "9000", "--max-pixels", "8000"],
        "9000.*8000",
    ),
    "limit below one token": (
        ["{model}", "{photos}", "--max-pixels", "100", "--min-pixels", "9"],
        "100",
    ),
    "limit below the checkpoint's other": (["{model}", "{photos}", "--max-pixels", "100"], "100"),
    "negative limit": (["{model}", "{photos}", "--min-pixels", "-5"], "min_pixels.*-5"),
    "limit that is text": (["{model}", "{photos}", "--min-pixels", "many"], "'many'"),
    "no budget": (["{model}", "{photos}", "--max-batch-tokens", "0"], "max_batch_tokens.*0"),
    "no workers": (["{model}", "{photos}", "--workers", "0"], "workers.*0"),
    "no shard size": (["{model}", "{photos}", "--shard-mib", "0"], "shard_mib.*0"),
    "endless shard": (["{model}", "{photos}", "--shard-mib", "inf"], "shard_mib.*finite, got inf"),
    "shard of no number": (["{model}", "{photos}", "--shard-mib", "nan"], "shard_mib.*got nan"),
    "negative image limit": (["{model}", "{photos}", "--max-image-pixels", "-1"], "-1"),
    "graphs without a GPU": (
        ["{model}", "{photos}", "--device", "cpu", "--cuda-graphs"],
        "cuda_graphs.*cpu",
    ),
    "unknown pooling": (["{model}", "{photos}", "--pool", "max"], "'max'"),
    "unknown option": (["{model}", "{photos}", "--fast"], "--fast"),
    "input that is not there": (["{model}", "{tmp}/nothing"], "INPUT .*nothing does not exist"),
    "list that is not there": (["{model}", "@{tmp}/nothing.txt"], r"nothing\.txt cannot be read"),
    "list that is a device": (["{model}", "@/dev/null"], "/dev/null is not a regular file"),
    "list that is a folder": (["{model}", "@{photos}"], "photos cannot be read: Is a directory"),
    "folder without images": (["{model}", "{tmp}/empty"], "hold no image"),
    "list without images": (["{model}", "@{tmp}/empty.txt"], "hold no image"),
    "two images with one id": (
        ["{model}", "{photos}", "{tmp}/more"],
        r"both get the id 'good\.png'",
    ),
    "folder within a folder": (["{model}", "{photos}", "{photos}/inner"], "share files"),
    "file within a folder": (["{model}", "{photos}", "{photos}/inner/other.png"], "share files"),
    "no input": (["{model}"], "INPUT"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(
    case: str, tiny_qwen3_vl: Path, good: Path, tmp_path: Path, vitrt: Vitrt
) -> None:
    photo(good / "inner/other.png", 1)
    photo(tmp_path / "more/good.png", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("hello")
    (tmp_path / "empty.txt").write_text("\n\n")
    arguments, message = ARGUMENTS[case]
    places = {"tmp": tmp_path, "photos": good, "model": tiny_qwen3_vl}
    done = vitrt("encode", *(a.format(**places) for a in arguments), "--output", tmp_path / "out")
    assert done.code == 1
    assert "error: " in done.err and "Traceback" not in done.err
    assert re.search(message, done.err.split("error: ")[-1]), done.err
    assert not (tmp_path / "out").exists()


def test_outputs(tiny_qwen3_vl: Path, good: Path, tmp_path: Path, vitrt: Vitrt) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for output in (file, file / "out"):
        done = vitrt("encode", tiny_qwen3_vl, good, "--output", output)
        assert done.code == 1 and str(output) in done.err and "Traceback" not in done.err
    assert file.read_text() == "mine"
    missing = vitrt("encode", tiny_qwen3_vl, good)
    assert missing.code == 1 and "--output" in missing.err
    (tmp_path / "busy").mkdir()
    with FolderLock(tmp_path / "busy"):
        done = vitrt("encode", tiny_qwen3_vl, good, "--output", tmp_path / "busy")
        assert done.code == 1 and "another job" in done.err


# Images.


def _encoded(format: str, size: tuple[int, int] = (90, 70), **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def _png_of_size(width: int, height: int) -> bytes:
    """The start of a PNG that claims this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


BAD_IMAGES: dict[str, tuple[bytes, str]] = {
    "truncated.jpg": (_encoded("JPEG")[:1500], "truncated"),
    "header-only.jpg": (_encoded("JPEG")[:20], "truncated|not an image|cannot be read"),
    "truncated.png": (_encoded("PNG")[:3000], "truncated|cannot be read"),
    "truncated.webp": (_encoded("WEBP")[:300], "cannot be read|not an image"),
    "truncated.gif": (_encoded("GIF")[:900], "cannot be read|truncated"),
    "truncated.tif": (_encoded("TIFF")[:400], "cannot be read|not an image|truncated"),
    "truncated.bmp": (_encoded("BMP")[:400], "truncated|cannot be read"),
    "empty.jpg": (b"", "empty|0 bytes"),
    "zeros.jpg": (b"\0" * 5000, "not an image"),
    "text.png": (b"hello", "not an image"),
    "page.html.jpg": (b"<!doctype html><title>404</title>" * 9, "not an image"),
    "vector.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "archive.png": (b"PK\x03\x04" + b"\0" * 200, "not an image"),
    "video.gif": (b"\0\0\0\x18ftypmp42" + b"\0" * 200, "not an image"),
    "thin.png": (_encoded("PNG", (4000, 1)), "aspect ratio"),
    "tall.png": (_encoded("PNG", (1, 4000)), "aspect ratio"),
    "bomb.png": (_png_of_size(20_000, 20_000), "400000000 pixels"),
    "no-width.png": (_png_of_size(0, 50), "cannot be read|not an image"),
    "lying.png": (_png_of_size(500, 500), "cannot be read|truncated"),
}


def _good_images(folder: Path) -> list[str]:
    """Unusual, and to be encoded all the same."""
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(1).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 200).save(folder / "16bit.png")
    Image.fromarray(pixels[..., 0].astype(np.float32)).save(folder / "float.tif")
    image.save(folder / "broken-exif.jpg", exif=b"Exif\0\0MM\0*\0\0\0\xff garbage")
    image.save(folder / "broken-profile.jpg", icc_profile=b"no profile" * 20)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("P").save(folder / "palette.png", transparency=3)
    image.save(folder / "really-a-png.jpg", format="PNG")
    image.resize((1, 1)).save(folder / "one-pixel.png")
    image.save(folder / "two-frames.gif", save_all=True, append_images=[image.rotate(90)])
    return [path.name for path in folder.iterdir()]


def test_images(tiny_qwen3_vl: Path, tmp_path: Path, vitrt: Vitrt) -> None:
    folder = tmp_path / "photos"
    good = _good_images(folder)
    for name, (content, _) in BAD_IMAGES.items():
        (folder / name).write_bytes(content)
    messages = {name: message for name, (_, message) in BAD_IMAGES.items()}
    (folder / "folder.jpg").mkdir()
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(folder / "pipe.jpg")
    messages |= {"folder.jpg": "folder", "gone.jpg": "No such file", "pipe.jpg": "regular file"}
    if os.geteuid() != 0:  # root reads everything
        (folder / "locked.jpg").write_bytes(_encoded("JPEG"))
        (folder / "locked.jpg").chmod(0)
        messages["locked.jpg"] = "Permission denied"

    done = vitrt("encode", tiny_qwen3_vl, folder, "--output", tmp_path / "out")
    assert done.code == 3, done.err
    assert "Traceback" not in done.err
    lines = (tmp_path / "out/errors-00000.jsonl").read_text().splitlines()
    errors = {line["id"]: line for line in map(json.loads, lines)}
    assert len(errors) == len(lines)
    assert set(errors) == set(messages)
    for name, message in messages.items():
        assert errors[name]["error"] == "ImageError"
        assert errors[name]["message"].startswith(f"{name}: ")
        assert re.search(message, errors[name]["message"]), errors[name]
        assert f"skipped: {name}: " in done.err
    assert set(FeatureStore(tmp_path / "out")) == set(good)
    assert check_folder(tmp_path / "out").problems == []


def test_a_list_of_only_bad_images(tiny_qwen3_vl: Path, tmp_path: Path, vitrt: Vitrt) -> None:
    (tmp_path / "list.txt").write_text("missing.jpg\nfolder\nlist.txt\n")
    (tmp_path / "folder").mkdir()
    done = vitrt("encode", tiny_qwen3_vl, f"@{tmp_path}/list.txt", "--output", tmp_path / "out")
    assert done.code == 3
    assert len((tmp_path / "out/errors-00000.jsonl").read_text().splitlines()) == 3
    assert len(FeatureStore(tmp_path / "out")) == 0


def test_there_are_sixty() -> None:
    assert len(MODELS) + len(ARGUMENTS) + len(BAD_IMAGES) + 3 >= 60
