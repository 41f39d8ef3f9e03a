"""Every example runs on a tiny checkpoint, and what it says is right."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.support.checkpoints import add_tokenizer, reference_model, tiny_checkpoint
from tests.support.sentence_transformers import embedding_checkpoint
from vitrt import VisionEncoder
from vitrt.cli import main
from vitrt.images.levels import patches_reference
from vitrt.integrations.transformers import placeholder_inputs

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TESTED = {
    "dense_features",
    "feed_transformers",
    "fill_ec_cache",
    "precompute_for_vllm",
    "ray_folder",
    "ray_serve",
    "search_lancedb",
    "search_photos",
    "sentence_transformers_images",
    "torchrun",
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs of near-duplicates and one picture of its own, in two folders."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    rng = np.random.default_rng(0)
    kinds = [rng.integers(0, 256, (6, 8, 3), dtype=np.uint8) for _ in range(3)]
    for kind, name in zip(
        (0, 0, 1, 1, 2), ("a1.png", "more/a2.png", "b1.jpg", "more/b2.jpg", "c.png"), strict=True
    ):
        image = Image.fromarray(kinds[kind]).resize((160, 120), Image.Resampling.BICUBIC)
        noise = rng.integers(-3, 4, (120, 160, 3))
        pixels = (np.asarray(image).astype(int) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def test_all_examples_are_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == TESTED


def test_search_photos(
    tiny_qwen2_5_vl: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny_qwen2_5_vl), str(photos), str(photos / "b1.jpg"), "--top", "2"]
    load("search_photos").main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [Path(line.split()[1]).name for line in lines] == ["b1.jpg", "b2.jpg"]
    assert float(lines[0].split()[0]) == pytest.approx(1, abs=1e-3)


def test_search_lancedb(
    tiny_qwen2_5_vl: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lancedb")
    output = tmp_path / "features"
    command = ["encode", str(tiny_qwen2_5_vl), str(photos), "--output", str(output)]
    assert main([*command, "--pool", "mean"]) == 0
    capsys.readouterr()
    load("search_lancedb").main([str(output), "b1.jpg", "--top", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["b1.jpg", "more/b2.jpg"]
    assert float(lines[0].split()[0]) == pytest.approx(1, abs=1e-3)


def test_dense_features(
    tiny_qwen3_vl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(1)
    for name in ("one.png", "two.png"):
        pixels = rng.integers(0, 256, (96, 160, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    one, two = str(tmp_path / "one.png"), str(tmp_path / "two.png")
    picture = tmp_path / "map.png"
    main = load("dense_features").main
    main([str(tiny_qwen3_vl), one, one, "--at", "0.9", "0.1", "-o", str(picture)])
    out = capsys.readouterr().out
    # Row from y, column from x; an image's cell is most like itself.
    assert "cell (0, 4) of 3 x 5" in out
    assert "most like (0, 4) of 3 x 5 in one.png: 1.000" in out
    with Image.open(picture) as image:
        assert image.size == (160, 96)
        assert np.asarray(image)[10, 144].max() > 0
    main([str(tiny_qwen3_vl), one, one, "--at", "0.9", "0.1", "--layer", "2", "-o", str(picture)])
    assert "cell (0, 9) of 6 x 10" in capsys.readouterr().out
    main([str(tiny_qwen3_vl), one, two, "-o", str(picture)])
    assert "in two.png: 1.000" not in capsys.readouterr().out


def test_precompute_for_vllm(tiny_qwen3_vl: Path, photos: Path, tmp_path: Path) -> None:
    load("precompute_for_vllm").main([str(tiny_qwen3_vl), str(photos), "--output", str(tmp_path)])
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.pt"))
    assert files == ["a1.png.pt", "b1.jpg.pt", "c.png.pt", "more/a2.png.pt", "more/b2.jpg.pt"]
    payload = torch.load(tmp_path / "more/b2.jpg.pt")
    encoder = VisionEncoder.from_pretrained(tiny_qwen3_vl)
    wanted = encoder.encode([photos / "more/b2.jpg"])[0]
    image = payload["vllm"]["image"]
    assert image["image_grid_thw"].tolist() == [list(wanted.grid_thw)]
    torch.testing.assert_close(image["image_embeds"], wanted.concatenated(), rtol=1e-4, atol=1e-5)
    assert torch.equal(payload["sglang"]["precomputed_embeddings"], image["image_embeds"])


def test_fill_ec_cache(
    tiny_qwen3_vl: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load("fill_ec_cache").main([str(tiny_qwen3_vl), str(photos), "--cache", str(tmp_path)])
    keys = [line.rpartition(": ")[0] for line in capsys.readouterr().out.splitlines()]
    assert keys == ["a1.png", "b1.jpg", "c.png", "more%2Fa2.png", "more%2Fb2.jpg"]
    assert keys == sorted(path.name for path in tmp_path.iterdir())
    encoder = VisionEncoder.from_pretrained(tiny_qwen3_vl, resize="torch")
    (wanted,) = encoder.encode([photos / "more/b2.jpg"])
    kept = load_file(tmp_path / "more%2Fb2.jpg" / "encoder_cache.safetensors")["ec_cache"]
    torch.testing.assert_close(kept, wanted.concatenated(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_feed_transformers(
    family: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny_checkpoint(family, tmp_path / family)
    add_tokenizer(checkpoint)
    main = load("feed_transformers").main

    def answer(*names: str) -> str:
        arguments = [str(checkpoint), *(str(photos / name) for name in names)]
        main([*arguments, "--prompt", "which one", "--max-new-tokens", "8"])
        return capsys.readouterr().out.strip()

    assert answer("a1.png", "b1.jpg") == wanted_answer(checkpoint, photos, "a1.png", "b1.jpg")
    assert answer("c.png") == wanted_answer(checkpoint, photos, "c.png")


def wanted_answer(checkpoint: Path, photos: Path, *names: str) -> str:
    """What transformers says all by itself, from pixels."""
    from transformers import AutoTokenizer

    encoder = VisionEncoder.from_pretrained(checkpoint, device="cpu")
    prepared = [encoder.processor.prepare(photos / name) for name in names]
    table = encoder.table.numpy()
    sizes = (encoder.config.patch_size, encoder.config.temporal_patch_size, 2)
    pixels = np.concatenate([patches_reference(image, table, *sizes) for image in prepared])
    ids = [token for _ in names for token in (507, 505, 508)]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids += tokenizer("which one", add_special_tokens=False)["input_ids"]
    model = reference_model(checkpoint)
    text = placeholder_inputs(model.config, ids, encoder.encode(photos / name for name in names))
    output = model.generate(
        **text,
        pixel_values=torch.from_numpy(pixels),
        image_grid_thw=torch.tensor([image.grid_thw for image in prepared]),
        max_new_tokens=8,
        do_sample=False,
    )
    new = output[0, text["input_ids"].shape[1] :]
    assert len(new) == 8
    return tokenizer.decode(new, skip_special_tokens=True)


def test_sentence_transformers_images(
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = embedding_checkpoint("qwen3_vl", tmp_path / "embedding", monkeypatch)
    paths = [str(photos / name) for name in ("a1.png", "b1.jpg", "more/a2.png", "more/b2.jpg")]
    capsys.readouterr()
    load("sentence_transformers_images").main([str(checkpoint), *paths])
    lines = capsys.readouterr().out.splitlines()
    nearest = [Path(line.split(" nearest is ")[1].split(",")[0]).name for line in lines]
    assert nearest == ["a2.png", "b2.jpg", "a1.png", "b1.jpg"]


def test_the_readme_runs(tiny_qwen3_vl: Path, photos: Path) -> None:
    """Its first Python block, with a tiny checkpoint and layers that this one has."""
    text = (EXAMPLES.parent / "README.md").read_text()
    block = text.split("```python\n")[1].split("```")[0]
    for written, here in (
        ("Qwen/Qwen3-VL-8B-Instruct", tiny_qwen3_vl.as_posix()),
        ("cat.jpg", (photos / "b1.jpg").as_posix()),
        ("[8, 16, -1]", "[1, 3, -1]"),
    ):
        assert written in block
        block = block.replace(written, here)
    with Image.open(photos / "c.png") as image:
        pil_image = image.convert("RGB")
    names = {
        "pil_image": pil_image,
        "array": np.asarray(pil_image),
        "paths": [photos / "a1.png"],
        "pixel_values": torch.randn(16, 1536),
        "grid_thw": torch.tensor([[1, 4, 4]]),
    }
    exec(block, names)
    assert names["features"].hidden.shape[0] == 3
    assert names["out"].embeddings.shape == (4, 64)


@pytest.mark.parametrize("tp", [1, 2])
def test_torchrun(tp: int, tiny_qwen2_5_vl: Path, photos: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(EXAMPLES / "torchrun.py"), str(tiny_qwen2_5_vl), str(photos)]
    command += ["--output", str(tmp_path), "--tp", str(tp), "--device", "cpu"]
    root = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 2 // tp
    rows = {name: row for file in files for name, row in load_file(file).items()}
    encoder = VisionEncoder.from_pretrained(tiny_qwen2_5_vl, device="cpu")
    assert len(rows) == 5
    for name, row in rows.items():
        wanted = encoder.encode([photos / name])[0].pooled()
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-5)
