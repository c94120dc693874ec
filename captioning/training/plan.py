"""What a training will download, compute and take: `python train.py --dry-run`, and a line after its first steps."""

import argparse
import dataclasses
import functools
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import features
from captioning.base.cli import format_bytes, format_seconds, log, print_results
from captioning.base.quiet_tensorflow import tf
from captioning.config.cnns import WEIGHTS_MEGABYTES
from captioning.config.run_config import RunConfig
from captioning.config.settings import DataConfig, FeatureConfig, TrainConfig
from captioning.data.annotations import SPLITS, Example
from captioning.data.datasets import DatasetSource, Missing, find_source
from captioning.images.cnn_loader import imagenet_file
from captioning.images.feature_cache import FeatureCache, check_cnn_weights, make_manifest
from captioning.runs.run_folder import fill_locations
from captioning.training.checkpoints import TrainProgress, TrainState
from captioning.training.compiling import choose_compiler
from captioning.training.input_pipeline import Batch, TrainBatches, TrainData, encode_captions
from captioning.training.training_log import count_epochs
from data_utils import CaptionDataset, describe_split

NUM_STEPS = 10  # that are timed
# Per weight, in float32. Of each there are two, and three while one is written: of the states the weights, Adam's two
# means, and perhaps the moving average; of the best weights two, which are written at another time.
STATE_BYTES, AVERAGE_BYTES, BEST_BYTES = 3 * 12, 3 * 4, 2 * 4
UNKNOWN = "known once the captions are there"


class ZeroFeatures(FeatureCache):
    """Stands for a cache that is not filled yet: all features are zero."""

    def read(self, paths: tf.Tensor) -> tf.Tensor:
        """Returns zeros (B, L, C)."""
        return tf.zeros((tf.shape(paths)[0], *self.shape), self.dtype)


def open_features(dataset: CaptionDataset, config: FeatureConfig) -> tuple[ZeroFeatures, CaptionDataset]:
    """Stands for `features.extract_features`: opens the cache, and neither computes nor writes anything.

    Raises:
        InputError: the cache holds features of another kind.
    """
    folder = features.cache_folder(dataset, config)
    check_cnn_weights(config.cnn_weights)
    cnn, precision = config.sized_cnn, config.cnn_precision
    expected = make_manifest(folder, dataset.image_dir, config.cnn_weights, config.dtype, cnn, precision)
    manifest = features.match_manifest(folder, expected) or expected
    return ZeroFeatures(folder, {**manifest, "weights": config.cnn_weights}), dataset


def guess_dataset(source: DatasetSource, config: DataConfig) -> CaptionDataset:
    """Returns a dataset with as many images as captions that are not here yet will have; it has no captions."""
    num_captions = source.default_num_captions if config.num_captions is None else config.num_captions
    image_paths = source.guess_image_paths(num_captions)
    return CaptionDataset(
        source.name, source.image_dir, tuple(Example(path, (), number) for number, path in enumerate(image_paths))
    )


def measure_rate(train_step: Callable[[Batch], None], batches: TrainBatches, state: TrainState) -> float:
    """Takes a few steps, and returns how many captions they train a second, besides the reading of features."""
    order = batches.order(0)[:NUM_STEPS]
    loaded = list(batches.load(order))
    for _ in range(2):  # the first time a graph is built; with XLA, one for every shape
        start = time.monotonic()
        for batch in loaded:
            train_step(batch)
        state.progress.mean_loss()  # waits for the steps
    return sum(map(len, order)) / (time.monotonic() - start)


def describe_duration(rate: float, num_captions: int, epochs: int) -> str:
    """Describes how long a training takes at a rate, in captions per second."""
    seconds = num_captions / rate
    return (
        f"{rate:,.0f} captions/s: {format_seconds(seconds)} an epoch, {format_seconds(epochs * seconds)} for {epochs} "
        "epochs at most, besides validation"
    )


def announce_duration(progress: TrainProgress, rate: float, num_captions: int, epochs: int) -> None:
    """Logs once how long a training takes, when its rate is known, unless an epoch takes less than a minute."""
    if rate and not progress.is_estimated:
        progress.is_estimated = True
        if num_captions >= 60 * rate:
            log(describe_duration(rate, num_captions, epochs))


def find_missing_weights(cache: FeatureCache) -> list[Missing]:
    """Returns ImageNet's weights of the CNN, if Keras has not downloaded them."""
    path, size = imagenet_file(cache.cnn), WEIGHTS_MEGABYTES.get(cache.cnn.option)
    if cache.cnn_weights != "imagenet" or path.exists():
        return []
    num_bytes = size and size * 1e6
    fetch = functools.partial(features.build_feature_extractor, "imagenet", cache.cnn)
    return [Missing(path.name, path.parent, num_bytes, num_bytes or 0, fetch)]


def describe_data(dataset: CaptionDataset) -> list[str]:
    """Describes the splits, or how many images there will be."""
    lines = []
    for split in SPLITS:
        if examples := [example for example in dataset.examples if example.split == split]:
            lines.append(describe_split(split, examples))
    about = f"about {len(dataset.examples):,} images; the rest is " if dataset.examples else ""
    return lines or [about + UNKNOWN]


def describe_missing(files: Missing) -> str:
    """Describes what is to be downloaded or drawn."""
    size = f" ({format_bytes(files.num_bytes)})" if files.num_bytes else ""
    return f"{files.name}, into {files.folder}/{size}"


def describe_disks(results: list[tuple[Path, float]], missing: list[Missing]) -> list[str]:
    """Describes for every disk how many bytes it needs, for folders of results beside the missing files, and has."""
    needs = [(folder, num_bytes, 0.0) for folder, num_bytes in results]
    needs += [(files.folder, files.disk_bytes, files.disk_bytes + files.archive_bytes) for files in missing]
    by_disk: defaultdict[int, list[tuple[Path, float, float]]] = defaultdict(list)
    for folder, at_end, before in needs:
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        by_disk[existing.stat().st_dev].append((existing, at_end, before))
    at_least = "at least " if any(files.num_bytes is None for files in missing) else ""
    lines = []
    for disk in by_disk.values():
        folders, *sizes = zip(*disk, strict=True)
        needed, free = max(map(sum, sizes)), shutil.disk_usage(folders[0]).free
        problem = ": too little" if free < needed else ""
        lines.append(f"{at_least}{format_bytes(needed)} needed, {format_bytes(free)} free in {folders[0]}/{problem}")
    return lines


def print_lines(
    dataset: CaptionDataset, missing: list[Missing], cache: FeatureCache, training: str, checkpoints: tuple[Path, float]
) -> None:
    """Prints what is there, what is to be downloaded and computed, how long that takes, and the disk it needs.

    Args:
        dataset: the dataset, or what stands for one whose captions are not here yet.
        missing: what it lacks.
        cache: the features of its images.
        training: describes the training.
        checkpoints: the folder of the run, and the bytes that its checkpoints need.
    """
    uncached = cache.missing(
        example.image_path for example in dataset.examples
    )  # those that have changed are not found
    computing = f"{len(uncached):,} of {len(dataset.examples):,} images to compute, into {cache.folder}/"
    if uncached:
        computing += f" ({features.describe_cost(cache, len(uncached))})"
        missing = missing + find_missing_weights(cache)
    for name, lines in (
        ("data", describe_data(dataset)),
        ("missing", list(map(describe_missing, missing)) or ["nothing"]),
        ("features", [computing if dataset.examples else UNKNOWN]),
        ("training", [training]),
        ("disk", describe_disks([(cache.folder, len(uncached) * cache.num_bytes), checkpoints], missing)),
    ):
        for line in lines:
            print_results(f"{name:10}{line}")


def print_plan(args: argparse.Namespace, strategy: tf.distribute.Strategy) -> None:
    """Prints what a training would download and compute, and what that takes (`--dry-run`).

    Nothing is done or written, but what XLA compiles is kept.

    Raises:
        InputError: the training would fail, as far as that can be told.
    """
    import train  # which imports this module

    run = args.run
    data_config, feature_config = fill_locations(run, DataConfig.from_args(args), FeatureConfig.from_args(args))
    source = find_source(data_config, with_images=True)
    if missing := source.find_missing_annotations():
        dataset, training, num_weights = guess_dataset(source, data_config), UNKNOWN, 0
    else:
        # Images of a known dataset would be downloaded; the user's own must be there.
        data, config = train.prepare(args, open_features, with_images=bool(data_config.annotations))
        dataset = data.dataset
        training, num_weights = time_training(run, data, config, strategy)
    missing += source.find_missing_images([example.image_path for example in dataset.examples])
    cache, _ = open_features(dataset, feature_config)
    num_bytes = num_weights * (STATE_BYTES + AVERAGE_BYTES * bool(args.ema_decay) + BEST_BYTES)
    print_lines(dataset, missing, cache, training, (run, num_bytes))


def time_training(run: Path, data: TrainData, config: RunConfig, strategy: tf.distribute.Strategy) -> tuple[str, int]:
    """Takes a few steps in memory; returns a text about how long the rest of a run takes, and the number of weights."""
    import train

    state, _ = train.build_train_state(run, config, strategy)
    settings, examples = config.train, data.dataset.split("train")
    captions = encode_captions(examples, data.tokenizer.encode, data.cache.path, settings.max_length)

    def measure(settings: TrainConfig) -> tuple[float, int]:
        batches = TrainBatches(captions, data.cache.read, settings, strategy)
        rate = measure_rate(train.make_train_step(state, settings, strategy, batches.spec), batches, state)
        return rate, len(batches.order(0))

    chosen = choose_compiler(state, settings, strategy)
    try:
        rate, num_steps = measure(chosen)
    except tf.errors.OpError:  # as in training, XLA is left out where it cannot run a step
        if settings.jit != "auto" or chosen.jit == "off":
            raise
        rate, num_steps = measure(dataclasses.replace(settings, jit="off"))
    duration = describe_duration(rate, len(captions.lengths), max(settings.epochs - count_epochs(run), 0))
    return f"{num_steps:,} steps an epoch, {duration}", state.model.count_params()
