"""Encoders among torch's and Python's own tools: compiled, copied, pickled, forked, in workers."""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from vitrt import VisionEncoder
from vitrt.parallel.context import SINGLE

GRIDS = [[(1, 4, side)] for side in (4, 6, 8, 10)] + [[(2, 4, 4), (1, 6, 4)]]


@pytest.fixture(params=["tiny_qwen2_5_vl", "tiny_qwen3_vl"])
def encoder(request: pytest.FixtureRequest) -> VisionEncoder:
    return VisionEncoder.from_pretrained(request.getfixturevalue(request.param), device="cpu")


def values(encoder: VisionEncoder, grids: Any) -> torch.Tensor:
    patches = sum(t * h * w for t, h, w in grids)
    draw = torch.Generator().manual_seed(patches)
    return torch.randn(patches, encoder.config.patch_dim, generator=draw)


def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


class Graphs:
    """A compiler that counts what it is given, and runs it as it is."""

    def __init__(self) -> None:
        self.operators: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.operators += [str(n.target) for n in graph.graph.nodes if n.op.startswith("call")]
        return graph.forward


def test_a_compiled_caller_works_at_every_grid(encoder: VisionEncoder) -> None:
    """The compiler gets what surrounds the encoder, and sees nothing of it."""
    graphs = Graphs()
    torch._dynamo.reset()
    scaled = torch.compile(lambda p, g: encoder(p * 1, g).embeddings * 2, backend=graphs)
    for grids in GRIDS:
        pixels = values(encoder, grids)
        want = encoder(pixels, grids).embeddings * 2
        assert torch.equal(scaled(pixels, grids), want)
        assert torch.equal(scaled(pixels, torch.tensor(grids)), want)
    assert {name.split(".")[-1] for name in graphs.operators} <= {"mul", "<built-in function mul>"}
    whole = torch.compile(lambda: encoder.encode([photo()])[0].embeddings + 1, backend=graphs)
    assert torch.equal(whole(), encoder.encode([photo()])[0].embeddings + 1)
    assert len(graphs.operators) < 50


def saved(encoder: VisionEncoder) -> VisionEncoder:
    file = io.BytesIO()
    torch.save(encoder, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e)), saved],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_an_encoder_of_its_own(encoder: VisionEncoder, duplicate: Any) -> None:
    want = encoder.encode([photo()])[0]  # locks and caches are in use
    other = duplicate(encoder)
    (got,) = other.encode([photo()])
    assert torch.equal(got.embeddings, want.embeddings)
    assert other.name == encoder.name and other.runtime == encoder.runtime
    with torch.no_grad():
        for parameter in other.tower.parameters():
            parameter.zero_()
    assert torch.equal(encoder.encode([photo()])[0].embeddings, want.embeddings)


def test_a_rank_of_several_says_why_it_is_not_copied(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder.engine, "parallel", replace(SINGLE, dp_size=2))
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="one of 2 ranks.*load one in each process"):
            duplicate(encoder)


def in_child(encoder: VisionEncoder, threads: int, results: Any) -> None:
    torch.set_num_threads(threads)
    try:
        results.put(float(encoder.encode([photo()])[0].embeddings.sum()))
    except RuntimeError as error:
        results.put(str(error))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_gets_an_answer(encoder: VisionEncoder) -> None:
    """Of several threads none are left in it, and what waits for them would hang."""
    want = float(encoder.encode([photo()])[0].embeddings.sum())
    fork = multiprocessing.get_context("fork")
    results: Any = fork.SimpleQueue()
    for threads in (2, 1):
        child = fork.Process(target=in_child, args=(encoder, threads, results))
        child.start()
        child.join(60)
        alive = child.is_alive()
        child.kill()
        assert not alive, "the child hangs"
        got = results.get()
        if threads == 1:
            assert got == pytest.approx(want, rel=1e-5)
        else:
            assert "made before the process was forked" in str(got) and "spawn" in str(got)


class Photos(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, encoder: VisionEncoder) -> None:
        self.encoder = encoder

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.encoder.encode([photo()])[0].embeddings


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader_encode(encoder: VisionEncoder, start: str) -> None:
    (want,) = encoder.encode([photo()])
    loader = DataLoader(
        Photos(encoder), batch_size=2, num_workers=1, multiprocessing_context=start, timeout=120
    )
    (batch,) = loader
    for got in batch:
        torch.testing.assert_close(got, want.embeddings, rtol=1e-5, atol=1e-5)
