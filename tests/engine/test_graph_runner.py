"""Graphs keyed by buckets: what fits where, inert padding, and replays equal to eager forwards."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor

from tests.support.checkpoints import tiny_checkpoint
from tests.support.graphs import FakePool
from vitrt import VisionEncoder
from vitrt.engine.batch import PixelValues
from vitrt.engine.buckets import Buckets, GraphKey, default_buckets
from vitrt.engine.eager_runner import EagerRunner
from vitrt.engine.graph_cache import Recording
from vitrt.engine.graph_pool import GraphPool
from vitrt.engine.graph_runner import GraphRunner
from vitrt.engine.recording import _Recorder
from vitrt.engine.request import Request
from vitrt.layers.side_stream import SideStream
from vitrt.models.packed_plan import PlanLayout, pack_plan, view_plan
from vitrt.models.plan import ForwardPlan
from vitrt.parallel.context import ParallelContext
from vitrt.parallel.symmetric_memory import SymmetricMemory

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]


@pytest.mark.parametrize("most", [64, 1000, 1024, 4096, 8192, 65536])
def test_bucket_steps(most: int):
    buckets = default_buckets(most)
    assert buckets[:3] == (16, 32, 64) and buckets[-1] <= most
    assert list(buckets) == sorted(set(buckets))
    for low, high in pairwise(buckets):
        assert high - low <= (64 if high <= 1024 else low / 8)
    assert most - buckets[-1] <= max(64, most / 8)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("grids", [[(1, 8, 8)], [(2, 6, 10), (1, 2, 2)], [(1, 14, 18)]], ids=str)
def test_padding_is_inert(folder: Path, grids):
    """The same tower with room to spare, every padded row NaN: real rows come out the same."""
    encoder = VisionEncoder.from_pretrained(folder, device="cpu")
    plan = encoder.tower.plan(grids)
    values = torch.randn(plan.num_patches, encoder.config.patch_dim)
    if plan.patch_order is not None:
        values = values[torch.from_numpy(plan.patch_order)]
    exact_layout = PlanLayout.exact(plan)
    bucket = plan.num_patches + 100
    roomy = PlanLayout.bucket(plan, bucket, 17)
    assert roomy.fits(plan)

    def run(layout: PlanLayout, patches: Tensor, padded: bool):
        buffer = pack_plan(plan, layout, origins=None, pinned=False)
        views = view_plan(buffer, layout, plan, padded=padded)
        with torch.inference_mode():
            return encoder.tower(patches, views, encoder.engine.attention)

    exact = run(exact_layout, values, padded=False)
    poisoned = torch.full((bucket, values.shape[1]), torch.nan)
    poisoned[: len(values)] = values
    padded = run(roomy, poisoned, padded=True)
    tokens = sum(plan.tokens)
    torch.testing.assert_close(padded.embeddings[:tokens], exact.embeddings, rtol=1e-5, atol=1e-5)
    if exact.deepstack is not None:
        torch.testing.assert_close(
            padded.deepstack[:, :tokens], exact.deepstack, rtol=1e-5, atol=1e-5
        )


class LateStream:
    """A side stream that is as late as one may be."""

    def __init__(self) -> None:
        self.left: list[partial[object]] = []

    def run(self, work: Callable[[Tensor], object], x: Tensor) -> None:
        self.left.append(partial(work, x))

    def __enter__(self) -> LateStream:
        return self

    def __exit__(self, *error: object) -> None:
        for work in self.left:
            work()


def test_what_runs_beside_the_blocks_may_be_late(folder: Path):
    encoder = VisionEncoder.from_pretrained(folder, device="cpu")
    runner = cpu_runner(encoder)
    plan = encoder.tower.plan([(2, 6, 10), (1, 2, 2)])
    layout = PlanLayout.exact(plan)
    views = view_plan(
        pack_plan(plan, layout, origins=None, pinned=False), layout, plan, padded=False
    )
    patches = torch.randn(plan.num_patches, encoder.config.patch_dim)
    late = LateStream()
    got = runner.forward(patches, views, runner.attention, side_stream=cast("SideStream", late))
    want = runner.forward(patches, views, runner.attention)
    assert torch.equal(got.embeddings, want.embeddings)
    if want.deepstack is None:
        assert not late.left
    else:
        assert len(late.left) == len(want.deepstack)
        assert torch.equal(got.deepstack, want.deepstack)


@pytest.mark.parametrize(("capturable", "tp_size"), [(True, 1), (False, 1), (True, 2)])
def test_only_whole_graphs_of_one_rank_have_work_beside(
    runner: GraphRunner, monkeypatch: pytest.MonkeyPatch, capturable: bool, tp_size: int
):
    """What ends a graph in its middle, or sums over ranks, has no side stream."""
    side_stream = LateStream()
    monkeypatch.setattr(FakePool, "side_stream", side_stream)
    monkeypatch.setattr(type(runner.attention.full), "capturable", capturable)
    runner.parallel = replace(runner.parallel, tp_size=tp_size)
    monkeypatch.setattr(ParallelContext, "agree_max", lambda self, value: value)
    given = []
    forward = runner.forward

    def watched(*arguments: Any) -> Any:
        given.append(arguments[-1])
        return forward(*arguments[:-1])

    monkeypatch.setattr(runner, "forward", watched)
    runner.warmup([64])
    assert given and set(given) == {side_stream if capturable and tp_size == 1 else None}


def test_a_plan_that_does_not_fit_is_refused(folder: Path):
    encoder = VisionEncoder.from_pretrained(folder, device="cpu")
    plan = encoder.tower.plan([(1, 4, 4)] * 5)
    assert PlanLayout.bucket(plan, 80, 5).fits(plan)
    assert not PlanLayout.bucket(plan, 79, 5).fits(plan)
    assert not PlanLayout.bucket(plan, 80, 4).fits(plan)
    if plan.windows is not None:
        assert not replace(PlanLayout.bucket(plan, 80, 5), windows=4).fits(plan)


def test_graphs_asked_for_without_a_gpu_are_refused(folder: Path):
    with pytest.raises(ValueError, match="cuda_graphs=True needs a CUDA device"):
        VisionEncoder.from_pretrained(folder, device="cpu", cuda_graphs=True)


def cpu_runner(encoder: VisionEncoder) -> GraphRunner:
    """What loads the static inputs; only recording needs a GPU."""
    return GraphRunner(encoder.tower, encoder.engine.attention, limit_bytes=1 << 20)


def load(runner: GraphRunner, plan: ForwardPlan, batch: PixelValues) -> None:
    attention = runner.attention_for(plan)
    layout = runner.buckets.key(plan, attention).layout(plan, attention)
    runner._load(64, plan, layout, attention, batch)


def test_memory_made_in_inference_mode_can_be_written_outside(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """What lasts from one call to the next: static inputs, results of splits, buffers of sums."""
    encoder = VisionEncoder.from_pretrained(folder, device="cpu")
    runner = cpu_runner(encoder)
    plan = encoder.tower.plan([(1, 4, 4)])
    monkeypatch.setattr(symm_mem, "empty", torch.empty)
    monkeypatch.setattr(symm_mem, "rendezvous", lambda buffer, group: None)
    group = cast("dist.ProcessGroup", SimpleNamespace(size=lambda: 2))
    symmetric = SymmetricMemory(group, encoder.device, always=True)
    recorder = _Recorder(None)

    def places() -> tuple[Tensor, ...]:
        summed = symmetric.buffer("block", (16, 64), torch.float32)
        assert summed is not None
        return *runner._inputs.of(64), recorder.out_for(torch.zeros(16, 3, 2, 8)), summed

    with torch.inference_mode():
        first = [place.data_ptr() for place in places()]
    assert [place.zero_().data_ptr() for place in places()] == first
    batch = PixelValues(torch.randn(16, encoder.config.patch_dim), [(1, 4, 4)])
    load(runner, plan, batch)


def test_a_plan_that_lies_there_is_not_copied_again(folder: Path):
    runner = cpu_runner(VisionEncoder.from_pretrained(folder, device="cpu"))
    plans = [runner.tower.plan([(1, side, side)]) for side in (4, 6)]
    layouts = [PlanLayout.bucket(plan, 64, 8) for plan in plans]
    packed = [
        pack_plan(plan, layout, origins=None, pinned=False)
        for plan, layout in zip(plans, layouts, strict=True)
    ]

    def load(index: int) -> Tensor:
        _, buffer = runner._inputs.load(64, packed[index], layouts[index], plans[index], None)
        return buffer[: packed[index].numel()]

    for index in (0, 1, 0):
        assert torch.equal(load(index), packed[index])
    load(0).fill_(-1)
    assert (load(0) == -1).all()
    assert torch.equal(load(1), packed[1]) and torch.equal(load(0), packed[0])


def test_static_inputs_keep_no_history(folder: Path):
    encoder = VisionEncoder.from_pretrained(folder, device="cpu")
    runner = cpu_runner(encoder)
    plan = encoder.tower.plan([(1, 4, 4)])
    values = torch.randn(16, encoder.config.patch_dim, requires_grad=True)
    batch = PixelValues(values, [(1, 4, 4)])
    load(runner, plan, batch)
    assert not runner._inputs.of(64)[0].requires_grad


def test_a_recording_refused_by_itself_costs_no_other(folder: Path):
    encoder = VisionEncoder.from_pretrained(folder, device="cpu")
    runner = cpu_runner(encoder)
    graphs = runner.graphs
    graphs.limit_bytes = 100
    pool = SimpleNamespace(nbytes=40)

    def add(bucket: int, nbytes: int) -> GraphKey:
        key = GraphKey(bucket, 8, ("sdpa", None))
        graphs.add(key, cast("Recording", SimpleNamespace(nbytes=nbytes)), cast("GraphPool", pool))
        return key

    first, second = add(64, 20), add(128, 20)
    huge = add(192, 61)
    assert list(graphs.recordings) == [first, second] and graphs.refused == {huge}
    third = add(256, 40)  # fits by itself, so the least recently used goes
    assert list(graphs.recordings) == [second, third] and graphs.refused == {huge}
    assert runner.stats.graph_bytes == 100
    pool.nbytes = 90  # what the newest needs of the pool stays there until all are gone
    add(320, 20)
    assert not graphs.recordings and graphs.pool is None and runner.stats.graph_bytes == 0


def test_graphs_need_triton(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Without it the functions that stand in ask the device for numbers, which no graph may."""
    engine = VisionEncoder.from_pretrained(folder, device="cpu").engine
    engine.device = torch.device("cuda")
    assert isinstance(engine._make_runner(engine.attention), GraphRunner)
    monkeypatch.setattr("vitrt.engine.engine.HAVE_TRITON", False)
    assert type(engine._make_runner(engine.attention)) is EagerRunner
    engine.runtime = replace(engine.runtime, cuda_graphs=True)
    with pytest.raises(ValueError, match="needs Triton"):
        engine._make_runner(engine.attention)


def test_warmup_takes_numbers_of_patches(folder: Path, monkeypatch: pytest.MonkeyPatch):
    runner = cpu_runner(VisionEncoder.from_pretrained(folder, device="cpu"))
    recorded: list[int] = []
    monkeypatch.setattr(runner, "_record", lambda key, *rest: recorded.append(key.bucket))
    runner.warmup([1001, 64])
    assert set(recorded) == {64, 1024} and recorded == sorted(recorded, reverse=True)
    for patches in (0, -64, 4097, True):
        with pytest.raises(ValueError, match=rf"no graph holds {patches} patches; .* up to 4096"):
            runner.warmup([64, patches])


def test_callers_on_several_streams_take_turns(folder: Path):
    class Stream:
        def __init__(self) -> None:
            self.waited_for: list[Stream] = []

        def wait_stream(self, other: Stream) -> None:
            self.waited_for.append(other)

    runner = cpu_runner(VisionEncoder.from_pretrained(folder, device="cpu"))
    first, second = Stream(), Stream()
    for stream in (first, first, second, first):
        runner._inputs.take_turns(stream)
    assert second.waited_for == [first] and first.waited_for == [second]


# On a GPU

DTYPE = torch.bfloat16


def poison_free_memory() -> None:
    """Leave NaN in what the allocator hands out next."""
    blocks = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(16)]
    del blocks


def random_grids(rng: random.Random, most: int) -> list[tuple[int, int, int]]:
    grids: list[tuple[int, int, int]] = []
    left = rng.randint(16, most)
    while left >= 4 and len(grids) < 12:
        h = 2 * rng.randint(1, 24)
        w = 2 * rng.randint(1, max(1, min(40, left // (2 * h))))
        t = rng.choice([1, 1, 1, 1, 2, 3])
        if t * h * w > left:
            break
        grids.append((t, h, w))
        left -= t * h * w
    return grids or [(1, 2, 2)]


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["auto", "triton", "sdpa"])
def test_replays_equal_eager_forwards(folder: Path, attention: str):
    graphs = VisionEncoder.from_pretrained(
        folder, device="cuda", attention=attention, cuda_graphs=True
    )
    eager = VisionEncoder.from_pretrained(
        folder, device="cuda", attention=attention, cuda_graphs=False
    )
    runner = graphs.engine.runner
    assert isinstance(runner, GraphRunner)
    runner.buckets = Buckets(runner.tower, default_buckets(4096))
    rng = random.Random(attention)
    for _ in range(60):
        grids = random_grids(rng, 3000)
        patches = sum(t * h * w for t, h, w in grids)
        values = torch.randn(patches, graphs.config.patch_dim, device="cuda")
        poison_free_memory()
        runner._inputs.of(4096)[0].fill_(torch.nan)
        got, want = graphs(values, grids), eager(values, grids)
        assert not got.embeddings.isnan().any()
        error = (got.embeddings.float() - want.embeddings.float()).norm()
        assert error <= 1e-2 * want.embeddings.float().norm(), grids
        if want.deepstack is not None:
            error = (got.deepstack.float() - want.deepstack.float()).norm()
            assert error <= 1e-2 * want.deepstack.float().norm(), grids
    stats = graphs.stats()
    assert stats.hits.total() > 20
    assert stats.captures <= len(stats.hits) * 2 + 1


@pytest.mark.gpu
def test_same_token_count_other_boundaries(folder: Path):
    """A graph replayed with another image's boundaries: PEERS, sglang PR 16902."""
    encoder = VisionEncoder.from_pretrained(folder, device="cuda", cuda_graphs=True)
    eager = VisionEncoder.from_pretrained(folder, device="cuda", cuda_graphs=False)
    values = torch.randn(256, encoder.config.patch_dim, device="cuda")
    layouts = [[(1, 16, 16)], [(4, 8, 8)], [(1, 2, 128)], [(1, 8, 16), (2, 8, 8)], [(1, 16, 16)]]
    for grids in [*layouts, *reversed(layouts)]:
        got, want = encoder(values, grids).embeddings, eager(values, grids).embeddings
        assert (got - want).float().norm() <= 1e-2 * want.float().norm()


@pytest.mark.gpu
def test_results_are_never_overwritten_by_the_next_replay(folder: Path):
    encoder = VisionEncoder.from_pretrained(folder, device="cuda", cuda_graphs=True)
    values = [torch.randn(64, encoder.config.patch_dim, device="cuda") for _ in range(6)]
    outputs = [encoder(v, [(1, 8, 8)]) for v in values]
    kept = [output.embeddings.clone() for output in outputs]
    for v in values:
        encoder(v.flip(0), [(1, 8, 8)])
    assert encoder.stats().hits.total() >= 10
    for output, copy in zip(outputs, kept, strict=True):
        assert torch.equal(output.embeddings, copy)


@pytest.mark.gpu
def test_memory_limit_evicts_and_stays_right(folder: Path):
    encoder = VisionEncoder.from_pretrained(
        folder, device="cuda", cuda_graphs=True, graph_memory_mib=0
    )
    values = torch.randn(64, encoder.config.patch_dim, device="cuda")
    first = [encoder(values, [(1, 8, 8)]).embeddings for _ in range(4)]
    assert encoder.stats().graph_bytes == 0
    assert all(torch.equal(first[0], other) for other in first)


@pytest.mark.gpu
def test_a_forward_never_waits_for_the_device(folder: Path):
    """Nothing inside a forward may synchronise, eager or replayed."""
    for cuda_graphs in (False, True):
        encoder = VisionEncoder.from_pretrained(folder, device="cuda", cuda_graphs=cuda_graphs)
        values = torch.randn(2 * 140, encoder.config.patch_dim, device="cuda")
        grids = [(2, 14, 10)]
        for _ in range(3):
            encoder(values, grids)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            encoder(values, grids)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# The cache of recordings, with a pool that records nothing and replays by running the forward


@pytest.fixture
def runner(tiny_qwen3_vl: Path, monkeypatch: pytest.MonkeyPatch) -> GraphRunner:
    """Room for two recordings; the largest bucket, which is recorded first, is out of the way."""
    monkeypatch.setattr("vitrt.engine.graph_runner.GraphPool", FakePool)
    encoder = VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cpu")
    made = GraphRunner(encoder.tower, encoder.engine.attention, limit_bytes=75)
    made.graphs.pool = cast("GraphPool", FakePool(encoder.device, encoder.dtype))
    return made


def forward(runner: GraphRunner, side: int) -> Tensor:
    plan = runner.tower.plan([(1, side, side)])
    values = torch.ones(plan.num_patches, runner.tower.config.patch_dim)
    return runner.run(plan, PixelValues(values, plan.grids)).embeddings


def test_a_working_set_over_the_limit_is_not_recorded_at_every_miss(
    runner: GraphRunner, caplog: pytest.LogCaptureFixture
):
    sides = (8, 12, 14)  # three buckets where two recordings fit
    rounds = 40
    for _ in range(rounds):
        for side in sides:
            forward(runner, side)
    # Recording at every miss would be one for each forward but the first ones.
    assert runner.stats.captures < 3 * 8
    assert runner.stats.eager["evicted before"] > 0 and runner.stats.hits.total() > rounds
    said = [text for text in caplog.messages if "graph_memory_mib sets the limit" in text]
    assert 1 <= len(said) <= len(sides)
    before = runner.stats.captures
    for _ in range(rounds):
        for side in sides:
            forward(runner, side)
    assert runner.stats.captures - before <= 3


def test_a_working_set_within_the_limit_is_recorded_once(runner: GraphRunner):
    expected = forward(runner, 8)
    for _ in range(5):
        torch.testing.assert_close(forward(runner, 8), expected)
        forward(runner, 12)
    assert runner.stats.captures == 2 and runner.stats.evictions == 0
    assert runner.stats.hits.total() == 9


def test_the_class_of_a_batch_is_asked_once(runner: GraphRunner, monkeypatch: pytest.MonkeyPatch):
    asked = []
    refusal = Buckets.refusal

    def spy(self: Buckets, plan: ForwardPlan, request: Request) -> str | None:
        asked.append(plan.grids)
        return refusal(self, plan, request)

    monkeypatch.setattr(Buckets, "refusal", spy)
    monkeypatch.setattr("vitrt.engine.graph_runner._MOST_CLASSES", 2)
    for side in (8, 8, 12, 8):
        forward(runner, side)
    assert [grids[0][1] for grids in asked] == [8, 12]
    forward(runner, 14)  # no room for a third: all are asked anew
    runner.attention = replace(runner.attention, scheduled=not runner.attention.scheduled)
    forward(runner, 14)
    forward(runner, 14)
    assert [grids[0][1] for grids in asked] == [8, 12, 14, 14]


def test_without_graph_memory_nothing_is_recorded(runner: GraphRunner):
    runner.graphs.limit_bytes = 0
    for _ in range(3):
        forward(runner, 8)
    assert runner.stats.captures == 0 and runner.stats.eager == {"no graph memory": 3}
    runner.warmup()
    assert runner.stats.captures == 0


def test_warmup_of_no_bucket_records_none(runner: GraphRunner):
    runner.warmup([])
    assert runner.stats.captures == 0
    runner.warmup([64])
    assert runner.stats.captures > 0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("NCCL error: unhandled cuda error"),
    ],
    ids=["torch", "cublas", "nccl"],
)
def test_a_recording_that_fails_leaves_its_batches_to_eager_forwards(
    runner: GraphRunner,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def fail(self: FakePool, record: object) -> None:
        raise error

    monkeypatch.setattr(FakePool, "record", fail)
    told: list[int] = []
    monkeypatch.setattr(
        type(runner.parallel), "agree_max", lambda self, value: told.append(value) or value
    )
    expected = forward(runner, 8)
    for _ in range(3):
        torch.testing.assert_close(forward(runner, 8), expected)
    assert runner.stats.eager == {"first of its bucket": 1, "not recorded: memory": 3}
    assert told == [1], "every rank of a group is told, once"
    assert str(error) in caplog.text


def test_another_ranks_failure_is_this_ones(runner: GraphRunner, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(runner.parallel), "agree_max", lambda self, value: max(value, 1))
    forward(runner, 8)
    forward(runner, 8)
    assert not runner.graphs.recordings and runner.stats.captures == 0
    runner.parallel = ParallelContext(tp_rank=0, tp_size=2)
    monkeypatch.setattr(type(runner.parallel), "agree_max", lambda self, value: 2)
    forward(runner, 12)
    with pytest.raises(RuntimeError, match="a rank of this group failed in a forward of 192"):
        forward(runner, 12)


def test_hidden_states_of_the_last_layer_go_through_graphs(
    runner: GraphRunner, monkeypatch: pytest.MonkeyPatch
):
    """Beside the merged tokens, as transformers' towers give them; grids of one class share."""
    load, live = runner._load, []

    def loading(bucket: int, plan: ForwardPlan, *rest: Any) -> tuple[Tensor, Tensor]:
        live[:] = [plan]
        return load(bucket, plan, *rest)

    # Attention here reads lengths on the host, which a replay takes from its own batch.
    monkeypatch.setattr(runner, "_load", loading)
    monkeypatch.setattr(
        "vitrt.engine.graph_runner.view_plan",
        lambda buffer, layout, plan, padded: view_plan(buffer, layout, live[0], padded=padded),
    )
    eager = EagerRunner(runner.tower, runner.attention)
    depth = runner.tower.config.depth
    last = Request((depth - 1,))
    for grids in ([(1, 4, 16)], [(1, 8, 8)], [(2, 4, 6)], [(1, 6, 10)]):
        plan = runner.tower.plan(grids)
        pixels = torch.randn(plan.num_patches, runner.tower.config.patch_dim)
        batch = PixelValues(pixels, grids)
        got, want = runner.run(plan, batch, last), eager.run(plan, batch, last)
        for ours, exact in zip(got.hidden, want.hidden, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.embeddings, want.embeddings, rtol=1e-5, atol=1e-5)
        assert not runner.run(plan, batch).hidden
        assert not runner.run(plan, batch, Request((0, depth - 1))).hidden[0].isnan().any()
        runner.run(plan, batch, Request((depth - 1,), merged=False))
    assert runner.stats.hits[64] == 3 + 3
    assert runner.stats.eager == {"first of its bucket": 2, "hidden states asked for": 8}


@pytest.mark.gpu
def test_recorded_hidden_states_follow_their_batch(folder: Path):
    """Their way back from window order is computed inside the graph, from each batch's plan."""
    graphs = VisionEncoder.from_pretrained(folder, device="cuda", cuda_graphs=True)
    eager = VisionEncoder.from_pretrained(folder, device="cuda", cuda_graphs=False)
    for grids in ([(1, 16, 16)], [(1, 8, 32)], [(1, 12, 20)], [(4, 8, 8)], [(1, 16, 16)]) * 2:
        patches = sum(t * h * w for t, h, w in grids)
        values = torch.randn(patches, graphs.config.patch_dim, device="cuda")
        got = graphs(values, grids, return_hidden=True)
        want = eager(values, grids, return_hidden=True)
        for ours, exact in ((got.hidden, want.hidden), (got.embeddings, want.embeddings)):
            assert (ours - exact).float().norm() <= 1e-2 * exact.float().norm()
    assert graphs.stats().hits.total() >= 8
