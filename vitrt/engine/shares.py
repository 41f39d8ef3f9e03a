"""One list of images, or one long clip, over several copies of a tower.

Full attention never crosses frames, so the work is divided between frames and no activation
travels: each copy takes a run of neighbouring frames that costs about as much as any other's. Only
finished features are exchanged, and only where all ranks want all of them.

Shapes: M merged tokens, O output width, L deepstack levels.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from vitrt.config import Grid
from vitrt.engine.feature_stream import features_of
from vitrt.engine.stages import Stages
from vitrt.features import ImageFeatures, join
from vitrt.models.work import count_flops

if TYPE_CHECKING:
    from vitrt.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring frames of one input."""

    index: int  # of the input
    start: int  # first frame, counted after temporal merging
    stop: int


@dataclass(frozen=True, slots=True)
class PieceFeatures:
    """The features of a piece; those of a whole input where it was not divided."""

    piece: Piece
    features: ImageFeatures


def divide(grids: Sequence[Grid], costs: Sequence[float], parts: int) -> list[list[Piece]]:
    """The frames of all inputs in `parts` runs of about equal cost.

    `costs[i]` is that of one frame of `grids[i]`.
    """
    total = sum(t * cost for (t, _, _), cost in zip(grids, costs, strict=True))
    runs: list[list[Piece]] = [[] for _ in range(parts)]
    spent = 0.0
    for index, ((t, _, _), cost) in enumerate(zip(grids, costs, strict=True)):
        # A frame belongs to the part that its middle falls into.
        owners = [int((spent + (frame + 0.5) * cost) / total * parts) for frame in range(t)]
        spent += t * cost
        for part, frames in itertools.groupby(range(t), key=lambda frame: owners[frame]):
            own = list(frames)
            runs[min(part, parts - 1)].append(Piece(index, own[0], own[-1] + 1))
    return runs


def encode_share(
    engine: Engine, stages: Stages[Piece], grids: Sequence[Grid]
) -> list[PieceFeatures]:
    """This rank's part of inputs of these grids, which every rank gives alike. No communication.

    The parts of all ranks together are every frame of every input once, in their order. Raises the
    error of the first piece of this part that has one.
    """
    flops = {grid: float(count_flops(engine.config, [(1, *grid[1:])]).total) for grid in grids}
    runs = divide(grids, [flops[grid] for grid in grids], engine.parallel.dp_size)
    pieces = runs[engine.parallel.dp_rank]
    return list(map(PieceFeatures, pieces, features_of(stages, pieces)))


def encode_together(
    engine: Engine, stages: Stages[Piece], grids: Sequence[Grid]
) -> list[ImageFeatures]:
    """Features of all inputs, on every rank, in their order. Collective over the ranks.

    Raises what any rank's part raised, on all of them, and ValueError where the ranks were given
    different inputs.
    """
    own: list[PieceFeatures] = []
    problem: Exception | None = None
    try:
        own = encode_share(engine, stages, grids)
    except Exception as error:
        problem = error
    reports: list[Any] = [None] * engine.parallel.dp_size
    report = _report(own, len(grids), problem)
    dist.all_gather_object(reports, report, group=engine.parallel.dp_group)
    if problem is not None:
        raise problem
    for rank, report in enumerate(reports):
        if report["error"] is not None:
            if isinstance(report["error"], ValueError):  # of an image
                raise report["error"]
            raise RuntimeError(f"data-parallel rank {rank} failed: {report['error']}")
    counts = [report["inputs"] for report in reports]
    frames = [piece for report in reports for piece, _, _ in report["pieces"]]
    if len(set(counts)) > 1 or not _is_whole(frames, counts[0]):
        raise ValueError(
            f"encode was given different images on the {len(counts)} data-parallel ranks (they "
            f"had {counts} of them): it shares one list among the ranks. For a list of its own, "
            "give a rank's encoder no `parallel`, or use encode_prepared or stream"
        )
    shared = itertools.groupby(_share(engine, own, reports), key=lambda part: part.piece.index)
    return [join([part.features for part in parts]) for _, parts in shared]


def _report(own: list[PieceFeatures], inputs: int, problem: Exception | None) -> dict[str, Any]:
    return {
        "inputs": inputs,
        "pieces": [(part.piece, part.features.grid_thw, part.features.times) for part in own],
        "error": None if problem is None else _sendable(problem),
    }


def _sendable(error: Exception) -> Exception:
    """The error, or one that says the same where it does not survive the way."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _is_whole(pieces: Sequence[Piece], inputs: int) -> bool:
    """Whether the pieces are the frames of so many inputs, each from its first one on."""
    expected = (0, 0)
    for piece in pieces:
        if (piece.index, piece.start) not in (expected, (expected[0] + 1, 0)):
            return False
        expected = piece.index, piece.stop
    return (pieces[-1].index if pieces else -1) == inputs - 1


def _share(
    engine: Engine, own: list[PieceFeatures], reports: list[dict[str, Any]]
) -> list[PieceFeatures]:
    """The pieces of all ranks, each rank's sent as one tensor [1 + L, M, O]."""
    merge = engine.config.spatial_merge_size
    levels = len(engine.config.deepstack_visual_indexes)
    everything: list[PieceFeatures] = []
    for rank, report in enumerate(reports):
        tokens = [prod(grid) // merge**2 for _, grid, _ in report["pieces"]]
        if not tokens:
            continue
        shape = (1 + levels, sum(tokens), engine.config.out_hidden_size)
        rows = torch.empty(shape, dtype=engine.dtype, device=engine.device)
        if rank == engine.parallel.dp_rank:
            torch.cat([part.features.embeddings for part in own], out=rows[0])
            for level in range(levels):
                torch.cat([_level(part.features, level) for part in own], out=rows[1 + level])
        dist.broadcast(rows, group_src=rank, group=engine.parallel.dp_group)
        parts = rows.split(tokens, dim=1)
        for (piece, grid, times), part in zip(report["pieces"], parts, strict=True):
            deepstack = part[1:] if levels else None
            features = ImageFeatures(part[0], deepstack, grid, merge, times=times)
            everything.append(PieceFeatures(piece, features))
    return everything


def _level(features: ImageFeatures, level: int) -> Tensor:
    assert features.deepstack is not None
    return features.deepstack[level]
