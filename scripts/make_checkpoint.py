"""Write a random-weight checkpoint in the released format, so that nothing need be fetched.

Config, preprocessor and sharded safetensors with the language model's tensors beside the vision
tower's, as transformers' own save_pretrained lays them out. The features mean nothing; everything
else about them is real.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.checkpoints import CONFIGS, MODEL_CLASSES, full_size_checkpoint, tiny_checkpoint


def main() -> None:
    sizes = sorted(folder.name for folder in CONFIGS.iterdir() if folder.is_dir())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write it; must not exist yet")
    parser.add_argument(
        "--model",
        default="qwen3_vl",
        choices=[*MODEL_CLASSES, *sizes],
        help="a family gives a narrow six-layer tower, a released size its full tower beside a "
        "tiny language model (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists already")
    # Complete or not there: an interrupted run must not leave half a checkpoint under this name.
    partial = arguments.folder.with_name(arguments.folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if arguments.model in MODEL_CLASSES:
        # The released limits of Qwen3-VL, so that photographs keep their size.
        tiny_checkpoint(
            arguments.model, partial, min_pixels=65536, max_pixels=16777216, seed=arguments.seed
        )
    else:
        full_size_checkpoint(arguments.model, partial, seed=arguments.seed)
    partial.rename(arguments.folder)
    print(f"wrote {arguments.folder}")


if __name__ == "__main__":
    main()
