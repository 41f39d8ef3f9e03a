"""Several ranks against one process: features, what is read from disk, and who may start at all."""

from __future__ import annotations

import json
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import parallel_program
from tests.support.checkpoints import CONFIGS, FAMILIES, reference_tower, tiny_checkpoint
from tests.support.pipes import make_pipe
from tests.support.ranks import ROOT, run_ranks
from vitrt import ImageError, ParallelContext, VisionEncoder
from vitrt.checkpoint.opened import open_checkpoint
from vitrt.engine.loader import fill_tower
from vitrt.engine.shares import Piece, divide
from vitrt.images.levels import patches_reference
from vitrt.models.config_file import read_vision_config
from vitrt.models.families import build_tower
from vitrt.parallel.context import SINGLE

TOLERANCE = 1e-5  # relative L2, NUMERICS


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


# Features


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("families")
    return {family: tiny_checkpoint(family, base / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    return {
        family: parallel_program.run(VisionEncoder.from_pretrained(folder, device="cpu"))
        for family, folder in folders.items()
    }


@pytest.fixture(scope="module")
def together(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family on 4 ranks: as tp = 4, as tp = 2 x dp = 2 and as dp = 4."""
    out = tmp_path_factory.mktemp("ranks")
    program = str(ROOT / "tests/support/parallel_program.py")
    code, output = run_ranks(4, program, str(out), "cpu", "4,2,1", *map(str, folders.values()))
    assert code == 0, output
    return out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp", [4, 2, 1])
def test_ranks_equal_one_process(family: str, tp: int, alone: dict[str, Any], together: Path):
    for rank in range(4):
        actual = torch.load(together / f"{family}-tp{tp}-{rank}.pt")
        expected = alone[family]
        pairs = [*zip(actual["called"], expected["called"], strict=True)]
        pairs += zip(actual["short"], expected["short"], strict=True)
        for (grid, *ours), (expected_grid, *theirs) in zip(
            actual["encoded"], expected["encoded"], strict=True
        ):
            assert grid == expected_grid
            pairs += zip(ours, theirs, strict=True)
        for ours, theirs in pairs:
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                assert ours.shape == theirs.shape
                assert relative_l2(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_are_every_frame_once(family: str, together: Path):
    pieces = [torch.load(together / f"{family}-tp1-{rank}.pt")["pieces"] for rank in range(4)]
    assert all(pieces), "a rank had nothing to do"
    frames = [
        (index, frame)
        for index, start, stop in chain.from_iterable(pieces)
        for frame in range(start, stop)
    ]
    assert frames == [(0, 0), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]


# Shares


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    "grids",
    [[(100, 20, 30)], [(1, 44, 70)] * 16, [(1, 8, 8), (31, 4, 6), (2, 40, 40), (1, 2, 2)]],
    ids=["clip", "list", "mixed"],
)
def test_shares_are_whole_and_even(grids: list[tuple[int, int, int]], parts: int):
    costs = [float((h * w) ** 1.5) for _, h, w in grids]
    runs = divide(grids, costs, parts)
    assert len(runs) == parts
    frames = [(p.index, f) for run in runs for p in run for f in range(p.start, p.stop)]
    assert frames == [(index, frame) for index, (t, _, _) in enumerate(grids) for frame in range(t)]
    shares = [sum((p.stop - p.start) * costs[p.index] for p in run) for run in runs]
    assert max(shares) <= sum(shares) / parts + max(costs)


def test_shares_of_little_or_nothing():
    assert divide([], [], 3) == [[], [], []]
    assert divide([(1, 4, 4)], [1.0], 2) in ([[Piece(0, 0, 1)], []], [[], [Piece(0, 0, 1)]])


def test_a_pipe_in_a_shared_list_is_the_error_of_its_rank(
    tiny_qwen3_vl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Opening one would wait for ever, on every rank: they plan from what files say."""
    make_pipe(tmp_path / "pipe.png", monkeypatch)
    image = parallel_program.images()[0]
    encoder = VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cpu")
    shared = [image, image, tmp_path / "pipe.png"]
    encoder.engine.parallel = ParallelContext(dp_rank=0, dp_size=2)
    assert [part.piece.index for part in encoder.encode_share(shared)] == [0]
    encoder.engine.parallel = ParallelContext(dp_rank=1, dp_size=2)
    with pytest.raises(ImageError, match=r"pipe\.png.*not a regular file"):
        encoder.encode_share(shared)


def test_a_share_over_the_budget_goes_in_several_forwards(tiny_qwen3_vl: Path):
    """The part of a clip that falls to a rank, like any other clip."""
    clip = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 3), dtype=np.uint8)
    encoder = VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cpu")
    (whole,) = encoder.encode([clip])
    small = VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cpu", max_batch_tokens=40)
    found = []
    for rank in range(2):
        small.engine.parallel = ParallelContext(dp_rank=rank, dp_size=2)
        found += [part.features.embeddings for part in small.encode_share([clip])]
    assert [len(part) for part in found] == [len(whole.embeddings) // 2] * 2
    assert relative_l2(torch.cat(found), whole.embeddings) <= TOLERANCE


# Weights


def context(rank: int, size: int) -> ParallelContext:
    """A rank's place, for what needs no communication."""
    return ParallelContext(tp_rank=rank, tp_size=size)


def bytes_read() -> int:
    """Bytes that this process has read from files."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar: "):
            return int(line.split()[1])
    raise AssertionError("no rchar in /proc/self/io")


class Counting:
    """Stands in for a tensor on disk and counts the bytes asked for."""

    def __init__(self, shape: tuple[int, ...], itemsize: int) -> None:
        self.shape = shape
        self.itemsize = itemsize
        self.nbytes = 0

    def __getitem__(self, index: Any) -> Tensor:
        part = torch.zeros(self.shape)[index]
        self.nbytes += part.numel() * self.itemsize
        return part


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_rank_reads_only_its_slices(family: str, size: int, folders: dict[str, Path]):
    checkpoint = open_checkpoint(folders[family])
    split = 0  # bytes of tensors that are split
    for rank in range(size):
        with torch.device("meta"):
            tower = build_tower(checkpoint.vision_config(), context(rank, size))
        tower = tower.to_empty(device="cpu")
        asked = 0
        for slot in tower.weight_targets():
            counting = Counting(slot.shape, 4)
            slot.store(counting)
            asked += counting.nbytes
            if counting.nbytes < torch.Size(slot.shape).numel() * 4:
                split += counting.nbytes
        for parameter in tower.parameters():
            parameter.data.fill_(torch.nan)
        before = bytes_read()
        fill_tower(tower, checkpoint.tower_tensors())
        # What looking takes is a few hundred bytes.
        assert asked <= bytes_read() - before < asked + 4096
        assert not any(parameter.isnan().any() for parameter in tower.parameters())
    # What is split is read once by all ranks together, and it is nearly everything.
    if size > 1:
        assert 0.75 * checkpoint.num_bytes < split < checkpoint.num_bytes
        assert asked < (1 / size + 0.2) * checkpoint.num_bytes


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_rank_may_hold_padding_alone(family: str, tmp_path: Path):
    """130 units padded to 256: of 4 ranks the third has 2 of them and the fourth none."""
    checkpoint = open_checkpoint(tiny_checkpoint(family, tmp_path, intermediate_size=130))
    for rank in range(4):
        with torch.device("meta"):
            tower = build_tower(checkpoint.vision_config(), context(rank, 4))
        tower = tower.to_empty(device="cpu")
        for parameter in tower.parameters():
            parameter.data.fill_(torch.nan)
        fill_tower(tower, checkpoint.tower_tensors())
        assert not any(parameter.isnan().any() for parameter in tower.parameters())
        down = tower.block(0).mlp.down.weight
        assert down.count_nonzero() == down.shape[0] * (64, 64, 2, 0)[rank]


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.iterdir() if path.is_dir()))
@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_released_towers_split_evenly(name: str, size: int):
    """Parts add up to the whole, and products keep the alignment that tensor cores want."""
    config = read_vision_config(json.loads((CONFIGS / name / "config.json").read_text()))
    if config.num_heads % size:
        pytest.skip(f"{config.num_heads} heads over {size} ranks: test_heads_must_divide")
    with torch.device("meta"):
        whole = build_tower(config)
        part = build_tower(config, context(size - 1, size))
    for (label, ours), (_, full) in zip(
        part.named_parameters(), whole.named_parameters(), strict=True
    ):
        for mine, all_of_it in zip(ours.shape, full.shape, strict=True):
            assert mine == all_of_it or mine * size >= all_of_it, label
        assert all(side % 8 == 0 for side in ours.shape), label


@pytest.mark.parametrize(
    ("name", "size", "heads"), [("qwen3-vl-2b", 3, 16), ("qwen3.5-0.8b", 8, 12)]
)
def test_heads_must_divide(name: str, size: int, heads: int):
    config = read_vision_config(json.loads((CONFIGS / name / "config.json").read_text()))
    said = f"tp = {size} does not divide the {heads} attention heads"
    with pytest.raises(ValueError, match=said), torch.device("meta"):
        build_tower(config, context(0, size))


# Environment


@pytest.fixture
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_without_torchrun_it_is_one_process(no_torchrun):
    assert ParallelContext.from_env() is SINGLE
    with pytest.raises(ValueError, match=r"tp = 2 does not divide the 1 rank"):
        ParallelContext.from_env(tp=2)


def test_tp_must_divide_the_world(no_torchrun):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "0")):
        no_torchrun.setenv(name, value)
    for tp in (3, 0, 8, True):
        with pytest.raises(ValueError, match=rf"tp = {tp} does not divide the 4 rank"):
            ParallelContext.from_env(tp=tp)


def test_half_an_environment_is_refused(no_torchrun):
    no_torchrun.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"RANK set without WORLD_SIZE, LOCAL_RANK"):
        ParallelContext.from_env()


def test_all_reduce_names(no_torchrun):
    with pytest.raises(ValueError, match=r"'ring' is none of auto, nccl, symmetric"):
        ParallelContext.from_env(all_reduce="ring")  # type: ignore[arg-type]


def test_cpu_sums_have_no_symmetric_memory(monkeypatch: pytest.MonkeyPatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="'symmetric' needs GPUs, and device is 'cpu'"):
        ParallelContext.from_env(2, all_reduce="symmetric", device="cpu")
    assert not torch.distributed.is_initialized()


def test_one_process_agrees_with_itself():
    assert SINGLE.agree_max(3) == SINGLE.agree_min(3) == 3
    partial = torch.ones(2)
    assert SINGLE.all_reduce(partial) is partial
    assert SINGLE.partial_out("block", 1, 2, torch.float32) is None


# GPUs


def gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@pytest.fixture(scope="module")
def on_gpus(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything in one job: tp = 4 and tp = 2 x dp = 2 on 4 GPUs, else tp = 2 on 2."""
    if gpus() < 2:
        pytest.skip("needs 2 GPUs")
    ranks, sizes = (4, "4,2") if gpus() >= 4 else (2, "2")
    out = tmp_path_factory.mktemp("gpus")
    program = str(ROOT / "tests/support/parallel_program.py")
    code, output = run_ranks(ranks, program, str(out), "cuda", sizes, *map(str, folders.values()))
    assert code == 0, output
    return out


def transformers_in_bf16(folder: Path, device: str) -> dict[str, Any]:
    """What transformers makes of the program's inputs, named as `parallel_program.run` does."""
    encoder = VisionEncoder.from_pretrained(folder, device="cpu")
    reference = reference_tower(folder, torch.bfloat16).to(device)

    def forward(pixels: torch.Tensor, grids: list[tuple[int, int, int]]) -> list[Any]:
        with torch.inference_mode():
            out = reference(pixels.to(device, torch.bfloat16), torch.tensor(grids, device=device))
        levels = getattr(out, "deepstack_features", None)
        return [out.pooler_output.cpu(), torch.stack(list(levels)).cpu() if levels else None]

    shape = (encoder.config.patch_size, encoder.config.temporal_patch_size)
    encoded = []
    for image in parallel_program.images():
        prepared = encoder.processor.prepare(image)
        table = encoder.table.cpu().numpy()
        pixels = patches_reference(prepared, table, *shape, encoder.config.spatial_merge_size)
        encoded.append(forward(torch.from_numpy(pixels), [prepared.grid_thw]))
    values = parallel_program.pixel_values(encoder.config.patch_dim)
    return {"called": forward(values, parallel_program.GRIDS), "encoded": encoded}


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp", [2, 4])
def test_gpus_equal_one(
    family: str, tp: int, folders: dict[str, Path], alone: dict[str, Any], on_gpus: Path
):
    """bf16 with graphs, sums by each method: the error that transformers has in bf16, plus 5%."""
    if gpus() < tp:
        pytest.skip(f"needs {tp} GPUs")
    rounded, exact = transformers_in_bf16(folders[family], "cuda"), alone[family]
    for rank in range(4 if gpus() >= 4 else 2):
        for _, suffix, _ in parallel_program.VARIANTS["cuda"]:
            actual = torch.load(on_gpus / f"{family}-tp{tp}-{rank}{suffix}.pt")
            assert actual["hits"] > 0, "no graph was replayed"
            triples = [*zip(actual["called"], rounded["called"], exact["called"], strict=True)]
            for every in zip(*(r["encoded"] for r in (actual, rounded, exact)), strict=True):
                triples += zip(*(features[-2:] for features in every), strict=True)
            for ours, theirs, truth in triples:
                if truth is not None:
                    assert relative_l2(ours, truth) <= 1.05 * relative_l2(theirs, truth)


def test_the_benchmark_of_several_gpus_walks_through(tmp_path: Path):
    """Its ranks meet in every collective; on CPUs there is no symmetric memory to time."""
    found = tmp_path / "found.json"
    script = str(ROOT / "scripts/bench/parallel_gpus.py")
    steps = ("--seconds", "120", "2:nccl", "2:symmetric", "messages")
    code, output = run_ranks(2, script, "--tiny", "--json", str(found), *steps)
    assert code == 0, output
    results = json.loads(found.read_text())
    assert [(row["tp"], row["sums"], row["right"]) for row in results["rows"]] == [
        (1, "-", True),
        (2, "nccl", True),
    ]
    assert "2:symmetric cannot be had" in output and len(results["lists_per_second"]) == 2


def test_the_program_uses_several_sizes():
    assert len(set(parallel_program.GRIDS)) == len(parallel_program.GRIDS)
    shapes = [image.shape for image in parallel_program.images()]
    assert all(a != b for a, b in pairwise(shapes)) and any(len(shape) == 4 for shape in shapes)
    assert np.prod(shapes[1][:1]) % 2 == 1
