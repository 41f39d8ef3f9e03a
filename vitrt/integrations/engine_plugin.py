"""What vLLM's and SGLang's plugins have in common: an engine's tower replaced while it is made."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn

from vitrt.integrations.engine_tower import EngineTower


@contextmanager
def tower_replaced(
    module: ModuleType,
    name: str,
    make: Callable[..., EngineTower],
    engine: str,
    logger: logging.Logger,
) -> Iterator[None]:
    """While an engine's constructor runs, `name` in its module makes vitrt's tower where it can.

    `make(own, *args, **kwargs)` gets the engine's class and arguments; where it raises ValueError,
    the engine's own tower is made and one line says why.
    """
    own = getattr(module, name)

    def make_either(*args: Any, **kwargs: Any) -> nn.Module:
        try:
            tower = make(own, *args, **kwargs)
        except ValueError as error:
            reason = " ".join(str(error).split())
            logger.warning("%s's own vision tower runs, not vitrt's: %s", engine, reason)
            return own(*args, **kwargs)
        logger.info("vitrt runs the vision tower, of %s", tower.config.model_type)
        return tower

    setattr(module, name, make_either)
    try:
        yield
    finally:
        setattr(module, name, own)


def read_arguments(
    args: Sequence[Any], kwargs: Mapping[str, Any], known: Sequence[str]
) -> dict[str, Any]:
    """What an engine makes its tower with, by name; the first may be given by position.

    ValueError for an argument that is not known.
    """
    arguments = dict(zip(known[:1], args, strict=False)) | dict(kwargs)
    if len(args) > 1 or not {"vision_config"} <= set(arguments) <= set(known):
        raise ValueError(f"its constructor is called with {', '.join(sorted(arguments))}")
    if arguments.get("norm_eps", 1e-6) != 1e-6:
        raise ValueError(f"norm_eps is {arguments['norm_eps']}, and vitrt's is 1e-06")
    return arguments


def refuse_quantised(tower: nn.Module) -> None:
    """ValueError where layers of an engine's tower would be quantised."""
    methods = {type(getattr(layer, "quant_method", None)).__name__ for layer in tower.modules()}
    quantised = {name for name in methods if name != "NoneType" and "Unquantized" not in name}
    if quantised:
        raise ValueError(f"its layers are quantised ({', '.join(sorted(quantised))})")
