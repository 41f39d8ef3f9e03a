"""Search an output folder of `vitrt encode` by example, in LanceDB's embedded database.

    vitrt encode Qwen/Qwen3-VL-2B-Instruct photos/ --output features --pool mean
    python examples/search_lancedb.py features holiday/cat.jpg

Needs `pip install 'vitrt[lance]' lancedb`. The query is the id of an image of the folder. What all
images have in common says nothing about any of them, so their mean is taken away first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lancedb
import pyarrow as pa
import torch

from vitrt import FeatureStore


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", type=Path, help="an output folder of vitrt encode")
    parser.add_argument("query", help="the id of one of its images")
    parser.add_argument("--top", type=int, default=5)
    parser.add_argument("--database", type=Path, help="default: features.lancedb beside the folder")
    args = parser.parse_args(arguments)

    store = FeatureStore(args.features)
    mean = torch.stack([features.pooled() for features in store.values()]).mean(dim=0)

    def centred(batch: pa.RecordBatch) -> pa.RecordBatch:
        width = len(mean)
        vectors = torch.from_numpy(batch["vector"].flatten().to_numpy()).view(-1, width) - mean
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.view(-1).numpy()), width)
        return pa.record_batch([batch["id"], column], batch.schema)

    database = lancedb.connect(args.database or args.features.with_suffix(".lancedb"))
    table = database.create_table(
        "images",
        map(centred, store.arrow_batches()),
        schema=next(store.arrow_batches()).schema,
        mode="overwrite",
    )
    query = (store[args.query].pooled() - mean).numpy()
    for row in table.search(query).distance_type("cosine").limit(args.top).to_list():
        print(f"{1 - row['_distance']:6.3f}  {row['id']}")


if __name__ == "__main__":
    main()
