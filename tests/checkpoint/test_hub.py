"""Checkpoints from a hub that runs on the loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import reference_tower
from tests.support.hub_server import COMMIT, FakeHub, serve
from tests.support.recorder import Recorder, recorder
from vitrt.checkpoint import hub_ranges
from vitrt.checkpoint.opened import open_checkpoint
from vitrt.checkpoint.shards import CheckpointError, read_header
from vitrt.engine.loader import fill_tower

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tiny_qwen3_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three-shard checkpoint with so much language model that the tower is a tenth of it."""
    folder = Path(shutil.copytree(tiny_qwen3_vl, tmp_path_factory.mktemp("hub") / "repo"))
    index = json.loads((folder / INDEX).read_text())
    names = index["weight_map"]
    tower = sum(
        info.nbytes
        for shard in sorted(set(names.values()))
        for name, info in read_header(folder / shard).items()
        if "visual." in name
    )
    for number, shard in enumerate(sorted(set(names.values()))):
        tensors = load_file(folder / shard)
        filler = f"model.language_model.filler.{number}.weight"
        tensors[filler] = torch.randint(0, 255, (int(2.7 * tower),), dtype=torch.uint8)
        names[filler] = shard
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that serves `source`, and an empty cache."""
    with serve(FakeHub(source)) as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "home" / "assets"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.setattr(hub_ranges, "FIRST_WAIT", 0.01)
        yield server


def load(hub: FakeHub, **options: Any) -> Recorder:
    checkpoint = open_checkpoint(hub.repo, **options)
    tower = recorder(checkpoint)
    fill_tower(tower, checkpoint.tower_tensors())
    return tower


def check(tower: Recorder, source: Path) -> None:
    expected = reference_tower(source).state_dict()
    assert tower.kept.keys() == expected.keys()
    assert all(torch.equal(tower.kept[name], expected[name]) for name in expected)


def tower_bytes(source: Path) -> int:
    return sum(info.nbytes for info in open_checkpoint(source).tensors.values())


def total_bytes(source: Path) -> int:
    return sum(file.stat().st_size for file in source.glob("*.safetensors"))


def refused(hub: FakeHub, *said: str, **options: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(hub, **options)
    for part in said:
        assert part in str(caught.value)


# Only the bytes that matter


def test_bytes_fetched(hub: FakeHub) -> None:
    """Bar: at most 11% of a repository whose tower is 10% of it."""
    share = tower_bytes(hub.folder) / total_bytes(hub.folder)
    assert 0.08 < share < 0.1
    check(load(hub), hub.folder)
    assert hub.shard_bytes() <= 0.11 * total_bytes(hub.folder)
    assert hub.shard_bytes() < 1.01 * tower_bytes(hub.folder)
    asked = {path.rsplit("/", 1)[1] for _, path, _ in hub.requests if path.endswith(".safetensors")}
    names = json.loads((hub.folder / INDEX).read_text())["weight_map"]
    vision = {shard for name, shard in names.items() if "visual." in name}
    assert asked == vision | {"model.safetensors"}  # asked for, as transformers does, and not there


def test_the_second_time_nothing_is_fetched(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    load(hub)
    hub.forget()
    check(load(hub), hub.folder)
    assert hub.shard_bytes() == 0
    hub.forget()
    check(load(hub, local_files_only=True), hub.folder)
    assert not hub.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check(load(hub), hub.folder)
    assert not hub.requests


def test_resumed_after_a_cut(hub: FakeHub) -> None:
    """Within one run: the transfer carries on behind the last byte."""
    hub.cut_after = [100_000, 300_000]
    check(load(hub), hub.folder)
    assert not hub.cut_after
    assert hub.shard_bytes() < 1.01 * tower_bytes(hub.folder)


def test_resumed_in_another_run(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_ranges, "RETRIES", 0)
    hub.cut_after = [700_000]
    refused(hub, hub.repo, ".safetensors")
    assert hub.shard_bytes() > 700_000
    before = hub.shard_bytes()
    check(load(hub), hub.folder)
    assert hub.shard_bytes() < 1.01 * tower_bytes(hub.folder)
    assert hub.shard_bytes() > before


def test_a_process_that_is_killed_resumes(hub: FakeHub, tmp_path: Path) -> None:
    """A real process with the hub's environment variables, killed in the middle of the transfer."""
    hub.pause = 0.05
    code = (
        "import sys; from vitrt.checkpoint.opened import open_checkpoint; "
        "open_checkpoint(sys.argv[1])"
    )
    home = tmp_path / "env-home"
    environment = os.environ | {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_TOKEN": "secret"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", code, hub.repo]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while hub.shard_bytes() < 500_000:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    partial = next(home.glob("assets/vitrt/**/*.partial")).stat().st_size
    hub.pause = 0.0
    hub.forget()
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    assert hub.shard_bytes() < 1.01 * tower_bytes(hub.folder) - partial + 65536
    assert hub.tokens == {"secret"}
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    hub.forget()
    subprocess.run(command, env=offline, check=True)
    assert not hub.requests


def test_a_partial_file_of_another_layout_is_not_used(hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "assets" / "vitrt" / "someone--tower" / COMMIT
    folder.mkdir(parents=True)
    (folder / "model.safetensors.0123456789abcdef.partial").write_bytes(b"x" * 100_000)
    check(load(hub), hub.folder)
    assert not list(folder.glob("*.partial"))


def interrupted(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The partial file of a transfer that ended after 700,000 bytes."""
    monkeypatch.setattr(hub_ranges, "RETRIES", 0)
    hub.cut_after = [700_000]
    refused(hub, hub.repo, ".safetensors")
    (partial,) = (tmp_path / "home").rglob("*.partial")
    assert partial.stat().st_size > 700_000
    hub.forget()
    return partial


def test_a_power_cut_leaves_zeros(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may keep its size and lose its last bytes, which no write had brought to the disk."""
    partial = interrupted(hub, tmp_path, monkeypatch)
    size = partial.stat().st_size
    with partial.open("r+b") as file:
        file.truncate(size - 200_000)
        file.truncate(size)
    check(load(hub), hub.folder)
    assert hub.shard_bytes() < tower_bytes(hub.folder) - 300_000, "nothing was carried on with"


@pytest.mark.parametrize("what", ["partial of full size", "partial", "journal", "no journal"])
def test_only_what_verifies_is_resumed(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    partial = interrupted(hub, tmp_path, monkeypatch)
    journal = partial.with_name(f"{partial.name}.journal")
    if what == "no journal":  # as earlier versions left it
        journal.unlink()
    elif what == "partial of full size":
        partial.write_bytes(bytes(tower_bytes(hub.folder) + 100_000))
    else:
        file = journal if what == "journal" else partial
        file.write_bytes(bytes(file.stat().st_size))
    check(load(hub), hub.folder)
    assert [path.name for path in partial.parent.iterdir() if "partial" in path.name] == []


def test_a_server_that_gives_less_than_asked_for(hub: FakeHub) -> None:
    hub.longest_range = 200_000
    check(load(hub), hub.folder)


def test_a_slow_server(hub: FakeHub) -> None:
    hub.pause = 0.02
    check(load(hub), hub.folder)


def test_a_server_that_hangs(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(hub_ranges, "RETRIES", 1)
    hub.pause = 1.0
    refused(hub, hub.repo, ".safetensors")


@pytest.mark.parametrize("how", ["ignored", "416"])
def test_whole_shards_where_ranges_are_refused(hub: FakeHub, how: str) -> None:
    hub.ranges = how != "ignored"
    hub.range_status = 416 if how == "416" else None
    check(load(hub), hub.folder)
    names = json.loads((hub.folder / INDEX).read_text())["weight_map"]
    vision = {shard for name, shard in names.items() if "visual." in name}
    for shard in vision:
        assert hub.sent[shard] >= (hub.folder / shard).stat().st_size
    assert not any(hub.sent[shard] for shard in set(names.values()) - vision)
    hub.forget()
    check(load(hub, local_files_only=True), hub.folder)


def test_whole_shards_that_are_there_are_used(hub: FakeHub) -> None:
    hub.ranges = False
    load(hub)
    hub.ranges = True
    hub.forget()
    check(load(hub), hub.folder)
    assert hub.shard_bytes() == 0


@pytest.mark.parametrize(
    "headers", [{}, {"Retry-After": "0"}, {"RateLimit": '"resolvers";r=0;t=0'}]
)
@pytest.mark.parametrize("status", [429, 503])
def test_trying_again(hub: FakeHub, status: int, headers: dict[str, str]) -> None:
    hub.fail_first = [(status, headers)] * 3
    check(load(hub), hub.folder)
    assert not hub.fail_first


def test_how_long_the_server_says_to_wait() -> None:
    assert hub_ranges._asked_wait({"Retry-After": "7"}) == 7
    assert hub_ranges._asked_wait({"RateLimit": '"api";r=0;t=55'}) == 55
    assert hub_ranges._asked_wait({"RateLimit": '"api";r=9;t=55'}) == 0
    assert hub_ranges._asked_wait({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}) == 0


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500])
def test_failures_that_last(hub: FakeHub, status: int) -> None:
    """Trying again is for what may pass; the rest is said at once."""
    hub.fail_first = [(status, {})] * 50
    refused(hub, hub.repo, "-of-00003.safetensors", str(status))
    attempts = 50 - len(hub.fail_first)
    assert attempts == (1 if status in (401, 403, 404) else 1 + hub_ranges.RETRIES)


def test_a_single_file(hub: FakeHub, tmp_path: Path) -> None:
    tensors = {}
    for shard in hub.folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    folder = tmp_path / "single"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(hub.folder / name, folder / name)
    source, hub.folder = hub.folder, folder
    check(load(hub), source)
    assert hub.shard_bytes() < 1.01 * tower_bytes(source)


def renamed(source: Path, folder: Path, old: str, new: str) -> Path:
    """The repository with other names for its tensors."""
    shutil.copytree(source, folder)
    index = json.loads((folder / INDEX).read_text())
    names = index["weight_map"]
    index["weight_map"] = {name.replace(old, new): shard for name, shard in names.items()}
    (folder / INDEX).write_text(json.dumps(index))
    for shard in set(names.values()):
        tensors = load_file(folder / shard)
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("prefix", ["vlm.model.visual.", "thinker.visual."])
def test_a_tower_inside_another_model(hub: FakeHub, tmp_path: Path, prefix: str) -> None:
    """Found by its own names, in the index alone: only the shards that hold it are asked for."""
    source = hub.folder
    hub.folder = renamed(source, tmp_path / "repo", "model.visual.", prefix)
    check(load(hub), source)
    assert hub.shard_bytes() < 1.01 * tower_bytes(source)
    names = json.loads((hub.folder / INDEX).read_text())["weight_map"]
    others = set(names.values()) - {names[name] for name in names if name.startswith(prefix)}
    assert others and not any(hub.sent[shard] for shard in others)
    check(load(hub, local_files_only=True), source)


def test_a_tower_in_fp8(hub: FakeHub, tmp_path: Path) -> None:
    """Codes and scales are fetched, and nothing else."""
    hub.folder = Path(shutil.copytree(hub.folder, tmp_path / "repo"))
    index = json.loads((hub.folder / INDEX).read_text())
    names = index["weight_map"]
    expected = {}
    for shard in sorted(set(names.values())):
        tensors = load_file(hub.folder / shard)
        for name in [name for name in tensors if name.endswith(".attn.qkv.weight")]:
            codes = tensors[name].to(torch.float8_e4m3fn)
            scales = torch.rand(len(codes), 1)
            tensors |= {name: codes, f"{name}_scale": scales}
            names[f"{name}_scale"] = shard
            expected[name.removeprefix("model.visual.")] = codes.float() * scales
        save_file(tensors, hub.folder / shard, metadata={"format": "pt"})
    (hub.folder / INDEX).write_text(json.dumps(index))
    found = dict(open_checkpoint(hub.repo).tower_tensors())
    assert hub.shard_bytes() < 1.01 * tower_bytes(hub.folder)
    assert len(expected) == 6
    assert all(torch.equal(found[name][...], expected[name]) for name in expected)


def test_an_adapter(hub: FakeHub, tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    hub.folder = tmp_path / "lora"
    hub.folder.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    (hub.folder / "adapter_config.json").write_text(json.dumps(config))
    bias = {"base_model.model.model.visual.merger.norm.bias": torch.full((96,), 7.0)}
    save_file(bias, hub.folder / "adapter_model.safetensors")
    opened = open_checkpoint(tiny_qwen3_vl, adapter=hub.repo)
    assert torch.equal(
        dict(opened.tower_tensors())["merger.norm.bias"][...], torch.full((96,), 7.0)
    )


def test_a_repository_of_towers_is_fetched_whole(hub: FakeHub, tiny_qwen3_vl: Path) -> None:
    """Where the tower is most of the bytes, the hub's own cache is the better place."""
    hub.folder = tiny_qwen3_vl
    names = json.loads((tiny_qwen3_vl / INDEX).read_text())["weight_map"]
    check(load(hub), tiny_qwen3_vl)
    for shard in {shard for name, shard in names.items() if "visual." in name}:
        assert hub.sent[shard] >= (hub.folder / shard).stat().st_size


# What is looked for where


def test_cache_dir_holds_everything(hub: FakeHub, tmp_path: Path) -> None:
    cache = tmp_path / "elsewhere"
    load(hub, cache_dir=cache)
    assert list(cache.rglob("config.json"))
    assert list(cache.rglob("model.safetensors"))
    assert not (tmp_path / "home").exists()


def test_description_alone_downloads_no_weights(hub: FakeHub) -> None:
    checkpoint = open_checkpoint(hub.repo, weights=False)
    assert checkpoint.vision_config().depth == 6
    assert not hub.shard_bytes()
    assert not any(path.endswith(INDEX) for _, path, _ in hub.requests)


def test_processor_config_will_do(hub: FakeHub, tmp_path: Path) -> None:
    hub.folder = Path(shutil.copytree(hub.folder, tmp_path / "repo"))
    data = json.loads((hub.folder / "preprocessor_config.json").read_text())
    (hub.folder / "preprocessor_config.json").unlink()
    (hub.folder / "processor_config.json").write_text(json.dumps({"image_processor": data}))
    checkpoint = open_checkpoint(hub.repo, weights=False)
    assert checkpoint.preprocessor_config().patch_size == 16


def test_processor_config_comes_first_here_too(hub: FakeHub, tmp_path: Path) -> None:
    """Of two files that differ, the hub's are read in the order of a folder's."""
    hub.folder = Path(shutil.copytree(hub.folder, tmp_path / "repo"))
    data = json.loads((hub.folder / "preprocessor_config.json").read_text())
    nested = {"image_processor": data | {"image_mean": [0.1, 0.2, 0.3]}}
    (hub.folder / "processor_config.json").write_text(json.dumps(nested))
    config = open_checkpoint(hub.repo, weights=False).preprocessor_config()
    assert config.image_mean == (0.1, 0.2, 0.3) != tuple(data["image_mean"])


def test_token_is_sent(hub: FakeHub) -> None:
    hub.token = "secret"
    refused(hub, hub.repo, "no such repository, or it is private", hub.url)
    check(load(hub, token="secret"), hub.folder)


def test_token_stays_with_the_hub(hub: FakeHub) -> None:
    """Files lie on other hosts that the hub redirects to; the token is not theirs."""
    hub.token, hub.cdn = "secret", True
    check(load(hub, token="secret"), hub.folder)
    assert hub.cdn_tokens == {None}


def test_a_cache_that_cannot_be_written(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only cache that holds whole shards will do."""
    hub.ranges = False
    load(hub)

    def read_only(**_: Any) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("vitrt.checkpoint.hub.cached_assets_path", read_only)
    check(load(hub, local_files_only=True), hub.folder)


def test_offline_and_missing(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = str(tmp_path / "home" / "hub")
    refused(hub, hub.repo, "config.json", cache, "HF_HUB_OFFLINE", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(hub, hub.repo, "(revision main)", "config.json", cache, "offline mode is on")
    assert not hub.requests
    with pytest.raises(CheckpointError, match="^there is no folder checkpoints/foo; as a hub id, "):
        open_checkpoint("checkpoints/foo")


def test_offline_with_nothing_but_the_configs(hub: FakeHub, tmp_path: Path) -> None:
    open_checkpoint(hub.repo, weights=False)
    cache = str(tmp_path / "home" / "hub")
    refused(hub, "model.safetensors", INDEX, cache, "offline", local_files_only=True)
    with pytest.raises(CheckpointError, match=f"^{hub.repo} "):  # which is no mistyped folder
        load(hub, local_files_only=True)


def test_no_such_things(hub: FakeHub, tmp_path: Path) -> None:
    refused(hub, "someone/tower (revision v9)", "no such revision", hub.url, revision="v9")
    hub.repo = "someone/else"
    with pytest.raises(CheckpointError, match=r"other/repo.*config.json.*no such repository"):
        open_checkpoint("other/repo")
    hub.repo = "someone/tower"
    hub.folder = Path(shutil.copytree(hub.folder, tmp_path / "repo"))
    (hub.folder / INDEX).unlink()
    refused(hub, hub.repo, "holds neither model.safetensors nor", INDEX)
    (hub.folder / "preprocessor_config.json").unlink()
    shutil.rmtree(tmp_path / "home")
    refused(hub, hub.repo, "holds no preprocessor_config.json")
    (hub.folder / "config.json").unlink()
    shutil.rmtree(tmp_path / "home")
    refused(hub, hub.repo, "config.json", "has no such file")


def test_an_adapter_alone(hub: FakeHub, tmp_path: Path) -> None:
    hub.folder = tmp_path / "adapter"
    hub.folder.mkdir()
    config = '{"base_model_name_or_path": "Qwen/Some-VL"}'
    (hub.folder / "adapter_config.json").write_text(config)
    refused(hub, hub.repo, "it is an adapter", "'Qwen/Some-VL'")


def test_gated(hub: FakeHub) -> None:
    hub.gated = True
    refused(hub, hub.repo, "gated", "token")


def test_a_hub_that_is_not_there(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the hub's client tries five times
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    template = nowhere + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    said = (hub.repo, "config.json", nowhere, str(tmp_path / "home" / "hub"))
    refused(hub, "there is no folder someone/tower; as a hub id, ", *said)


def test_a_broken_shard_is_named(hub: FakeHub, tmp_path: Path) -> None:
    hub.folder = Path(shutil.copytree(hub.folder, tmp_path / "repo"))
    names = json.loads((hub.folder / INDEX).read_text())["weight_map"]
    shard = hub.folder / names["model.visual.pos_embed.weight"]
    shard.write_bytes(shard.read_bytes()[:200_000])
    refused(hub, hub.repo, shard.name, "truncated")


def test_spans_join_neighbours_only(hub: FakeHub) -> None:
    infos = open_checkpoint(hub.folder).tensors.values()
    in_order = sorted(infos, key=lambda info: (info.file, info.offset))
    spans = hub_ranges._byte_ranges(in_order)
    assert len(spans) < len(in_order) / 4
    assert sum(span.end - span.begin for span in spans) == tower_bytes(hub.folder)
    for done in (0, 1, 99_999, tower_bytes(hub.folder)):
        rest = list(hub_ranges._remaining(spans, done))
        assert sum(span.end - span.begin for span in rest) == tower_bytes(hub.folder) - done
    assert re.fullmatch(r"model-0000\d-of-00003.safetensors", spans[0].shard)
