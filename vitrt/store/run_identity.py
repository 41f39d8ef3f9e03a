"""What the run was that wrote a folder: two runs write into one folder only where these agree."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields

from vitrt.store.feature_shard import FORMAT, NO_LAYERS
from vitrt.version import __version__


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What two runs must share to write into one folder. Saved in the metadata of every shard."""

    model: str  # as the user named it
    model_type: str
    weights: str  # a fingerprint of the checkpoint: a model may move, but not change
    dtype: str
    min_pixels: int
    max_pixels: int
    resize: str
    pool: str
    layers: str = NO_LAYERS  # whose hidden states are kept, from 0
    merged: bool = True  # whether merged tokens are
    precision: str = "auto"  # of products, where it is not the dtype's own
    batch_invariant: bool = False  # whether features do not depend on what else is in a batch
    video: str = "unknown"  # how clips are sampled and sized; unknown in folders of older versions

    @classmethod
    def shared(cls) -> list[str]:
        """The names of what must be equal: a model may have another name, not other weights."""
        return [field.name for field in fields(cls) if field.name != "model"]

    def metadata(self) -> dict[str, str]:
        """The strings saved with a shard, format and version included."""
        values = {name: str(value) for name, value in asdict(self).items()}
        return {"format": FORMAT, **values, "vitrt_version": __version__}

    def differences(self, metadata: Mapping[str, str]) -> list[str]:
        """One text for each thing in which the run that wrote `metadata` was another."""
        mine = self.metadata()
        # A shard that does not name a setting is older than it.
        theirs = {f.name: str(f.default) for f in fields(self) if f.default is not MISSING}
        theirs |= metadata
        found = [
            "{} is {} there and {} now".format(name, *_apart(theirs[name], mine[name]))
            for name in self.shared()
            if name != "weights" and name in theirs and theirs[name] != mine[name]
            # A folder that says nothing of videos holds none.
            if name != "video" or "unknown" not in (theirs[name], mine[name])
        ]
        if metadata.get("weights", self.weights) != self.weights:
            same_name = metadata.get("model") == self.model
            found.insert(
                0,
                f"the weights of model {self.model}, or its adapter, changed since"
                if same_name
                else f"model is {metadata.get('model')} there and {self.model} now",
            )
        return found


def _apart(theirs: str, mine: str) -> tuple[str, str]:
    """Of two lists of as many settings, those that differ: there are a dozen of videos."""
    lists = [re.split(", (?=[a-z])", text) for text in (theirs, mine)]  # a name is before each
    if len(lists[0]) != len(lists[1]):
        return theirs, mine
    there, now = zip(
        *(pair for pair in zip(*lists, strict=True) if pair[0] != pair[1]), strict=True
    )
    return ", ".join(there), ", ".join(now)


def layers_text(layers: Sequence[int]) -> str:
    """Layers as a shard's metadata and a RunIdentity say them."""
    return ",".join(map(str, layers)) or NO_LAYERS
