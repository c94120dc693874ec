"""All settings of a run, as its config.json keeps them."""

import dataclasses
from typing import Any

from captioning.config.cnns import CNN, cnn_of_manifest
from captioning.config.settings import DataConfig, ModelConfig, TrainConfig

FORMAT = 3  # of config.json and of the checkpoints; changed whenever their names change


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All that a run was trained with, as its config.json keeps it."""

    model: ModelConfig
    train: TrainConfig
    data: DataConfig
    features: dict[str, Any]  # the manifest of the feature cache, and its `folder`
    unreadable_images: tuple[str, ...]  # left out, with their captions
    data_fingerprint: str  # of the images, their splits and their captions
    vocabulary_sha256: str  # of vocabulary.json

    @property
    def cnn(self) -> CNN:
        """The CNN whose features the run was trained on, and the size of its images."""
        return cnn_of_manifest(self.features)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of config.json."""
        return {
            "format": FORMAT,
            "model": self.model.to_json(),
            "train": self.train.to_json(),
            "data": self.data.to_json(),
            "features": self.features,
            "unreadable_images": list(self.unreadable_images),
            "data_fingerprint": self.data_fingerprint,
            "vocabulary_sha256": self.vocabulary_sha256,
        }

    def difference(self, other: "RunConfig") -> tuple[str, Any, Any] | None:
        """Finds a setting in which another run differs, of those that may not change when a run is resumed.

        Returns:
            The setting's name, its value here and its value there; None if there is none.
        """
        for section in ("model", "train", "data"):
            ours, theirs = getattr(self, section), getattr(other, section)
            for field in dataclasses.fields(ours):
                values = getattr(ours, field.name), getattr(theirs, field.name)
                if not field.metadata["may_change"] and values[0] != values[1]:
                    return field.name, *values
        for name in ("unreadable_images", "data_fingerprint"):
            if getattr(self, name) != getattr(other, name):
                return name, getattr(self, name), getattr(other, name)
        for name in self.features | other.features:  # in the order of the manifest, the CNN first
            # A weights file is what it holds (its SHA-256), not what it is called. The shape, which earlier versions
            # did not write, follows from the CNN and the image size.
            if name in ("folder", "shape") or (name == "weights" and "sha256" in self.features):
                continue
            if self.features.get(name) != other.features.get(name):
                return name, self.features.get(name), other.features.get(name)
        return None
