"""Items through a pipeline, their features on the device, in order: `encode` and `stream`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn, TypeVar

from vitrt.engine.pipeline import Pipeline
from vitrt.engine.splitting import DeviceMemoryError, HostMemoryError, Splitter
from vitrt.engine.stages import Stages
from vitrt.features import ImageFeatures

I = TypeVar("I")  # noqa: E741  an item
E = TypeVar("E")  # what comes in place of an error


def stream_features(
    stages: Stages[I],
    items: Iterable[I],
    *,
    failed: Callable[[Exception], E],
    full_batches: bool,
    workers: int | None = None,
) -> Iterator[ImageFeatures | E]:
    """The features of each item, in order; in place of its error what `failed` makes of it."""
    pipeline: Pipeline[int, I, ImageFeatures] = Pipeline(
        stages, _at_once, workers=workers, full_batches=full_batches
    )
    with pipeline:
        for index, result in pipeline.through(enumerate(items)):
            # These do not name the image themselves.
            if isinstance(result, DeviceMemoryError | HostMemoryError):
                result = type(result)(f"image {index}: {result}")
            yield failed(result) if isinstance(result, Exception) else result


def features_of(stages: Stages[I], items: Sequence[I]) -> list[ImageFeatures]:
    """The features of all, in order; equal lists always go in equal batches.

    While the device runs one batch, the next is prepared. Raises the error of the first item that
    has one.
    """
    if len(items) == 1:  # not worth a thread
        ((result,),) = Splitter(stages, _at_once, stages.join).run([stages.prepare(items[0])])
        return [raise_it(result) if isinstance(result, Exception) else result]
    return list(stream_features(stages, items, failed=raise_it, full_batches=True))


def raise_it(error: Exception) -> NoReturn:
    raise error


def _at_once(compute: Callable[[], list[ImageFeatures]]) -> list[ImageFeatures]:
    return compute()
