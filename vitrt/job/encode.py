"""`vitrt encode`: a checkpoint, inputs and an output folder -> a finished run.

Everything that can be wrong with the model or the arguments is found out before the folder is
touched. Several ranks share a folder through `Ranks`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitrt.checkpoint.opened import Checkpoint
from vitrt.config import RuntimeConfig
from vitrt.encoder import VisionEncoder
from vitrt.engine.eager_runner import RunnerStats
from vitrt.engine.stages import Stages
from vitrt.images.processor import ImageProcessor
from vitrt.job.identity import request_of, run_identity
from vitrt.job.leader import follow, leading
from vitrt.job.long_clips import LongClips
from vitrt.job.options import EncodeOptions
from vitrt.job.progress import Progress, Snapshot
from vitrt.job.ranks import Alone, Ranks
from vitrt.job.run import Outcome, encode_records, prepare_with
from vitrt.job.stop import Stop
from vitrt.messages import counted
from vitrt.parallel.context import SINGLE, ParallelContext
from vitrt.sources.inputs import Inputs
from vitrt.sources.record import Record
from vitrt.store.compaction import compact
from vitrt.store.durable import discard, flush_folder, make_folder
from vitrt.store.encoded_index import EncodedIndex
from vitrt.store.lock import FolderLock
from vitrt.store.manifest import TEMPORARY_NAME, matching
from vitrt.store.recovery import check_identity, clear, recover
from vitrt.store.run_identity import RunIdentity
from vitrt.store.shard_numbers import ShardNumbers
from vitrt.store.writer import FeatureWriter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did, on all ranks."""

    state: Snapshot
    interrupted: bool

    @classmethod
    def of(cls, reports: Sequence[Mapping[str, Any]]) -> Summary:
        """What all ranks did that reported, the first one's report first."""
        state = Snapshot.total([report["state"] for report in reports], len(reports))
        return cls(state, any(report["interrupted"] for report in reports))


def encode_folder(
    checkpoint: Checkpoint,
    runtime: RuntimeConfig,
    inputs: Inputs,
    output: Path,
    options: EncodeOptions,
    *,
    progress: Progress,
    stop: Stop,
    ranks: Ranks | None = None,
    parallel: ParallelContext = SINGLE,
) -> Summary:
    """Encode every image of `inputs` that `output` does not hold yet.

    Raises:
        ValueError: about the model, the inputs, or a folder of another run; nothing was written.
        OutputError: the disk refused; what was finished before stays valid.
        SkippedImageError: an unusable image, where `options` say to fail.
    """
    ranks = ranks or Alone()
    inputs.check_any()
    identity = run_identity(checkpoint, runtime, options)
    if not options.overwrite:
        check_identity(output, identity)
    encoder = load_encoder(checkpoint, runtime, options, parallel)
    progress.restart()
    with ExitStack() as locked:
        if ranks.rank == 0:
            locked.enter_context(open_output(output, identity, overwrite=options.overwrite))
        ranks.gather(None)
        if ranks.rank > 0:
            locked.enter_context(FolderLock(output, ranks.rank))
        with leading(stages_of(encoder, options), parallel) as stages:
            processor = encoder.processor
            outcome = _run(
                stages, processor, inputs, output, identity, options, progress, stop, ranks
            )
        report = {
            "state": asdict(progress.snapshot()),
            "interrupted": outcome.interrupted,
            "dropped": outcome.dropped,
        }
        _log_statistics(encoder.stats())
        ranks.tell(report["state"])
        reports = ranks.gather(report)
        if ranks.rank == 0 and len(reports) == ranks.size:
            _clean_up(output, reports)
    return Summary.of(reports)


def _clean_up(output: Path, reports: Sequence[Mapping[str, Any]]) -> None:
    """After all ranks: drop what they replaced or lost, and parts of clips that nobody needed."""
    compact(output, [(image_id, shard) for each in reports for image_id, shard in each["dropped"]])
    for path in matching(output, TEMPORARY_NAME):
        discard(path)
    flush_folder(output)


def _log_statistics(stats: RunnerStats) -> None:
    """How forwards ran, for `--verbose`."""
    eager = ", ".join(f"{count} eager ({reason})" for reason, count in stats.eager.items())
    logger.debug("forwards: %d graph replays, %s", stats.hits.total(), eager or "none eager")
    if stats.captures:
        logger.debug(
            "graphs: %d recorded, %d evicted, %.0f MiB, %.1f%% of the replayed rows padding",
            stats.captures,
            stats.evictions,
            stats.graph_bytes / 2**20,
            100 * stats.padding_share,
        )


def follow_leader(
    checkpoint: Checkpoint,
    runtime: RuntimeConfig,
    options: EncodeOptions,
    parallel: ParallelContext,
) -> None:
    """Be one of the ranks that share a tower with the one that runs `encode_folder`."""
    follow(stages_of(load_encoder(checkpoint, runtime, options, parallel), options), parallel)


def load_encoder(
    checkpoint: Checkpoint,
    runtime: RuntimeConfig,
    options: EncodeOptions,
    parallel: ParallelContext = SINGLE,
) -> VisionEncoder:
    """The encoder of a run, warm where `options` say so."""
    encoder = VisionEncoder.from_checkpoint(checkpoint, runtime, parallel)
    if options.warmup and not options.layers:  # forwards that keep hidden states use no graphs
        encoder.warmup()
    return encoder


def stages_of(encoder: VisionEncoder, options: EncodeOptions) -> Stages[Any]:
    """How images become what `options` ask for."""
    return encoder.stages(request_of(options, encoder.config.depth))


def open_output(output: Path, identity: RunIdentity, *, overwrite: bool) -> FolderLock:
    """The folder, made and recovered, and locked."""
    make_folder(output)
    lock = FolderLock(output)
    try:
        if overwrite:
            clear(output)
        check_identity(output, identity)
        recover(output)
    except BaseException:
        lock.release()
        raise
    return lock


def _run(
    stages: Stages[Any],
    processor: ImageProcessor,
    inputs: Inputs,
    output: Path,
    identity: RunIdentity,
    options: EncodeOptions,
    progress: Progress,
    stop: Stop,
    ranks: Ranks,
) -> Outcome:
    encoded = EncodedIndex(output)
    if len(encoded):
        logger.info("%s holds %s already", output, counted(len(encoded), "image"))
    writer = FeatureWriter(
        output,
        identity,
        rank=ranks.rank,
        first_shard=ShardNumbers(output).take(ranks.rank),
        shard_mib=options.shard_mib,
        merge_size=processor.merge_size,
    )
    records: Iterable[Record] = inputs.until(lambda: stop.requested)
    if ranks.size > 1:
        shared = ranks.share(asdict(record) for record in records)
        records = (Record(**values) for values in shared)
    pool = options.pool == "mean"
    return encode_records(
        stages.preparing(prepare_with(processor.prepare, shared=ranks.parts is not None)),
        records,
        writer,
        encoded,
        progress=progress,
        stop=stop,
        workers=options.workers,
        on_error=options.on_error,
        clips=LongClips(ranks.parts, output, pool=pool) if ranks.parts else None,
    )
