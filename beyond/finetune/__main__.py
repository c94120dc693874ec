"""Trains the last blocks of the CNN together with the decoder, from the best weights of a run, into a run of its own.

    python -m beyond.finetune --run runs/coco                  # blocks 3 to 5 of the CNN, into runs/coco_cnn
    python -m beyond.finetune --run runs/coco --block 5        # only the last one, which takes half of the time
    python -m beyond.finetune --run runs/coco --cnn-learning-rate 3e-5 --epochs 3

Xu et al. 2015 leave the CNN as it is. Vinyals et al. 2016, "Show and Tell: Lessons learned from the 2015 MSCOCO Image
Captioning Challenge", train it once the decoder has converged, since the gradients of an untrained one would spoil it.
A run is resumed by the same command.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import features
import model
import train
from beyond.finetune.cnn_blocks import TrainedCNN, trainable_from
from beyond.finetune.images import ImageReader, augment, find_images_with, mirror
from beyond.start import check_start, parse_start, take_words
from captioning.base.cli import InputError, defer_interrupts, log, make_parser, run_main
from captioning.base.files import relative_path
from captioning.base.quiet_tensorflow import tf
from captioning.config.options import Settings, add_options, option
from captioning.config.run_config import RunConfig
from captioning.config.settings import FeatureConfig, TrainConfig
from captioning.images.cnn_loader import computing_in, find_cnn, save_cnn
from captioning.images.feature_cache import CNN_FILE
from captioning.images.reading import set_max_megapixels
from captioning.runs.run_folder import (
    VOCABULARY_FILE,
    best_checkpoint,
    find_config,
    read_config,
    restore_weights,
    write_config,
)
from captioning.training.checkpoints import Checkpoints, TrainState
from captioning.training.input_pipeline import Batch
from captioning.training.objective import CrossEntropy
from captioning.training.optimizer import slow_down
from data_utils import CaptionDataset
from tokenizer import Tokenizer

# Few epochs, since every image goes through the CNN, once for all its captions; and a decoder that moves slowly, since
# it has converged.
RECIPE: dict[str, Any] = {"epochs": 5, "learning_rate": 1e-4, "shuffle_by": "image"}
KEPT = ("batch_size", "clip_norm", "ema_decay", "label_smoothing")
# Images are read in Python, on one machine; a batch has those of its captions.
WITHOUT = ("recipe", "jit", "strategy", "cnn_batch_size")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(Settings):
    """How the CNN is trained."""

    block: int = option(
        3,
        "first block of the CNN that is trained, 1 to 5; a block begins where the grid gets smaller (inception_v3: "
        "mixed0 to 2 are block 3, mixed3 to 7 block 4, mixed8 to 10 block 5)",
        bounds="[1, inf)",
    )
    cnn_learning_rate: float = option(
        1e-4, "learning rate of the CNN; --learning-rate is the decoder's", bounds="(0, inf)"
    )
    mirror_unless: str | None = option(
        None,
        "mirror half of the images, at random, but none with a caption that has one of these words, such as left,right",
        metavar="WORD,...",
    )


class AugmentedCrossEntropy(CrossEntropy):
    """Cross-entropy of images that are augmented first."""

    starts_trained = True
    can_be_compiled = False  # convolutions would take longer: XLA's flags leave out the search for their fastest form

    def __init__(self, config: TrainConfig, side_words: list[int] | None = None):
        super().__init__(config)
        self.side_words = side_words  # of captions whose images are not mirrored; None: no image is

    def prepare(self, model: tf.keras.Model, batch: Batch, step: tf.Tensor) -> Batch:
        """Augments the images of a batch, whose `features` are pixels (I, size, size, 3) uint8."""
        seeds = tf.stack([tf.constant(self.config.seed, tf.int64), tf.cast(step, tf.int64)])  # (2,)
        pixels = augment(batch.features, seeds)
        if self.side_words is not None:
            has_side = find_images_with(tf.constant(self.side_words, tf.int32), batch)  # (I,)
            pixels = mirror(pixels, ~has_side, tf.random.experimental.stateless_fold_in(seeds, 1))
        return batch._replace(features=pixels)


def find_side_words(start: Path, words: str | None) -> list[int] | None:
    """Returns the ids of the words of --mirror-unless, and logs those that no caption has; None if it is not given.

    Raises:
        InputError: no caption has any of them: every image would be mirrored.
    """
    if words is None:
        return None
    word_index = Tokenizer.load(start / VOCABULARY_FILE).word_index
    names = [word.strip().lower() for word in words.split(",")]
    if unknown := [name for name in names if name not in word_index]:
        log(f"--mirror-unless: the vocabulary has no {', '.join(map(repr, unknown))}")
    if len(unknown) == len(names):
        raise InputError(f"--mirror-unless: expected words of the captions, such as left,right; found {words!r}")
    return [word_index[name] for name in names if name in word_index]


class CNNCheckpoints(Checkpoints):
    """Checkpoints of a run whose CNN is trained: with the best weights, the CNN is saved as captioning reads it."""

    def save_best(self) -> None:
        """Saves the current weights as the best: the CNN's file, the checkpoint, and the file's SHA-256.

        In this order: if it is stopped in between, captioning reports that they do not belong together, until the
        training is resumed, which then does the same again.
        """
        with defer_interrupts():
            sha256 = save_cnn(self.state.model.cnn.extractor, self.run / CNN_FILE)
            super().save_best()
            config = read_config(self.run)
            weights = {"weights": str(self.run / CNN_FILE), "sha256": sha256}
            write_config(self.run, dataclasses.replace(config, features=config.features | weights))


def open_images(
    run: Path, start: Path, dataset: CaptionDataset, config: FeatureConfig
) -> tuple[ImageReader, CaptionDataset]:
    """Opens the images of a dataset in place of a cache of their features.

    Returns:
        The images, and the dataset.

    Raises:
        InputError: a folder of features is given.
    """
    set_max_megapixels(config.max_megapixels)
    saved = read_config(start)
    if config.features_dir != saved.features["folder"]:
        raise InputError("--features-dir: not for the training of the CNN, which reads the images")
    folder = run / "features"
    image_dir = relative_path(dataset.image_dir.resolve(), folder.resolve())
    manifest = saved.features | {"folder": str(folder), "images": image_dir}
    if resumed := find_config(run):
        manifest = resumed.features
    reader = ImageReader(dataset.image_dir, manifest | {"dtype": config.dtype})
    return reader, dataset


def build_cnn(config: FeatureConfig, block: int, mixed_precision: bool) -> TrainedCNN:
    """Builds the CNN of the run at the start, whose blocks from `block` on are trained.

    In mixed precision it computes in float16, here only: captioning computes its features in float32.

    Raises:
        InputError: the CNN has no such block.
    """
    # The weights of a run whose CNN is being trained here are restored with its checkpoint.
    with computing_in("float16" if mixed_precision else "float32"):
        extractor = features.build_feature_extractor(config.cnn_weights, config.sized_cnn)
    trainable_from(find_cnn(extractor), block)
    return TrainedCNN(extractor, config.dtype)


def build(
    run: Path,
    config: RunConfig,
    strategy: tf.distribute.Strategy,
    start: Path,
    cnn: TrainedCNN,
    side_words: list[int] | None,
) -> tuple[TrainState, Checkpoints]:
    """Builds what is trained, as `train.build_train_state` does, with the CNN in front, at its own learning rate."""
    settings = config.train
    tf.keras.utils.set_random_seed(settings.seed)
    caption_model = model.build(config.model, config.cnn.features_shape, settings.mixed_precision)
    restore_weights(best_checkpoint(start), caption_model)
    caption_model.cnn = cnn
    state = train.make_train_state(caption_model, AugmentedCrossEntropy(settings, side_words), settings)
    train.choose_decoder_loop(caption_model, settings)
    factor = config.objective["cnn_learning_rate"] / settings.learning_rate
    slow_down(state.optimizer, cnn.trainable_variables, factor)
    return state, CNNCheckpoints(run, state)


def main(argv: list[str] | None = None, on_step: train.OnStep | None = None) -> None:
    """Trains; calls `on_step` after every step."""
    parser = make_parser(__doc__)
    add_options(parser.add_argument_group("CNN"), FinetuneConfig)
    args = parse_start(parser, argv, RECIPE, KEPT, WITHOUT)
    finetune, feature_config = FinetuneConfig.from_args(args), FeatureConfig.from_args(args)
    strategy = train.start_devices(TrainConfig.from_args(args))
    start, run = args.run, args.run.with_name(f"{args.run.name}_cnn")
    data, config = train.prepare(args, functools.partial(open_images, run, start))
    check_start(start, config)
    data, config = take_words(start, data, config)
    config = dataclasses.replace(config, objective=finetune.to_json())
    side_words = find_side_words(start, finetune.mirror_unless)
    cnn = build_cnn(feature_config, finetune.block, config.train.mixed_precision)
    with train.open_run_folder(run, data, config, strategy):
        prepared = functools.partial(build, start=start, cnn=cnn, side_words=side_words)
        train.train(run, data, config, strategy, prepared, on_step)


if __name__ == "__main__":
    run_main(main)
