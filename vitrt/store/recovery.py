"""Make an output folder consistent before a run: whatever moment the last one died at.

Afterwards every manifest line is whole, every listed shard is complete and holds exactly its listed
images, each image is listed once, and nothing else of ours lies in the folder.
"""

from __future__ import annotations

import logging
from pathlib import Path

from vitrt.messages import counted
from vitrt.store.compaction import drop_lines, forget_replaced, strip
from vitrt.store.durable import FULL, OutputError, flush_folder, remove, truncate
from vitrt.store.feature_shard import read_header
from vitrt.store.manifest import ERRORS_NAME, MANIFEST_NAME, SHARD_NAME, TEMPORARY_NAME, matching
from vitrt.store.run_identity import RunIdentity
from vitrt.store.scan import FolderScan
from vitrt.store.shard_numbers import keep_numbers
from vitrt.tensor_file import TensorFileError

logger = logging.getLogger(__name__)


class FolderMismatchError(ValueError):
    """The folder belongs to a run with another model, dtype or pixel limits."""


def check_identity(folder: Path, identity: RunIdentity) -> None:
    """FolderMismatchError, naming each difference, if the folder's features are of another kind."""
    for path in matching(folder, SHARD_NAME):
        try:
            metadata = read_header(path).metadata
        except TensorFileError:
            continue  # an unfinished or broken one says nothing; recovery deals with it
        differences = identity.differences(metadata)
        if differences:
            raise FolderMismatchError(
                f"{folder} holds the features of another run: {'; '.join(differences)}. "
                "Choose another --output, or --overwrite to replace them"
            )
        return


def clear(folder: Path) -> None:
    """Remove everything that runs have written into the folder; other files stay."""
    keep_numbers(folder)
    # Manifests first: without them, shards are leftovers whatever moment this dies at.
    for pattern in (MANIFEST_NAME, ERRORS_NAME, SHARD_NAME, TEMPORARY_NAME):
        paths = matching(folder, pattern)
        for path in paths:
            remove(path)
        if paths:
            flush_folder(folder)


def recover(folder: Path, *, keep_errors: bool = False) -> None:
    """Repair what a killed run or a power cut left; drop the last run's errors, to be retried.

    With `keep_errors`, at the end of a run that lost some of its processes, they stay.

    Where the disk is too full to copy shards without the features that no line names any more,
    those stay: no reader sees them.
    """
    for pattern in (TEMPORARY_NAME,) if keep_errors else (TEMPORARY_NAME, ERRORS_NAME):
        for path in matching(folder, pattern):
            remove(path)
    scan = FolderScan(folder)
    shards = {path.name for path in matching(folder, SHARD_NAME)}
    unlisted = sorted(shards - scan.listed - scan.broken.keys())
    if unlisted or scan.broken or scan.dead:
        keep_numbers(folder)
    for name in unlisted:
        logger.info("removing %s, which the last run did not get to list", name)
        remove(folder / name)
    _say(scan)
    for path, damage in scan.damage.items():
        if damage.torn:
            truncate(path, damage.whole)
    partly_dead = scan.partly_dead | drop_lines(
        folder,
        scan.dead,
        doubled=scan.doubled,
        broken=scan.broken,
        unreadable=[path for path, damage in scan.damage.items() if damage.amid],
    )
    for name in scan.broken:
        remove(folder / name)
    try:
        if scan.dead:
            strip(folder, partly_dead, scan.dead)
            forget_replaced(folder)
    except OutputError as error:
        if error.errno not in FULL:
            raise
        logger.warning("%s keeps features that nothing names any more: %s", folder, error)
    flush_folder(folder)


def _say(scan: FolderScan) -> None:
    for path, damage in scan.damage.items():
        if damage.torn:
            torn = counted(damage.torn, "unfinished line")
            logger.warning("%s: dropping %s of the last run", path, torn)
        if damage.amid:
            logger.warning(
                "%s: dropping %s that cannot be read; what it stood for is encoded again",
                path,
                counted(damage.amid, "line"),
            )
    for name, reason in scan.broken.items():
        logger.warning("dropping %s, its images are encoded again: %s", name, reason)
    if scan.incomplete:
        incomplete = counted(scan.incomplete, "image")
        logger.warning("encoding again what lacks a tensor: %s", incomplete)
