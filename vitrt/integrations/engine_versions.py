"""Whether an engine is one of those that a plugin was written for; as light as a plugin's start."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

Version = tuple[int, ...]


def warn_of_version(
    engine: str,
    version: str,
    ran: Sequence[str],
    read: tuple[Version, Version],
    logger: logging.Logger,
) -> None:
    """One line where `version` lies outside those whose sources were read, first and last."""
    found = re.match(r"\d+(\.\d+)*", version)
    release = tuple(map(int, found[0].split("."))) if found is not None else ()
    if not read[0] <= release[: len(read[0])] <= read[1]:
        logger.warning(
            "vitrt's plugin ran with %s %s and was written for %s to %s; this is %s",
            engine,
            " and ".join(ran),
            *(".".join(map(str, release)) for release in read),
            version,
        )
