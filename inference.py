"""Captions images with a trained model, and shows where it attends for each word.

Tutorial sections: "Caption!" and "Try it on your own images".

    python inference.py photo.jpg                       # the latest run; writes photo_attention.png
    python inference.py photos/ --csv results.csv       # all images below a folder; run again, it continues
    python inference.py photos/ --html report.html      # a page that shows the attention for each word
    python inference.py photo.jpg --captions 5          # the five best captions, and how sure the model is
    python inference.py photo.jpg --captions 5 --sample --top-p 0.9 --no-repeat
    python inference.py --from list.txt --json | jq     # results for programs; --from - reads standard input
    python inference.py                                 # a few test images and their reference captions

From Python: `Captioner.load("runs/coco").caption("photo.jpg").text`.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import data_utils
import features
import model
from beyond.report.report import ReportWriter
from beyond.share.packed_run import open_run
from captioning.base.cli import InputError, add_quiet_option, int_at_least, log, make_parser, progress_bar, run_main
from captioning.base.downloads import redact_url
from captioning.base.files import file_sha256
from captioning.base.quiet_tensorflow import tf
from captioning.config.options import add_options
from captioning.config.run_config import RunConfig
from captioning.config.settings import DecodeConfig, FeatureConfig
from captioning.decoder.decoding import StepModel, decode
from captioning.decoder.sampling import image_keys
from captioning.images.feature_cache import check_cnn_weights, find_cnn_weights, min_jpeg_side
from captioning.images.image_args import find_images, is_url, open_image, plot_paths
from captioning.images.reading import ImageSource, map_threads, read_image, set_max_megapixels
from captioning.output.captions import Caption, to_captions
from captioning.output.plots import FORMATS, MAX_GRID_IMAGES, thumbnail
from captioning.output.results import CaptionedImage, ResultWriter, write_plot
from captioning.output.results_csv import ResultsCsv
from captioning.runs.run_folder import VOCABULARY_FILE, best_checkpoint, read_config, restore_model
from tokenizer import Tokenizer

GREEDY = DecodeConfig()  # the default: the most probable word at every step
BATCH_SIZE = 32  # images
NUM_AHEAD = 2  # batches of images that are read ahead


# The captioner.


def decode_captions(
    model: StepModel, tokenizer: Tokenizer, features: tf.Tensor, config: DecodeConfig = GREEDY
) -> list[Caption]:
    """Captions a batch of image features, (B, L, C)."""
    return to_captions(decode(model, features, config), tokenizer, config.captions)


def load_run(run: Path | str) -> tuple[model.CaptionModel, Tokenizer, RunConfig]:
    """Loads a run: the model with its best weights, its tokenizer and its settings, checked against each other.

    Raises:
        InputError: something is missing, or does not belong to the rest.
    """
    run = Path(run)
    prefix = best_checkpoint(run)
    config = read_config(run)
    tokenizer = Tokenizer.load(run / VOCABULARY_FILE, config.data.words)
    if file_sha256(run / VOCABULARY_FILE) != config.vocabulary_sha256 or len(tokenizer) != config.model.vocab_size:
        raise InputError(
            f"{run / VOCABULARY_FILE}: not the vocabulary these weights were trained with; put back that of this run"
        )
    build = functools.partial(model.build, features_shape=config.cnn.features_shape)
    return restore_model(prefix, config.model, build), tokenizer, config


class Captioner:
    """A trained run that captions images.

    Attributes:
        model: the caption model.
        tokenizer: its vocabulary.
        config: the settings of the run.
        decode_config: how captions are searched for.
        min_jpeg_side: how large JPEGs were decoded for the training, see `captioning.images.reading.read_image`.
        image_size: pixels of both sides of what the CNN takes.
        run: the run folder.
    """

    def __init__(
        self,
        model: model.CaptionModel,
        tokenizer: Tokenizer,
        config: RunConfig,
        run: Path,
        decode_config: DecodeConfig = GREEDY,
    ):
        self.model, self.tokenizer, self.config, self.run = model, tokenizer, config, run
        self.decode_config = self._with_max_words(decode_config)
        self.min_jpeg_side, self.image_size = min_jpeg_side(config.features), config.cnn.image_size
        self._has_extracted = False  # features of any image

    @classmethod
    def load(cls, run: Path | str | None, config: DecodeConfig = GREEDY) -> "Captioner":
        """Loads a run: its folder, a .zip of it or the address of one; None for the latest in runs/.

        Raises:
            InputError: as `beyond.share.packed_run.open_run` and `load_run` do.
        """
        folder = open_run(run)
        return cls(*load_run(folder), folder, config)

    def with_decoding(self, config: DecodeConfig) -> "Captioner":
        """Returns a captioner of the same run that searches in another way; it shares the CNN once that is built."""
        other = copy.copy(self)
        other.decode_config = self._with_max_words(config)
        return other

    def _with_max_words(self, config: DecodeConfig) -> DecodeConfig:
        """Fills in the length of the longest caption, as it was trained, if it is not said."""
        return dataclasses.replace(config, max_words=config.max_words or self.config.train.max_length)

    def caption(self, image: ImageSource) -> Caption:
        """Captions one image: the tutorial's `evaluate(image)`.

        Args:
            image: a path, a file's content, an open file, pixels or a Pillow image; see `reading.read_image`.

        Raises:
            InputError: the image cannot be read, or the CNN cannot be built.
        """
        # Read the image and compute its features, both as for training.
        image = image.read() if hasattr(image, "read") else image  # an open file can be read only once
        pixels = self.load_image(image)[np.newaxis]  # (1, size, size, 3)
        image_features = self.extract_features(pixels)  # (1, L, C)
        # Begin with <start>, and predict one word after the other, each from the word before it and the decoder's
        # state, until <end>. The tutorial draws a random word at every step; this takes the most probable one.
        decoded = decode(self.model, image_features, self.decode_config, image_keys(pixels))  # the tokens are (1, T)
        # Look up the words of the ids. Each has its probability and its attention weights, for `plot_attention`.
        caption = to_captions(decoded, self.tokenizer, self.decode_config.captions)[0]
        return dataclasses.replace(caption, image=image)

    def caption_batch(self, images: Iterable[ImageSource], batch_size: int = BATCH_SIZE) -> list[Caption]:
        """Captions many images, faster than one by one; they are read ahead with several threads.

        Raises:
            InputError: an image cannot be read, or the CNN cannot be built.
        """
        sources = (image.read() if hasattr(image, "read") else image for image in images)
        loaded = map_threads(self.load_image, sources, NUM_AHEAD * batch_size)
        captions: list[Caption] = []
        while batch := list(itertools.islice(loaded, batch_size)):
            of_batch = self.caption_pixels(np.stack([pixels for _, pixels in batch]))
            captions += (
                dataclasses.replace(caption, image=image) for caption, (image, _) in zip(of_batch, batch, strict=True)
            )
        return captions

    def load_image(self, image: ImageSource) -> np.ndarray:
        """Reads an image as for the training, (size, size, 3) uint8; see `features.load_image`."""
        return features.load_image(image, self.min_jpeg_side, self.image_size)

    def caption_pixels(self, pixels: np.ndarray) -> list[Caption]:
        """Captions images read by `load_image`, (B, size, size, 3) uint8."""
        decoded = decode(self.model, self.extract_features(pixels), self.decode_config, image_keys(pixels))
        return to_captions(decoded, self.tokenizer, self.decode_config.captions)

    def caption_features(self, features: tf.Tensor) -> list[Caption]:
        """Captions image features, (B, L, C)."""
        return decode_captions(self.model, self.tokenizer, features, self.decode_config)

    def extract_features(self, pixels: np.ndarray) -> tf.Tensor:
        """Computes the features (B, L, C) of images (B, size, size, 3), rounded as those of the training were."""
        # A graph is several times faster, but takes seconds to build: too long for the only image of a command.
        extract = self._extractor_graph if self._has_extracted or len(pixels) > 1 else self.extractor
        self._has_extracted = True
        return tf.cast(extract(pixels, training=False), self.config.features["dtype"])

    @functools.cached_property
    def extractor(self) -> tf.keras.Model:
        """The CNN whose features the run was trained on, built when it is first needed."""
        cnn_weights = find_cnn_weights(self.run) or self.config.features["weights"]
        check_cnn_weights(cnn_weights, self.config.features.get("sha256"))
        return features.build_feature_extractor(cnn_weights, self.config.cnn)

    @functools.cached_property
    def _extractor_graph(self) -> tf.types.experimental.PolymorphicFunction:
        """The CNN as a graph, for any number of images."""
        return tf.function(self.extractor, reduce_retracing=True)


def caption_and_plot(
    captioner: Captioner, path: Path, folder: Path, name: str | None = None, image_format: str = "png"
) -> tuple[Caption, Path | None]:
    """Captions an image, and plots the attention: `<folder>/<name, by default the image's>_attention.<image_format>`.

    Returns:
        The caption, and the path of the plot; None if it cannot be written there, which is logged.

    Raises:
        InputError: the image cannot be read.
        OSError: the disk is full.
    """
    image = read_image(path, captioner.min_jpeg_side)
    caption = captioner.caption(image)
    plot_path = folder / f"{name or path.stem}_attention.{image_format}"
    return caption, plot_path if write_plot(thumbnail(image), caption, plot_path) else None


# Many images.


def caption_stream(
    captioner: Captioner, images: Iterable[str], batch_size: int = BATCH_SIZE, with_copies: bool = True
) -> Iterator[tuple[str, CaptionedImage | InputError]]:
    """Captions files and addresses in batches; the next ones are read, or downloaded, while the CNN computes.

    The memory does not grow with their number.

    Args:
        captioner: the run.
        images: paths and addresses.
        batch_size: images that are captioned at the same time.
        with_copies: whether to give a small copy of each image, for plots and pages.

    Yields:
        Each image, in its order, with its caption, or the reason why it cannot be read.

    Raises:
        InputError: the CNN cannot be built.
    """
    _ = captioner.extractor  # built here, so that its failure is not taken for that of an image

    def load(image: str) -> tuple[np.ndarray, Image.Image | None] | InputError:
        try:
            whole = open_image(image, captioner.min_jpeg_side)
        except InputError as error:
            return error
        return features.to_pixels(whole, captioner.image_size), thumbnail(whole) if with_copies else None

    loaded = map_threads(load, images, NUM_AHEAD * batch_size)
    while batch := list(itertools.islice(loaded, batch_size)):
        pixels = [result[0] for _, result in batch if not isinstance(result, InputError)]
        captions = iter(captioner.caption_pixels(np.stack(pixels)) if pixels else [])
        for image, result in batch:
            if isinstance(result, InputError):
                yield image, result
            else:
                yield image, CaptionedImage(redact_url(image) if is_url(image) else image, result[1], next(captions))


def caption_images(
    captioner: Captioner,
    images: Sequence[str],
    writer: ResultWriter,
    plots: dict[str, Path] | None = None,
    batch_size: int = BATCH_SIZE,
) -> int:
    """Captions files and addresses (see `caption_stream`), and gives the captions to a writer.

    `plots` has the file for the attention plot of each image; None for no plots.

    Returns:
        The number of images that could not be read.

    Raises:
        InputError: the only image cannot be read, or the CNN cannot be built.
    """
    num_failed = 0
    with_copies = writer.shows_images or plots is not None
    with progress_bar(total=len(images), unit="image", desc="captions", disable=len(images) == 1) as progress:
        for image, result in caption_stream(captioner, images, batch_size, with_copies):
            progress.update()
            if not isinstance(result, InputError):
                writer.write(result, plots[image] if plots else None)
            elif len(images) == 1:
                raise result
            else:
                log(f"inference.py: {result}", error=True)
                num_failed += 1
    return num_failed


# The test images of the run.


def caption_test_images(
    captioner: Captioner,
    dataset: data_utils.CaptionDataset,
    num_images: int,
    seed: int | None,
    writer: ResultWriter,
    image_format: str | None = "png",
) -> None:
    """Captions random test images of the run's dataset, next to their reference captions, as the tutorial does.

    A dataset without test images gives validation images. Plots are written into the run folder, unless
    `image_format` is None.
    """
    candidates = [example for example in dataset.examples if example.split == "test"] or dataset.split("val")
    examples = random.Random(seed).sample(candidates, min(num_images, len(candidates)))
    references = {str(dataset.image_dir / example.image_path): example.captions for example in examples}
    plots = plot_paths(references, captioner.run / "attention", image_format or "png")
    for image, result in caption_stream(captioner, references):
        if isinstance(result, InputError):
            log(f"skipped {result}", error=True)
            continue
        writer.write(result._replace(references=references[image]), plots[image] if image_format else None)


# The command.


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every script that captions: the run, and how captions are searched for."""
    group = parser.add_argument_group("model")
    text = "run folder, a .zip that beyond.export packed, or the https address of one (default: the latest in runs/)"
    group.add_argument("--run", metavar="DIR|ZIP|URL", help=text)
    add_options(parser.add_argument_group("decoding"), DecodeConfig)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser(__doc__, "[option ...] [image ...]")
    text = "files, folders (with all folders below) or http(s) addresses of images (default: a few test images)"
    parser.add_argument("image", nargs="*", help=text)
    text = "a list of more images, one a line; - reads it from standard input"
    parser.add_argument("--from", dest="image_list", metavar="FILE", help=text)
    add_model_options(parser)
    group = parser.add_argument_group("test images, if no images are given")
    group.add_argument("--num-images", type=int_at_least(1), metavar="N", default=3, help="how many (default: 3)")
    group.add_argument("--seed", type=int, metavar="N", help="seed of the choice (default: other images each time)")
    data_utils.add_location_options(parser)
    group = parser.add_argument_group("output")
    text = "write a table: image, rank, caption, confidence, log_prob, finished. Run again, the command continues it"
    group.add_argument("--csv", type=Path, metavar="FILE", help=text)
    text = "print a JSON object per image, one a line: image, caption, confidence, words with probabilities, plot"
    group.add_argument("--json", action="store_true", help=text)
    text = "write a page that shows where the model attends for each word that the mouse is on"
    group.add_argument("--html", type=Path, metavar="FILE", help=text)
    text = "plot the attention of each image (default: of one image, and of test images)"
    group.add_argument("--plots", action=argparse.BooleanOptionalAction, help=text)
    text = "folder for <image>_attention.png (default: the current one; of test images, the run folder)"
    group.add_argument("--output-dir", type=Path, metavar="DIR", default=Path(), help=text)
    group.add_argument("--format", choices=FORMATS, default="png", help="of the attention plots (default: png)")
    text = f"write one plot of all images with their captions, {MAX_GRID_IMAGES} at most: .png, .svg or .pdf"
    group.add_argument("--grid", type=Path, metavar="FILE", help=text)
    add_options(group, FeatureConfig, only=("cnn_batch_size", "max_megapixels"))
    add_quiet_option(group)
    args = parser.parse_args(argv)
    if args.grid and args.grid.suffix[1:].lower() not in FORMATS:
        raise InputError(f"--grid {args.grid}: expected a file that ends in .{', .'.join(FORMATS)}")
    if args.csv and not (args.image or args.image_list):
        raise InputError("--csv is for the images of the command line; evaluate.py captions those of a split")
    return args


def main(argv: list[str] | None = None) -> None:
    """Captions the images of the command line, or a few test images."""
    args = parse(argv)
    set_max_megapixels(args.max_megapixels)
    images = find_images(args.image, args.image_list)
    captioner = Captioner.load(args.run, DecodeConfig.from_args(args))
    log(f"run: {captioner.run}")
    table = ResultsCsv(args.csv, captioner.run, captioner.decode_config) if args.csv else None
    with contextlib.closing(table) if table else contextlib.nullcontext():
        remaining = [image for image in images if image not in table.done] if table else images
        if len(remaining) < len(images):
            log(f"{args.csv}: {len(images) - len(remaining):,} of {len(images):,} images are in it already")
            if args.html:
                log(f"{args.html}: will show only the other {len(remaining):,}")
        subtitle = f"run {captioner.run.name}; {captioner.decode_config.describe()}"
        with ReportWriter(args.html, "Captions", subtitle) if args.html else contextlib.nullcontext() as report:
            writer = ResultWriter(args.json, len(images) > 1, args.grid, table, report)
            if not images:
                dataset = data_utils.load_run_dataset(captioner.config, locations=data_utils.locations_from_args(args))
                image_format = None if args.plots is False else args.format
                caption_test_images(captioner, dataset, args.num_images, args.seed, writer, image_format)
            num_failed = 0
            if remaining:
                with_plots = len(images) == 1 if args.plots is None else args.plots
                plots = plot_paths(images, args.output_dir, args.format) if with_plots else None
                num_failed = caption_images(captioner, remaining, writer, plots, args.cnn_batch_size)
            writer.write_grid()
    if num_failed:
        raise InputError(f"{num_failed} of {len(images)} images could not be captioned")


if __name__ == "__main__":
    run_main(main)
