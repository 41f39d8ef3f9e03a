"""Only the bytes that matter: a tower fetched out of its shards by HTTP range requests.

Qwen3-VL-235B is 470 GB and its tower 1.2 GB. The shards' headers say where the tower's tensors lie;
their bytes go into one safetensors file of our own in the hub's cache for assets, laid out in the
order in which they are fetched. huggingface_hub's own parser of remote headers is not used: from a
server that ignores ranges it reads the whole shard, and it tries nothing again.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but loaded lazily
    WeakFileLock,
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    tqdm,
)

from vitrt.checkpoint.partial_file import PartialFile
from vitrt.checkpoint.shards import CheckpointError, TensorInfo, tensors_of
from vitrt.checkpoint.tower_files import SINGLE, ShardNames, TowerSearch
from vitrt.tensor_file import (
    LENGTH_BYTES,
    TensorFileError,
    build_header,
    header_length,
    parse_header,
)

logger = logging.getLogger(__name__)

# Base of every error of the HTTP client that huggingface_hub is built on: httpx's or httpx2's.
TRANSPORT_ERROR: Any = HfHubHTTPError.__bases__[0]
RETRIES = 5  # in a row, without a byte in between
FIRST_WAIT = 1.0  # seconds, doubled after every failure in a row
LONGEST_WAIT = 300.0  # the hub's rate limits are counted over five minutes
WHOLE_SHARE = 0.5  # a tower that is more of its shards than this is not worth the requests
_RETRIED = (408, 429, 500, 502, 503, 504)


class RangesRefusedError(Exception):
    """The server does not serve parts of this file."""


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Neighbouring bytes of a shard."""

    shard: str
    begin: int
    end: int


class RangeReader:
    """Parts of the files of one commit of a repository."""

    def __init__(self, repo: str, commit: str, token: str | bool | None) -> None:
        self.repo = repo
        self.commit = commit
        self.sizes: dict[str, int] = {}  # of whole files, known once a part was read
        self._headers = build_hf_headers(token=token, library_name="vitrt")
        self._headers["Accept-Encoding"] = "identity"  # a part of compressed bytes is of no use

    def header(self, shard: str) -> dict[str, TensorInfo]:
        """The tensors of a shard: two small requests."""
        start = b"".join(self.stream(ByteRange(shard, 0, LENGTH_BYTES)))
        size, file = self.sizes[shard], Path(shard)
        try:
            end = LENGTH_BYTES + header_length(start, file, size)
            text = b"".join(self.stream(ByteRange(shard, LENGTH_BYTES, end)))
            return tensors_of(parse_header(text, file, size), file)
        except TensorFileError as error:
            raise CheckpointError(str(error)) from error

    def stream(self, part: ByteRange) -> Iterator[bytes]:
        """The bytes of a part as they come; a transfer that ends early carries on where it ended.

        Raises RangesRefusedError, or the last failure once RETRIES attempts brought nothing.
        """
        at, failures = part.begin, 0
        while at < part.end:
            asked_wait = 0.0
            problem: Exception = CheckpointError(f"{part.shard}: the transfer ended early")
            try:
                with self._request(part.shard, at, part.end) as response:
                    asked_wait = _asked_wait(response.headers)
                    self._check(response, part.shard, at)
                    for piece in response.iter_raw():
                        piece = piece[: part.end - at]
                        at += len(piece)
                        failures = 0
                        yield piece
            except TRANSPORT_ERROR as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                if status is not None and status not in _RETRIED:
                    raise
                problem = error
            if at < part.end:
                failures += 1
                if failures > RETRIES:
                    raise problem
                wait = min(asked_wait or FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT)
                logger.warning("%s: %s; again in %.1f s", part.shard, problem, wait)
                time.sleep(wait)

    def _request(self, shard: str, begin: int, end: int) -> Any:
        url = hf_hub_url(self.repo, shard, revision=self.commit)
        headers = self._headers | {"Range": f"bytes={begin}-{end - 1}"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        return get_session().stream("GET", url, headers=headers, timeout=timeout)

    def _check(self, response: Any, shard: str, begin: int) -> None:
        if response.status_code in (200, 416):
            raise RangesRefusedError(f"{shard}: HTTP {response.status_code} to a range request")
        hf_raise_for_status(response)
        found = re.fullmatch(
            r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", "").strip()
        )
        if not found or int(found[1]) != begin:
            raise RangesRefusedError(f"{shard}: the server sent another range than was asked for")
        size = int(found[2])
        if self.sizes.setdefault(shard, size) != size:
            raise CheckpointError(f"{shard}: its size changed from {self.sizes[shard]} to {size}")


def _asked_wait(headers: Mapping[str, str]) -> float:
    """Seconds the server asks to wait, by Retry-After or the hub's RateLimit; 0 if it does not."""
    seconds = headers.get("Retry-After", "")
    if not seconds.isdigit():
        reset = re.search(r"\br=0;t=(\d+)", headers.get("RateLimit", ""))
        seconds = reset[1] if reset else "0"
    return float(seconds)


def fetch_tower(
    reader: RangeReader, search: TowerSearch, shards: ShardNames | None, folder: Path
) -> Path:
    """The tower as one file in `folder`: there already, resumed, or fetched.

    `shards` is what the index says; None for a repository with one file. Raises RangesRefusedError
    where whole shards must be fetched instead, or where they are hardly more than the tower.
    """
    target = folder / SINGLE
    with WeakFileLock(folder / f"{SINGLE}.lock"):  # the ranks of one machine start together
        if target.is_file():
            return target
        headers = {file: reader.header(file) for file in sorted(shards or [SINGLE])}
        if shards is None:
            shards = search.by_shard((name, SINGLE) for name in headers[SINGLE])
        tensors = search.collect(shards, headers)
        nbytes = sum(info.nbytes for info in tensors.values())
        whole = sum(reader.sizes[file] for file in shards)
        if nbytes > WHOLE_SHARE * whole:
            raise RangesRefusedError(f"the tower is {nbytes} of its shards' {whole} bytes")
        logger.info("%s: fetching %d of %d bytes", reader.repo, nbytes, whole)
        in_order = sorted(tensors.items(), key=lambda item: (item[1].file, item[1].offset))
        _download(reader, dict(in_order), target)
    return target


def _download(reader: RangeReader, tensors: Mapping[str, TensorInfo], target: Path) -> None:
    """Write `tensors`, in the order of their shards, into `target`, resuming a partial file."""
    layout = {name: (info.dtype, info.shape) for name, info in tensors.items()}
    start = build_header(layout, {"format": "pt"})
    total = len(start) + sum(info.nbytes for info in tensors.values())
    # A partial file of another layout must not be carried on with.
    digest = hashlib.sha256(start).hexdigest()[:16]
    with (
        PartialFile(target.with_name(f"{target.name}.{digest}.partial")) as file,
        tqdm(total=total, desc=f"{reader.repo} vision tower", unit="B", unit_scale=True) as bar,
    ):
        if not file.size:
            file.write(start)
        bar.update(file.size)
        for part in _remaining(_byte_ranges(tensors.values()), file.size - len(start)):
            for piece in reader.stream(part):
                file.write(piece)
                bar.update(len(piece))
        assert file.size == total
        file.finish(target)
    for stale in target.parent.glob(f"{target.name}.*.partial*"):
        stale.unlink()


def _byte_ranges(tensors: Iterable[TensorInfo]) -> list[ByteRange]:
    """Tensors that are neighbours in their shard make one part: one request."""
    ranges: list[ByteRange] = []
    for info in tensors:
        shard, end = info.file.name, info.offset + info.nbytes
        if ranges and ranges[-1].shard == shard and ranges[-1].end == info.offset:
            ranges[-1] = replace(ranges[-1], end=end)
        elif info.nbytes:
            ranges.append(ByteRange(shard, info.offset, end))
    return ranges


def _remaining(ranges: Iterable[ByteRange], done: int) -> Iterator[ByteRange]:
    """What is left of `ranges` when their first `done` bytes are there."""
    for part in ranges:
        skipped = min(done, part.end - part.begin)
        done -= skipped
        if part.begin + skipped < part.end:
            yield replace(part, begin=part.begin + skipped)
