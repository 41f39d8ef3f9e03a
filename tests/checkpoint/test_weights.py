"""Only the vision tensors of only their shards, each exactly once, or an error that names all."""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import CONFIGS, reference_tower
from tests.support.recorder import recorder
from vitrt.checkpoint.opened import open_checkpoint
from vitrt.checkpoint.shards import CheckpointError, StoredTensor, read_header
from vitrt.engine.loader import fill_tower
from vitrt.models.families import build_tower

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
INDEX = "model.safetensors.index.json"


@pytest.fixture(params=FAMILIES)
def checkpoint_folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture
def copy(tiny_qwen3_vl: Path, tmp_path: Path) -> Path:
    """A Qwen3-VL checkpoint to break."""
    return Path(shutil.copytree(tiny_qwen3_vl, tmp_path / "broken"))


_OPENED: list[list[str]] = []


@cache
def _install_audit() -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _OPENED and event == "open":
            _OPENED[-1].append(str(arguments[0]))

    sys.addaudithook(hook)  # there is no way to take it out again


@contextmanager
def audited() -> Iterator[list[str]]:
    """The files opened meanwhile."""
    _install_audit()
    _OPENED.append([])
    try:
        yield _OPENED[-1]
    finally:
        _OPENED.pop()


def load_all(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    fill_tower(recorder(checkpoint), checkpoint.tower_tensors())


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def edit_index(folder: Path, **changes: Any) -> None:
    """Point tensors of the index to other shards; None takes one out."""
    data = json.loads((folder / INDEX).read_text())
    for name, shard in changes.items():
        data["weight_map"][name] = shard
    data["weight_map"] = {name: shard for name, shard in data["weight_map"].items() if shard}
    (folder / INDEX).write_text(json.dumps(data))


def edit_shard(folder: Path, name: str, change: Any) -> Path:
    """Replace the tensor `name` in its shard by change(tensor), or take it out for None."""
    file = folder / weight_map(folder)[name]
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def single_file(folder: Path, target: Path, rename: Any = lambda name: name) -> Path:
    """The same checkpoint in one file, its tensors renamed; None drops one."""
    target.mkdir()
    tensors = {}
    for shard in sorted(set(weight_map(folder).values())):
        for name, tensor in load_file(folder / shard).items():
            if (new := rename(name)) is not None:
                tensors[new] = tensor
    save_file(tensors, target / "model.safetensors")
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(folder / name, target / name)
    return target


# What is loaded


def test_every_tensor_once_and_bit_for_bit(checkpoint_folder: Path) -> None:
    checkpoint = open_checkpoint(checkpoint_folder)
    tower = recorder(checkpoint)
    fill_tower(tower, checkpoint.tower_tensors())
    expected = reference_tower(checkpoint_folder).state_dict()
    assert tower.kept.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tower.kept[name], tensor), name


def test_the_real_tower_is_filled(checkpoint_folder: Path) -> None:
    """No parameter keeps what was in its memory before."""
    checkpoint = open_checkpoint(checkpoint_folder)
    with torch.device("meta"):
        tower = build_tower(checkpoint.vision_config())
    tower.to_empty(device="cpu")
    for parameter in tower.parameters():
        parameter.fill_(float("nan"))
    fill_tower(tower, checkpoint.tower_tensors())
    for name, parameter in tower.named_parameters():
        assert not parameter.isnan().any(), name
    norm = reference_tower(checkpoint_folder).blocks[3].norm2.weight
    assert torch.equal(tower.blocks[3].norm2.weight, norm)


@pytest.mark.parametrize(
    "prefix",
    [
        *("", "visual.", "model.visual.", "thinker.visual.", "vlm.model.visual."),
        *("model.language_model.visual.", "vision_tower.0."),
    ],
)
def test_prefixes(tiny_qwen3_vl: Path, tmp_path: Path, prefix: str) -> None:
    folder = single_file(
        tiny_qwen3_vl,
        tmp_path / "one",
        lambda name: name.replace("model.visual.", prefix) if "visual" in name else name,
    )
    checkpoint = open_checkpoint(folder)
    expected = open_checkpoint(tiny_qwen3_vl)
    assert checkpoint.tensors.keys() == expected.tensors.keys()
    assert {info.full_name for info in checkpoint.tensors.values()} == {
        prefix + name for name in expected.tensors
    }
    load_all(folder)


def test_shards_without_an_index(copy: Path) -> None:
    (copy / INDEX).unlink()
    load_all(copy)


def test_only_shards_with_vision_tensors_are_opened(checkpoint_folder: Path) -> None:
    """Counted by the interpreter's own audit of opened files."""
    with audited() as opened:
        load_all(checkpoint_folder)
    names = weight_map(checkpoint_folder)
    vision = {shard for name, shard in names.items() if "visual." in name}
    assert vision != set(names.values()), "every shard holds vision tensors: nothing is shown"
    counts = {shard: sum(path.endswith(shard) for path in opened) for shard in names.values()}
    assert counts == {shard: 2 * (shard in vision) for shard in names.values()}  # header, data


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_slices_equal_those_of_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors = {
        "before": torch.ones(3, dtype=torch.uint8),
        "x": tensor,
        "scalar": tensor[0, 0, 0].clone(),
    }
    file = tmp_path / "x.safetensors"
    save_file(tensors, file)
    header = read_header(file)
    with safe_open(file, "pt") as theirs:
        ours = StoredTensor(header["x"])
        assert list(ours.shape) == theirs.get_slice("x").get_shape() == [7, 5, 3]
        full = slice(None)
        rows = (slice(2, 6), slice(3, None), slice(-2, None), slice(4, 2), slice(0, 9))
        more = ((full, slice(1, 3)), (slice(1, 4), full, slice(0, 2)), (slice(0, 3), ...))
        for index in (..., full, *rows, *more):
            assert torch.equal(ours[index], tensor[index]), index
        assert torch.equal(ours[3], tensor[3])
        assert torch.equal(StoredTensor(header["scalar"])[...], tensors["scalar"])


class Trickle(io.FileIO):
    """A file that gives at most seven bytes a read, as a network's file system may."""

    count = 0

    def readinto(self, buffer: Any) -> int:
        got = super().readinto(memoryview(buffer)[:7])
        Trickle.count += got
        return got


@pytest.fixture
def trickle(monkeypatch: pytest.MonkeyPatch) -> type[Trickle]:
    """Every file that is opened without a buffer trickles."""
    Trickle.count = 0
    usual = Path.open

    def opened(self: Path, *args: Any, **options: Any) -> Any:
        return Trickle(self) if options.get("buffering") == 0 else usual(self, *args, **options)

    monkeypatch.setattr(Path, "open", opened)
    return Trickle


def test_rows_are_all_that_is_read(tmp_path: Path, trickle: type[Trickle]) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"x": torch.arange(64.0).view(16, 4)}, file)
    part = StoredTensor(read_header(file)["x"])[4:6]
    assert part.tolist() == [[16.0, 17.0, 18.0, 19.0], [20.0, 21.0, 22.0, 23.0]]
    assert trickle.count == 2 * 4 * 4


def test_short_reads_go_on(copy: Path, trickle: type[Trickle]) -> None:
    """A read may legally give less than is there; that is no truncated file."""
    expected = load_file(copy / weight_map(copy)[TABLE])[TABLE]
    tensors = dict(open_checkpoint(copy).tower_tensors())
    assert torch.equal(tensors["pos_embed.weight"][...], expected)
    assert torch.equal(tensors["pos_embed.weight"][:, 5:50], expected[:, 5:50])
    assert trickle.count > expected.nbytes


def test_quantization_config_is_for_the_language_model(copy: Path) -> None:
    """Qwen3-VL-FP8 keeps its tower in bfloat16, whatever its config says of the rest."""
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (copy / "config.json").write_text(json.dumps(config))
    load_all(copy)


def test_a_folder_without_weights_describes_a_tower(copy: Path) -> None:
    for file in [*copy.glob("*.safetensors"), copy / INDEX]:
        file.unlink()
    checkpoint = open_checkpoint(str(copy))
    assert checkpoint.vision_config().depth == 6
    with pytest.raises(CheckpointError, match=r"broken: holds no weights"):
        fill_tower(recorder(checkpoint), checkpoint.tower_tensors())


@pytest.mark.parametrize("folder", sorted(CONFIGS.iterdir()), ids=lambda folder: folder.name)
def test_released_configs_open_like_checkpoints(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.tensors
    assert checkpoint.vision_config().head_dim in (64, 72, 80)
    assert checkpoint.preprocessor_config().merge_size == 2


def test_processor_config_will_do(copy: Path) -> None:
    data = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").unlink()
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": data}))
    assert open_checkpoint(copy).preprocessor_config().max_pixels == data["size"]["longest_edge"]


# What is refused

NORM = "model.visual.blocks.0.norm1.weight"
TABLE = "model.visual.pos_embed.weight"


def test_all_problems_are_listed_at_once(copy: Path) -> None:
    edit_shard(copy, TABLE, lambda tensor: tensor[:, :-1].contiguous())
    edit_index(copy, **{NORM: None, "model.visual.blocks.1.norm1.weight": None})
    edit_index(copy, **{"model.visual.extra.weight": weight_map(copy)[TABLE]})
    file = copy / weight_map(copy)[TABLE]
    save_file({**load_file(file), "model.visual.extra.weight": torch.zeros(3)}, file)
    checkpoint = open_checkpoint(copy)
    tower = recorder(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        fill_tower(tower, checkpoint.tower_tensors())
    text = str(caught.value)
    assert "missing (2): blocks.0.norm1.weight, blocks.1.norm1.weight" in text
    assert "left over (1): model.visual.extra.weight" in text
    assert f"wrong shape (1): {TABLE} is [64, 95] in {file.name}, should be [64, 96]" in text
    assert not tower.kept, "something was stored before the check"


def refused(folder: Path | str, *said: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_all(folder)  # type: ignore[arg-type]
    for part in said:
        assert part in str(caught.value)
    return str(caught.value)


def test_missing_shard(copy: Path) -> None:
    shard = weight_map(copy)[TABLE]
    (copy / shard).unlink()
    refused(copy, str(copy), "missing shards", shard)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_truncated_shard(copy: Path, keep: float) -> None:
    file = copy / weight_map(copy)[TABLE]
    data = file.read_bytes()
    size = int(len(data) * keep) if 0 < keep < 1 else int(keep) % len(data)
    file.write_bytes(data[:size])
    refused(copy, file.name, "no safetensors file" if keep in (0, 5) else "truncated")


def test_a_shard_that_shrinks_after_it_was_opened(copy: Path) -> None:
    checkpoint = open_checkpoint(copy)
    file = copy / weight_map(copy)[TABLE]
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=f"{file.name}: truncated"):
        fill_tower(recorder(checkpoint), checkpoint.tower_tensors())


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"not json", "no safetensors header"),
        (b"[1, 2]", "no safetensors header"),
        (b'{"x": {"dtype": "F32"}}', "no safetensors header"),
        (b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "does not take 4 bytes"),
        (b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "x: shape (-1,)"),
        (b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}', "x: shape (2,)"),
        (b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [64, 72]}}', "truncated"),
    ],
)
def test_a_broken_header(copy: Path, header: bytes, said: str) -> None:
    file = copy / weight_map(copy)[TABLE]
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refused(copy, file.name, said)


def test_something_else_named_safetensors(copy: Path) -> None:
    file = copy / weight_map(copy)[TABLE]
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(copy, file.name, "not a safetensors file")


def test_tensor_the_index_promises_is_not_there(copy: Path) -> None:
    edit_shard(copy, NORM, lambda _: None)
    refused(copy, "names tensors not there", f"{NORM} in {weight_map(copy)[NORM]}")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64])
def test_wrong_dtype(copy: Path, dtype: torch.dtype) -> None:
    edit_shard(copy, TABLE, lambda tensor: tensor.to(dtype))
    refused(copy, TABLE, "F64, F32, F16, BF16", "quantised")


def test_two_towers(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    folder = single_file(tiny_qwen3_vl, tmp_path / "one")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    names = [name for name in tensors if ".visual." in name]
    tensors |= {f"draft.{name}": tensors[name].clone() for name in names}
    save_file(tensors, file)
    said = f"'draft.model.visual.' ({len(names)} tensors) and 'model.visual.' ({len(names)}"
    refused(folder, "more than one such tower", said)


def test_some_names_of_a_tower_in_another_network(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    folder = single_file(tiny_qwen3_vl, tmp_path / "one")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["audio.blocks.0.norm1.weight"] = torch.zeros(8)
    tensors["audio.patch_embed.proj.weight"] = torch.zeros(8)
    save_file(tensors, file)
    load_all(folder)


def test_one_name_in_two_files(copy: Path) -> None:
    (copy / INDEX).unlink()
    save_file({NORM: torch.zeros(96)}, copy / "model-00004-of-00003.safetensors")
    refused(copy, f"more than once: {NORM}")


def test_no_vision_tensors(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    folder = single_file(
        tiny_qwen3_vl, tmp_path / "one", lambda name: None if "visual" in name else name
    )
    refused(folder, "no vision tensors", "names start with lm_head, model")


def test_names_that_are_no_towers_are_said(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    folder = single_file(
        tiny_qwen3_vl,
        tmp_path / "one",
        lambda name: re.sub(r".*visual\.(.*)\.(.*)", r"visual.stage.\1_.\2", name),
    )
    refused(folder, "no vision tensors", "patch_embed", "the closest are visual.stage.")


def test_pickled_weights(copy: Path) -> None:
    for file in [*copy.glob("*.safetensors"), copy / INDEX]:
        file.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"x")
    refused(copy, "pytorch_model.bin", "no safetensors")


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", 3, ""])
def test_an_index_that_leads_elsewhere(copy: Path, shard: Any) -> None:
    data = json.loads((copy / INDEX).read_text())
    data["weight_map"][TABLE] = shard
    (copy / INDEX).write_text(json.dumps(data))
    refused(copy, INDEX, repr(shard))


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", None, "holds no config.json"),
        ("config.json", "{", "config.json: is not JSON"),
        ("config.json", "[]", "config.json: must hold a JSON object"),
        ("config.json", '{"model_type": "qwen3_vl"}', "config.json: the config of model_type"),
        (
            "config.json",
            '{"model_type": "bert"}',
            "config.json: model_type 'bert' is not supported",
        ),
        ("preprocessor_config.json", None, "holds no preprocessor_config.json"),
        (
            "preprocessor_config.json",
            "{}",
            "preprocessor_config.json: the preprocessor config holds",
        ),
        ("preprocessor_config.json", "\xff", "preprocessor_config.json: is not JSON"),
        (INDEX, "{}", "no weight_map"),
        (INDEX, "", "is not JSON"),
    ],
)
def test_broken_descriptions(copy: Path, file: str, content: str | None, said: str) -> None:
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_text(content, encoding="latin-1")
    refused(copy, "broken", said)


def test_configs_that_disagree(copy: Path) -> None:
    data = json.loads((copy / "preprocessor_config.json").read_text()) | {"patch_size": 14}
    (copy / "preprocessor_config.json").write_text(json.dumps(data))
    refused(copy, "config.json says patch_size 16, preprocessor_config.json says patch_size 14")


# Folders that are something else


def test_the_cache_of_the_hub_is_no_checkpoint(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--Qwen--Some-VL" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(tiny_qwen3_vl)
    refused(snapshot.parents[1], "holds no config.json", "id, Qwen/Some-VL, or", str(snapshot))
    refused(tmp_path / "hub", "holds no config.json; it is the hub's cache", "Qwen/Some-VL")
    refused(tmp_path, "holds no config.json; it is the hub's cache", "Qwen/Some-VL")
    refused(snapshot.parent, "holds no config.json; there is one in 0123abc")
    load_all(snapshot)


def test_an_adapter_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Some-VL"}')
    (tmp_path / "adapter_model.safetensors").touch()
    refused(tmp_path, "holds no config.json; it is an adapter", "'Qwen/Some-VL'")


def test_no_such_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.json").write_text("{}")
    refused(tmp_path / "nowhere", "nowhere: no such folder")
    refused("./a/b/c", "./a/b/c: no such folder, and no hub id")
    refused("file.json", "file.json: is a file")
    (tmp_path / "config.json").write_text("{}")  # of the folder that "" would be
    for no_name in ("", 5, None, b"file.json"):
        refused(no_name, f"{no_name!r}: expected a folder, or a hub id")
    for name in ("x" * 5000, "owner/" + "x" * 5000, "./" + "x" * 250):
        message = refused(name, f"{name[:100]}...")
        assert len(message) < 400, message
