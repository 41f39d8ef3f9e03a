"""What tells one tower's weights from another's, without reading them all."""

from __future__ import annotations

import json
from hashlib import blake2b

from vitrt.checkpoint.opened import Checkpoint
from vitrt.checkpoint.shards import TensorInfo
from vitrt.models.config_file import write_vision_config

_SAMPLE_BYTES = 2048  # at each end of a tensor


def fingerprint(checkpoint: Checkpoint) -> str:
    """Sixteen hex digits that change with the tower: its config and a sample of every tensor.

    The same for a tower that was moved, renamed or extracted; another with an adapter.
    """
    preprocessor = checkpoint.preprocessor_config()
    config = write_vision_config(checkpoint.vision_config())
    config["image"] = [*preprocessor.image_mean, *preprocessor.image_std]
    digest = blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=8)
    for name, info in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {info.dtype} {info.shape}".encode() + _sample(info))
    changes = checkpoint.adapter.changes if checkpoint.adapter else {}
    for name, change in sorted(changes.items()):
        for part, info in sorted(change.parts.items()):
            said = f"{name} {part} {change.scaling!r} {info.dtype} {info.shape}"
            digest.update(said.encode() + _sample(info))
    return digest.hexdigest()


def _sample(info: TensorInfo) -> bytes:
    count = min(info.nbytes, _SAMPLE_BYTES)
    with info.file.open("rb") as file:
        file.seek(info.offset)
        start = file.read(count)
        file.seek(info.offset + max(info.nbytes - _SAMPLE_BYTES, 0))
        return start + file.read(count)
