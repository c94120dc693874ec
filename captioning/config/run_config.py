"""All settings of a run, as its config.json keeps them."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from captioning.config.cnns import CNN, cnn_of_manifest
from captioning.config.settings import DataConfig, ModelConfig, TrainConfig

FORMAT = 4  # of config.json and of the checkpoints, since version 1.0; every later 1.x reads it


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All that a run was trained with."""

    model: ModelConfig
    train: TrainConfig
    data: DataConfig
    objective: dict[str, Any]  # the settings of what is minimised; empty for cross-entropy
    features: dict[str, Any]  # the manifest of the feature cache, and its `folder`
    unreadable_images: tuple[str, ...]  # left out, with their captions
    data_fingerprint: str  # of the images, their splits and their captions
    vocabulary_sha256: str  # of vocabulary.json
    moved_copies: dict[str, str] = dataclasses.field(default_factory=dict)  # images that are copies, by their new split

    @property
    def cnn(self) -> CNN:
        """The CNN whose features the run was trained on, and the size of its images."""
        return cnn_of_manifest(self.features)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of config.json."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    def difference(self, other: "RunConfig") -> tuple[str, Any, Any] | None:
        """Finds a setting in which another run differs, of those that may not change when a run is resumed.

        Returns:
            The setting's name, its value here and its value there; None if there is none.
        """
        # A file of weights is identified by its content, not by its name.
        ignored = {"weights"} if "sha256" in self.features else set()
        return find_difference(self._fixed_values(), other._fixed_values(), ignored)

    def _fixed_values(self) -> dict[str, Any]:
        """Returns all that may not change when a run is resumed, by name."""
        values = {}
        for section in (self.model, self.train, self.data):
            for field in dataclasses.fields(section):
                if not field.metadata["may_change"]:
                    values[field.name] = getattr(section, field.name)
        values |= self.objective
        # The size of the vocabulary follows from the data: it is not the first difference.
        of_data = {"unreadable_images": self.unreadable_images, "data_fingerprint": self.data_fingerprint}
        values |= of_data | {"vocab_size": values.pop("vocab_size")}
        # Where features and images are may change; the images' content is compared beside their features.
        return values | {name: value for name, value in self.features.items() if name not in ("folder", "images")}


def find_difference(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], ignored: Collection[str] = ()
) -> tuple[str, Any, Any] | None:
    """Returns the first name with two different values, and both; a missing value is None."""
    for name in {**ours, **theirs}:
        if name not in ignored and ours.get(name) != theirs.get(name):
            return name, ours.get(name), theirs.get(name)
    return None
