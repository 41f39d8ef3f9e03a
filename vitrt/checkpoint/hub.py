"""A checkpoint on the hub: fetch its configs, its index, and only the shards with vision tensors.

Everything goes through huggingface_hub, so its cache, its environment (HF_HOME, HF_ENDPOINT,
HF_TOKEN, HF_HUB_OFFLINE) and its notion of a revision hold here too.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from huggingface_hub import (
    cached_assets_path,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vitrt.checkpoint.hub_ranges import RangeReader, RangesRefusedError, fetch_tower
from vitrt.checkpoint.shards import CheckpointError, TensorInfo
from vitrt.checkpoint.tower_files import INDEX, SINGLE, ShardNames, TowerSearch, read_json

logger = logging.getLogger(__name__)


class HubRepository:
    """One revision of one repository. The first file fetched pins the commit for the rest."""

    def __init__(
        self,
        repo: str,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> None:
        self.repo = repo
        self.revision = revision or constants.DEFAULT_REVISION
        self.cache_dir = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
        self._assets = self.cache_dir / "assets" if cache_dir else Path(constants.HF_ASSETS_CACHE)
        self.token = token
        self.offline = local_files_only or bool(constants.HF_HUB_OFFLINE)
        self._pinned: str | None = None

    def fetch(self, filename: str) -> Path:
        """The file in the hub's cache, downloaded where it is not there yet."""
        path = self._fetch(filename, optional=False)
        assert path is not None
        return path

    def fetch_optional(self, filename: str) -> Path | None:
        """`fetch`, or None where the repository has no such file, or offline the cache has none."""
        return self._fetch(filename, optional=True)

    def fetch_tensors(self, search: TowerSearch) -> dict[str, TensorInfo]:
        """The vision tensors by name in the tower, on this machine.

        What is here already is used: the tower's own file, or whole shards in the hub's cache.
        Otherwise only the tower's bytes are fetched, or whole shards where the server refuses that.
        """
        folder = self._tower_folder()
        if folder and (folder / SINGLE).is_file():
            return search.in_files([folder / SINGLE])
        shards = None if self._has(SINGLE) else self._shards(search)
        files = [SINGLE] if shards is None else sorted(shards)
        whole = all(self.cached(file) for file in files)
        if folder and not whole and (tower := self._fetch_tower(search, shards, folder)):
            return search.in_files([tower])
        snapshot = {self.fetch(file).parent for file in files}.pop()
        if shards is None:
            return search.in_files([snapshot / SINGLE])
        return search.in_shards(snapshot, shards)

    def _tower_folder(self) -> Path | None:
        """Where the tower's bytes are kept: among the hub's assets, one folder a commit.

        None where there is none and none can be made: a cache may be mounted read-only.
        """
        try:
            return cached_assets_path(
                library_name="vitrt",
                namespace=self.repo,
                subfolder=self._commit,
                assets_dir=self._assets,
            )
        except OSError as error:
            logger.info("%s: no folder for its tower: %s", self.repo, error)
            return None

    def _has(self, filename: str) -> bool:
        if self.offline or self.cached(filename):
            return self.cached(filename) is not None
        url = hf_hub_url(self.repo, filename, revision=self._commit)
        try:
            get_hf_file_metadata(url, token=self.token, library_name="vitrt")
        except EntryNotFoundError:
            return False
        except Exception as error:
            raise CheckpointError(self.explain(filename, error)) from error
        return True

    def _shards(self, search: TowerSearch) -> ShardNames:
        if index := self.fetch_optional(INDEX):
            return search.shards_of_index(read_json(index))
        raise CheckpointError(f"{self._label}: holds neither {SINGLE} nor {INDEX}{self._looked()}")

    def _fetch_tower(
        self, search: TowerSearch, shards: ShardNames | None, folder: Path
    ) -> Path | None:
        """The tower's bytes in a file of their own; None where whole shards are needed."""
        if self.offline:
            return None
        try:
            reader = RangeReader(self.repo, self._commit, self.token)
            return fetch_tower(reader, search, shards, folder)
        except RangesRefusedError as error:
            logger.info("%s: fetching whole shards: %s", self.repo, error)
            return None
        except CheckpointError as error:
            raise CheckpointError(f"{self._label}: {error}") from error
        except Exception as error:
            raise CheckpointError(self.explain(", ".join(shards or [SINGLE]), error)) from error

    def cached(self, filename: str) -> Path | None:
        """The file where the hub's cache already holds it."""
        path = try_to_load_from_cache(self.repo, filename, self.cache_dir, self._commit)
        return Path(path) if isinstance(path, str) else None

    @property
    def _commit(self) -> str:
        return self._pinned or self.revision

    @property
    def _label(self) -> str:
        return f"{self.repo} (revision {self.revision})"

    def _looked(self) -> str:
        if self.offline:
            return (
                f"; looked in the cache {self.cache_dir} only, because offline mode is on "
                "(HF_HUB_OFFLINE, or local_files_only)"
            )
        return f"; asked {constants.ENDPOINT}"

    def _fetch(self, filename: str, *, optional: bool) -> Path | None:
        try:
            path = Path(
                hf_hub_download(
                    self.repo,
                    filename,
                    revision=self._commit,
                    cache_dir=self.cache_dir,
                    token=self.token,
                    local_files_only=self.offline,
                    library_name="vitrt",
                )
            )
        except Exception as error:  # its transport errors have no base of their own
            absent = isinstance(error, EntryNotFoundError) and (
                self.offline or not isinstance(error, LocalEntryNotFoundError)
            )
            if optional and absent:
                return None
            raise CheckpointError(self.explain(filename, error)) from error
        # The cache keeps a snapshot in a folder named after its commit.
        self._pinned = self._pinned or path.parent.name
        return path

    def explain(self, filename: str, error: Exception) -> str:
        """What went wrong, naming the file and where it was looked for."""
        what = f"{self._label}: {filename}"
        if isinstance(error, GatedRepoError):
            return f"{what}: the repository is gated; log in or pass a token{self._looked()}"
        if isinstance(error, RepositoryNotFoundError):
            return (
                f"{what}: no such repository, or it is private and there is no token for it"
                f"{self._looked()}"
            )
        if isinstance(error, RevisionNotFoundError):
            return f"{what}: no such revision{self._looked()}"
        if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
            if self._pinned is None:  # nothing of it was found: it may be meant for a folder
                what = f"there is no folder {self.repo}; as a hub id, {what}"
            if self.offline:
                return f"{what}: is not there{self._looked()}"
            cause = error.__cause__ or error
            return (
                f"{what}: is not in the cache {self.cache_dir}, and {constants.ENDPOINT} could not "
                f"be asked: {cause}"
            )
        if isinstance(error, EntryNotFoundError):
            return f"{what}: the repository has no such file{self._looked()}"
        if isinstance(error, HFValidationError):
            return f"{self.repo}: is no folder, and no hub id either: {error}"
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            status = error.response.status_code
            return f"{what}: HTTP {status}{self._looked()}: {error}"
        return f"{what}: {type(error).__name__}: {error}{self._looked()}"
