"""A folder encoded by several ranks: shared work, one fate, and a rerun with another world size."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.commands import Vitrt, vitrt  # noqa: F401
from tests.support.ranks import run_ranks, start_ranks, wait_for
from tests.support.shards import write_parquet, write_tar
from vitrt import FeatureStore, VisionEncoder
from vitrt.checkpoint.opened import open_checkpoint
from vitrt.config import RuntimeConfig
from vitrt.job.encode import encode_folder
from vitrt.job.options import EncodeOptions
from vitrt.job.progress import Progress
from vitrt.job.ranks import Alone
from vitrt.job.stop import Stop
from vitrt.parallel.watchdog import PeerFailedError
from vitrt.sources.inputs import Inputs
from vitrt.store.lock import FolderLock
from vitrt.store.manifest import iter_manifest, manifests

IMAGES = 70


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(3)
    for index in range(IMAGES):
        height, width = rng.integers(40, 240, 2)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        (folder / f"{index % 3}").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index % 3}" / f"{index:03}.png")
    return folder


def encode(ranks: int, model: Path, photos: Path, output: Path, *more: str) -> tuple[int, str]:
    return run_ranks(ranks, *command(model, photos, output), *more)


def command(model: Path, photos: Path, output: Path) -> list[str]:
    choices = ["--device", "cpu", "--shard-mib", "0.1", "--max-batch-tokens", "300"]
    return ["-m", "vitrt", "encode", str(model), str(photos), "--output", str(output), *choices]


def listed(output: Path) -> Counter[str]:
    """How often each image is in a manifest."""
    return Counter(entry.id for path in manifests(output) for entry in iter_manifest(path))


def assert_whole(output: Path, model: Path, photos: Path) -> None:
    """Every image exactly once, with the features of one process."""
    ids = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
    assert listed(output) == Counter(ids)
    encoder = VisionEncoder.from_pretrained(model, device="cpu")
    store = FeatureStore(output)
    for image_id in ids[:: len(ids) // 10]:
        (expected,) = encoder.encode([photos / image_id])
        actual = store[image_id].embeddings
        assert float((actual - expected.embeddings).norm() / expected.embeddings.norm()) < 1e-5


def test_killed_rank_ends_the_job_and_another_world_completes_it(
    tiny_qwen3_vl: Path,
    photos: Path,
    tmp_path: Path,
    vitrt: Vitrt,  # noqa: F811
):
    """kill -9 of a data-parallel rank; then tensor parallel; then alone."""
    output = tmp_path / "features"
    job = start_ranks(2, *command(tiny_qwen3_vl, photos, output))
    wait_for(lambda: output.exists() and len(listed(output)) >= 5)
    os.kill(rank_process(job.pid, 1), signal.SIGKILL)
    text, _ = job.communicate(timeout=60)
    assert job.returncode != 0, text
    first = listed(output)
    assert 5 <= len(first) < IMAGES and set(first.values()) == {1}

    code, text = encode(2, tiny_qwen3_vl, photos, output, "--tp", "2")
    assert code == 0, text
    assert_whole(output, tiny_qwen3_vl, photos)

    done = vitrt(*command(tiny_qwen3_vl, photos, output)[2:])
    assert done.code == 0 and f"{IMAGES} were there already" in done.out + done.err
    assert_whole(output, tiny_qwen3_vl, photos)


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_of_a_group(victim: int, tiny_qwen3_vl: Path, photos: Path, tmp_path: Path):
    """The others are inside a collective, and end as well."""
    output = tmp_path / "features"
    job = start_ranks(2, *command(tiny_qwen3_vl, photos, output), "--tp", "2")
    wait_for(lambda: output.exists() and len(listed(output)) >= 5)
    os.kill(rank_process(job.pid, victim), signal.SIGKILL)
    text, _ = job.communicate(timeout=60)
    assert job.returncode != 0, text
    assert "this should not have happened" not in text
    assert set(listed(output).values()) == {1}


def test_ranks_share_the_images_of_a_tar_and_a_table(
    tiny_qwen3_vl: Path, photos: Path, tmp_path: Path
):
    """What the first rank lists, the others load."""
    names = [record.id for record in Inputs([photos])]
    images = {name: (photos / name).read_bytes() for name in names}
    inputs = tmp_path / "shards"
    inputs.mkdir()
    write_tar({name: images[name] for name in names[:40]}, inputs / "a.tar")
    rest = {name: images[name] for name in names[40:]} | {"broken": b"no image"}
    write_parquet(rest, inputs / "b.parquet", rows=7)
    output = tmp_path / "features"
    code, text = encode(2, tiny_qwen3_vl, inputs, output)
    assert code != 0 and "exitcode  : 3" in text, text  # an image was skipped
    ids = [f"a.tar/{name.removesuffix('.png')}" for name in names[:40]]
    ids += [f"b.parquet/{row}" for row in range(len(names) - 40)]
    assert listed(output) == Counter(ids)
    assert all((output / f"manifest-0000{rank}.jsonl").stat().st_size for rank in range(2))
    store = FeatureStore(output)
    encoder = VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cpu")
    for image_id, name in list(zip(ids, names, strict=True))[::9]:
        (expected,) = encoder.encode([photos / name])
        actual = store[image_id].embeddings
        assert float((actual - expected.embeddings).norm() / expected.embeddings.norm()) < 1e-5
    errors = "".join(path.read_text() for path in output.glob("errors-*"))
    assert f'"b.parquet/{len(names) - 40}"' in errors and errors.count("\n") == 1


def test_error_of_one_rank_ends_all_and_is_named(tiny_qwen3_vl: Path, photos: Path, tmp_path: Path):
    output = tmp_path / "features"
    names = [str(path) for path in sorted(photos.rglob("*.png"))]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    names[20:20] = [str(broken)]
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n")
    model = tiny_qwen3_vl
    code, text = run_ranks(
        2, *command(model, Path("@" + str(tmp_path / "list.txt")), output), "--on-error", "fail"
    )
    assert code != 0
    lines = [line for line in text.splitlines() if "error: " in line]
    assert "broken.png" in lines[0], text
    assert set(listed(output).values()) <= {1}


def test_all_ranks_of_a_group_hear_that_one_lacks_memory(
    tiny_qwen3_vl: Path, photos: Path, tmp_path: Path
):
    """The others are inside a sum with it: none waits, and each says the same."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "from vitrt.cli import main\n"
        "from vitrt.encoder import VisionEncoder\n"
        "run, calls = VisionEncoder.run_prepared, []\n"
        "def short(self, images, request):\n"
        "    calls.append(images)\n"
        "    if os.environ['RANK'] == '1' and len(calls) == 3:\n"
        "        raise MemoryError('no page is left')\n"
        "    return run(self, images, request)\n"
        "VisionEncoder.run_prepared = short\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    output = tmp_path / "features"
    arguments = command(tiny_qwen3_vl, photos, output)[2:]
    code, text = run_ranks(2, str(program), *arguments, "--tp", "2")
    assert code != 0
    reason = "does not fit on cpu (tp = 2)"
    assert reason in text and "no page is left" in text
    assert "another rank of this one's group is gone" in text or text.count(reason) > 1, text
    assert "this should not have happened" not in text
    assert set(listed(output).values()) <= {1}


def test_the_folder_is_free_again_where_ranks_do_not_meet(
    tiny_qwen3_vl: Path, photos: Path, tmp_path: Path
):
    class Broken(Alone):
        size = 2

        def gather(self, value: object) -> list[object]:
            raise PeerFailedError("rank 1 failed: it says")

    for rank in (0, 1):
        ranks = Broken()
        ranks.rank = rank
        with pytest.raises(PeerFailedError) as caught:
            encode_folder(
                open_checkpoint(tiny_qwen3_vl),
                RuntimeConfig(device="cpu"),
                Inputs([photos]),
                tmp_path / "features",
                EncodeOptions(),
                progress=Progress(),
                stop=Stop(),
                ranks=ranks,
            )
        assert not list((tmp_path / "features").glob(".lock-*.json")), "of a lock that is held"
        with FolderLock(tmp_path / "features", rank):
            assert caught.tb is not None  # whose frames hold whatever was left to them


def test_ranks_that_cannot_be_arranged(
    tiny_qwen3_vl: Path,
    photos: Path,
    tmp_path: Path,
    vitrt: Vitrt,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    """Each rank finds it out by itself, before any of them meet."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    done = vitrt(*command(tiny_qwen3_vl, photos, tmp_path / "none")[2:], "--tp", "3")
    assert done.code == 1 and "tp = 3 does not divide the 2 ranks" in done.err
    assert not (tmp_path / "none").exists()


def rank_process(launcher: int, rank: int) -> int:
    """The process id of a rank that the process `launcher` started."""
    for folder in Path("/proc").iterdir():
        try:
            status = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            environment = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if int(status[1]) == launcher and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"rank {rank} is not running")
