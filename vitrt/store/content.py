"""The features of one image as the bytes of a safetensors file: a cell of a table, a response."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from vitrt.features import ImageFeatures
from vitrt.store.feature_shard import encode_shard, merge_size_of, parse_layers
from vitrt.store.run_identity import layers_text
from vitrt.tensor_file import LENGTH_BYTES, TensorFileError, header_length, parse_header

__all__ = ["from_bytes", "to_bytes"]

FORMAT = "vitrt.image.v1"


def to_bytes(features: ImageFeatures, *, pooled: bool = False) -> bytes:
    """`grid_thw` (int64 [3]), `embeddings`, and `deepstack` and `hidden` where there are such.

    `pooled`: in place of all but the grid, `pooled`, [out_hidden]: `features` has this one row.
    """
    tensors = [("grid_thw", torch.tensor(features.grid_thw, dtype=torch.int64, device="cpu"))]
    if pooled:
        assert len(features.embeddings) == 1, "pooled features are one row"
        found = {"pooled": features.embeddings[0]}
    else:
        found = features.tensors()
    tensors += [(name, tensor.detach().cpu().contiguous()) for name, tensor in found.items()]
    metadata = {
        "format": FORMAT,
        "merge_size": str(features.merge_size),
        "layers": layers_text(features.layers),
    }
    return b"".join(encode_shard(tensors, metadata))


def from_bytes(content: bytes) -> ImageFeatures:
    """What `to_bytes` was given, on the CPU. TensorFileError for other content."""
    name = Path("features")  # for messages
    length = header_length(content[:LENGTH_BYTES], name, len(content))
    text = content[LENGTH_BYTES : LENGTH_BYTES + length]
    metadata = parse_header(text, name, len(content)).metadata
    try:
        tensors = load(content)
        embeddings = tensors["pooled"][None] if "pooled" in tensors else tensors["embeddings"]
        t, h, w = tensors["grid_thw"].tolist()
    except SafetensorError as error:
        raise TensorFileError(f"{name}: not as vitrt wrote them: {error}") from error
    except KeyError as error:
        raise TensorFileError(f"{name}: there is no tensor {error}") from error
    return ImageFeatures(
        embeddings,
        tensors.get("deepstack"),
        (t, h, w),
        merge_size_of(metadata),
        tensors.get("hidden"),
        parse_layers(metadata),
    )
