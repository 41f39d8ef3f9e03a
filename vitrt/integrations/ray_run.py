"""A dataset through encoding actors: what the ways to write its features have in common."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import ray
import ray.data
import torch

from vitrt.config import RuntimeConfig
from vitrt.engine.device import dtype_name, resolve_dtype
from vitrt.integrations.ray_actor import EncoderActor, open_run_model
from vitrt.job.identity import run_identity
from vitrt.job.options import EncodeOptions

__all__ = ["DatasetRun", "DatasetSummary", "RunArguments", "check_output", "two_at_a_time"]


class RunArguments(TypedDict, total=False):
    """What `encode_dataset` and `encode_parquet` take by name; defaults are in DatasetRun."""

    actors: int  # each runs two batches at a time, so that its device waits for neither
    num_gpus: float | None  # of an actor, may be a part of one; None: 1 where Ray has any GPU
    num_cpus: float  # of an actor
    batch_size: int  # rows of one call, and so the most images of a shard
    # As RayEncoder takes them. Where `runtime` says "auto", `num_gpus` decides, for all actors.
    options: EncodeOptions | None
    runtime: RuntimeConfig | None
    image_column: str
    id_column: str
    adapter: str | os.PathLike[str] | None
    revision: str | None


@dataclass(frozen=True, slots=True)
class DatasetSummary:
    """What a run did. Batches of an actor that died count once, as they ran again."""

    images: int = 0  # encoded
    tokens: int = 0  # merged ones
    skipped: int = 0  # named in errors-*.jsonl of a folder, in the column `error` of rows
    resumed: int = 0  # that were there before
    doubled: int = 0  # rows of a folder whose id another row has: its features are those of one


class DatasetRun:
    """The rows of a dataset encoded by actors, one checkpoint and one device for all of them."""

    def __init__(
        self,
        dataset: ray.data.Dataset,
        model: str | os.PathLike[str],
        *,
        actors: int = 1,
        num_gpus: float | None = None,
        num_cpus: float = 1,
        batch_size: int = 1024,
        options: EncodeOptions | None = None,
        runtime: RuntimeConfig | None = None,
        image_column: str = "image",
        id_column: str = "id",
        adapter: str | os.PathLike[str] | None = None,
        revision: str | None = None,
    ) -> None:
        """ValueError about the model."""
        self.options, self.id_column = options or EncodeOptions(), id_column
        runtime, num_gpus = _settled(runtime or RuntimeConfig(), num_gpus)
        checkpoint = open_run_model(model, runtime, adapter, revision)
        self.identity = run_identity(checkpoint, replace(runtime, device="cpu"), self.options)
        self._dataset = dataset
        self._of_actor: dict[str, Any] = {
            "identity": self.identity,
            "model": model,
            "options": self.options,
            "runtime": runtime,
            "image_column": image_column,
            "id_column": id_column,
            "adapter": adapter,
            "revision": revision,
        }
        self._of_pool: dict[str, Any] = {
            "batch_size": batch_size,
            "compute": two_at_a_time(actors),
            "num_gpus": num_gpus,
            "num_cpus": num_cpus,
        }

    def rows_of(self, actor: type[EncoderActor], **arguments: Any) -> ray.data.Dataset:
        """What actors of this class make of the dataset; `arguments` are the class's own."""
        return self._dataset.map_batches(
            actor, fn_constructor_kwargs=self._of_actor | arguments, **self._of_pool
        )


def check_output(output: str | os.PathLike[str]) -> None:
    """ValueError for an empty path, which would mean the folder that this runs in."""
    if not os.fspath(output):
        raise ValueError("output is empty; '.' is the folder that this runs in")


def two_at_a_time(actors: int) -> ray.data.ActorPoolStrategy:
    """So many actors, for `map_batches`, each with two batches in hand.

    While one batch begins (nothing of it is decoded yet) or ends (its rows are handed over, or
    written), the device works on the other.
    """
    return ray.data.ActorPoolStrategy(
        size=actors, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
    )


def _settled(runtime: RuntimeConfig, num_gpus: float | None) -> tuple[RuntimeConfig, float]:
    """`runtime` and an actor's GPUs with nothing left to be chosen where the actors run, since
    that need not be where this runs.
    """
    if num_gpus is None:
        num_gpus = 1 if ray.cluster_resources().get("GPU") else 0
    device = runtime.device
    if device == "auto":
        device = "cuda" if num_gpus else "cpu"
    dtype = dtype_name(resolve_dtype(runtime.dtype, torch.device(device)))
    return replace(runtime, device=device, dtype=dtype), num_gpus
