"""Whether XLA compiles the training step, the shapes of its batches, and what happens where it cannot."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from captioning.base import devices
from captioning.base.cli import first_line, log
from captioning.base.quiet_tensorflow import tf, xla_cache
from captioning.config.settings import TrainConfig
from captioning.training.checkpoints import Checkpoints, TrainState
from captioning.training.input_pipeline import Batch, EncodedCaptions, TrainBatches, TrainData
from captioning.training.resident_features import load_features


@contextlib.contextmanager
def plain_loop(caption_model: tf.keras.Model) -> Iterator[None]:
    """Builds graphs with the plain loop while the block runs: XLA needs shapes that are known, as only it has."""
    fused, caption_model.decoder.fused = caption_model.decoder.fused, False
    try:
        yield
    finally:
        caption_model.decoder.fused = fused


def choose_compiler(state: TrainState, config: TrainConfig, strategy: tf.distribute.Strategy) -> TrainConfig:
    """Returns the settings with --jit decided: by default XLA compiles where one GPU trains what it can compile."""
    is_possible = devices.has_gpu() and devices.is_single(strategy) and state.objective.can_be_compiled
    # Only without XLA it was tried that runs can be repeated.
    default = "on" if is_possible and not config.deterministic else "off"
    return dataclasses.replace(config, jit=default if config.jit == "auto" else config.jit)


class TrainSteps:
    """The training step and its batches, whose shapes depend on whether XLA compiles the step."""

    def __init__(
        self,
        state: TrainState,
        captions: EncodedCaptions,
        data: TrainData,
        config: TrainConfig,
        strategy: tf.distribute.Strategy,
        make_train_step: Callable[..., Callable[[Batch], None]],
    ):
        self.state, self.captions, self.source, self.strategy = state, captions, data.cache, strategy
        self.make_train_step = make_train_step
        self.image_features = load_features(captions.feature_paths, self.source.read, config, strategy)
        self.read_features = self.source.read if self.image_features is None else None
        self.may_fall_back = config.jit == "auto"
        self._make(choose_compiler(state, config, strategy))

    def _make(self, config: TrainConfig) -> None:
        self.config = config
        self.batches = TrainBatches(self.captions, self.read_features, config, self.strategy)
        self.step = self.make_train_step(self.state, config, self.strategy, self.batches.spec, self.image_features)
        if self.batches.shapes:
            kept = f"; what is compiled is kept in {xla_cache()}" if xla_cache() else ""
            lengths = ", ".join(map(str, self.batches.shapes.lengths))
            log(f"XLA compiles the training step, some seconds for each length of captions: {lengths} tokens{kept}")

    def run(self, train_epoch: Callable[..., None], checkpoints: Checkpoints, on_step: Callable | None) -> None:
        """Calls `train.train_epoch` for the rest of an epoch. Where XLA cannot run a step, it goes on without."""
        try:
            train_epoch(self.step, self.batches, self.state, checkpoints, self.config, on_step)
        except tf.errors.OpError as error:  # the step has changed nothing
            if not self.may_fall_back or self.config.jit == "off" or self.source.failure:
                raise
            hint = f"; if it could before, delete {xla_cache()}" if xla_cache() else ""
            log(f"XLA cannot run the training step ({first_line(error)}): training goes on as with --jit off{hint}")
            self._make(dataclasses.replace(self.config, jit="off"))
            train_epoch(self.step, self.batches, self.state, checkpoints, self.config, on_step)
