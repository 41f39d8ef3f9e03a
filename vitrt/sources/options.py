"""What the user says about INPUTs. It imports nothing heavy: `--help` reads it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """How to read inputs. The CLI takes its defaults from these fields."""

    all_files: bool = False  # of a folder or an archive, whatever their names
    image_column: str | None = None  # of tables; None: found by its type
    id_column: str | None = None  # None: ids are the numbers of rows
