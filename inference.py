"""Captions images with a trained model, and plots the attention for each word.

Tutorial sections: "Caption!" and "Try it on your own images".

    python inference.py photo.jpg                         # the latest run; writes photo_attention.png
    python inference.py --run runs/coco --beam-size 5 a.jpg b.png
    python inference.py https://example.com/photo.jpg photos/
    python inference.py *.jpg --json --grid all.png | jq  # results for programs, and one plot of all images
    python inference.py                                   # a few test images and their reference captions

From Python: `Captioner.load("runs/coco").caption("photo.jpg").text`.
"""

import argparse
import dataclasses
import errno
import functools
import json
import random
import tempfile
import urllib.parse
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

import data_utils
import features
import model
from captioning.cli import InputError, add_quiet_option, int_at_least, log, make_parser, run_main
from captioning.config import DecodeConfig, FeatureConfig, RunConfig
from captioning.decoding import DecodedBatch, StepModel, decode
from captioning.downloads import download, redact_url
from captioning.feature_cache import check_cnn_weights, find_cnn_weights
from captioning.files import file_sha256
from captioning.images import is_image_file, read_image, set_max_megapixels
from captioning.plots import FORMATS, MAX_GRID_IMAGES, plot_attention, plot_caption_grid, thumbnail
from captioning.quiet_tensorflow import tf
from captioning.run_folder import VOCABULARY_FILE, best_checkpoint, latest_run, read_config, restore_model
from captioning.settings import add_options
from captioning.special_tokens import END_ID
from tokenizer import Tokenizer

MAX_IMAGE_BYTES = 50_000_000  # of a downloaded image
GREEDY = DecodeConfig()  # the default: the most probable word at every step


# Captions.


@dataclasses.dataclass(frozen=True)
class Caption:
    """A generated caption of T words, without <start> and <end>."""

    text: str  # the words in one line, as the tokenizer joins them
    words: tuple[str, ...]
    probabilities: tuple[float, ...]  # of each word, given those before it
    attention: np.ndarray  # (T, 64), the attention weights of each word, which sum to 1
    finished: bool  # whether the model predicted <end>; otherwise the caption is cut


def to_captions(decoded: DecodedBatch, tokenizer: Tokenizer) -> list[Caption]:
    """Converts the ids that decoding returned to words, up to <end>."""
    captions = []
    for ids, probabilities, attention in zip(*(tensor.numpy() for tensor in decoded), strict=True):
        ends = np.flatnonzero(ids == END_ID)
        length = ends[0] if len(ends) else len(ids)
        words = tuple(tokenizer.index_word[i] for i in ids[:length])
        word_probabilities = tuple(probabilities[:length].tolist())
        captions.append(Caption(tokenizer.join(words), words, word_probabilities, attention[:length], len(ends) > 0))
    return captions


def decode_captions(
    model: StepModel, tokenizer: Tokenizer, features: tf.Tensor, config: DecodeConfig = GREEDY
) -> list[Caption]:
    """Captions a batch of image features, (B, 64, 2048)."""
    return to_captions(decode(model, features, config), tokenizer)


def load_run(run: Path | str) -> tuple[model.CaptionModel, Tokenizer, RunConfig]:
    """Loads a run: the model with its best weights, its tokenizer and its settings, checked against each other.

    Raises:
        InputError: something is missing, or does not belong to the rest.
    """
    run = Path(run)
    prefix = best_checkpoint(run)
    config = read_config(run)
    tokenizer = Tokenizer.load(run / VOCABULARY_FILE, config.data.words)
    sha256 = file_sha256(run / VOCABULARY_FILE)
    if sha256 != config.vocabulary_sha256 or len(tokenizer) != config.model.vocab_size:
        raise InputError(
            f"{run / VOCABULARY_FILE}: not the vocabulary these weights were trained with; put back that of this run"
        )
    return restore_model(prefix, config.model, model.build), tokenizer, config


class Captioner:
    """A trained run that captions images.

    Attributes:
        model: the caption model.
        tokenizer: its vocabulary.
        config: the settings of the run.
        decode_config: how captions are searched for.
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
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.run, self.decode_config = run, decode_config

    @classmethod
    def load(cls, run: Path | str, config: DecodeConfig = GREEDY) -> "Captioner":
        """Loads a run folder; raises InputError as `load_run` does."""
        loaded_model, tokenizer, run_config = load_run(run)
        config = dataclasses.replace(config, max_words=config.max_words or run_config.train.max_length)
        return cls(loaded_model, tokenizer, run_config, Path(run), config)

    def caption(self, image_path: Path | str) -> Caption:
        """Captions one image: the tutorial's `evaluate(image)`.

        Raises:
            InputError: the image cannot be read, or the CNN cannot be built.
        """
        # Read the image and compute its features, both as for training.
        pixels = features.load_image(image_path)[np.newaxis]  # (1, 299, 299, 3)
        image_features = self.extract_features(pixels)  # (1, 64, 2048)
        # Begin with <start>, and predict one word after the other, each from the word before it and the decoder's
        # state, until <end>. The tutorial draws a random word at every step; this takes the most probable one.
        decoded = decode(self.model, image_features, self.decode_config)  # the tokens are (1, T)
        # Look up the words of the ids. Each has its probability and its attention weights, for `plot_attention`.
        return to_captions(decoded, self.tokenizer)[0]

    def caption_pixels(self, pixels: np.ndarray) -> list[Caption]:
        """Captions images read by `features.load_image`, (B, 299, 299, 3) uint8."""
        return self.caption_features(self.extract_features(pixels))

    def caption_features(self, features: tf.Tensor) -> list[Caption]:
        """Captions image features, (B, 64, 2048)."""
        return decode_captions(self.model, self.tokenizer, features, self.decode_config)

    def extract_features(self, pixels: np.ndarray) -> tf.Tensor:
        """Computes the features (B, 64, 2048) of images (B, 299, 299, 3), rounded as those of the training were."""
        return tf.cast(self.extractor(pixels, training=False), self.config.features["dtype"])

    @functools.cached_property
    def extractor(self) -> tf.keras.Model:
        """The CNN whose features the run was trained on, built when it is first needed."""
        cnn_weights = find_cnn_weights(self.run) or self.config.features["weights"]
        check_cnn_weights(cnn_weights, self.config.features.get("sha256"))
        return features.build_feature_extractor(cnn_weights)


def caption_and_plot(
    captioner: Captioner, path: Path, folder: Path, name: str | None = None, image_format: str = "png"
) -> tuple[Caption, Path | None]:
    """Captions an image, and plots the attention into `<folder>/<name>_attention.<image_format>`.

    The name is that of the image, if none is given.

    Returns:
        The caption, and the path of the plot; None if it cannot be written there, which is logged.

    Raises:
        InputError: the image cannot be read.
        OSError: the disk is full.
    """
    caption = captioner.caption(path)
    plot_path = folder / f"{name or path.stem}_attention.{image_format}"
    image = read_image(path)
    try:
        plot_attention(image, caption.words, caption.attention, caption.probabilities, plot_path, caption.text)
    except OSError as error:  # the name is too long, or nothing may be written into the folder
        if error.errno == errno.ENOSPC:
            raise
        log(f"{plot_path}: the plot cannot be written ({error.strerror or error})", error=True)
        return caption, None
    return caption, plot_path


# The images of the command line.


def is_url(image: str) -> bool:
    """Tells whether an image is given by its address instead of its path."""
    return "://" in image


def download_image(url: str, folder: Path) -> Path:
    """Downloads an image into a folder.

    Raises:
        InputError: it cannot be downloaded, is too large, or the address is not http(s).
    """
    name = PurePosixPath(urllib.parse.urlsplit(url).path).name
    path = folder / (name if name.strip(".") else "image")
    return download(url, path, quiet=True, max_bytes=MAX_IMAGE_BYTES)


def expand_image_args(args: Sequence[str]) -> list[str]:
    """Replaces the folders among files and addresses by the images in them, except the plots of this script.

    Raises:
        InputError: a file or folder does not exist, or a folder has no images.
    """
    images = []
    for arg in args:
        if is_url(arg) or Path(arg).is_file():
            images.append(arg)
            continue
        if not Path(arg).is_dir():
            raise InputError(f"{arg}: no such image")
        paths = sorted(path for path in Path(arg).iterdir() if is_image_file(path))
        images_in_folder = [str(path) for path in paths if not path.stem.endswith("_attention")]
        if not images_in_folder:
            raise InputError(f"{arg}: expected a folder with images, found none in it")
        images += images_in_folder
    return images


class ResultWriter:
    """Prints the captions on standard output, and keeps small copies of the images for a grid of all."""

    def __init__(self, as_json: bool, grid: Path | None):
        self.as_json, self.grid = as_json, grid
        self.images_and_captions: list[tuple[Image.Image, str]] = []

    def write(self, label: str, path: Path, caption: Caption, plot_path: Path | None, text: str, **fields: Any) -> None:
        """Prints one result.

        Args:
            label: the name of the image in JSON.
            path: the image.
            caption: its caption.
            plot_path: its attention plot; None without one.
            text: what is printed without --json.
            **fields: further fields of the JSON object.
        """
        if self.as_json:
            words = [
                {"word": word, "probability": round(probability, 4)}
                for word, probability in zip(caption.words, caption.probabilities, strict=True)
            ]
            plot = plot_path and str(plot_path)
            result = {"image": label, "caption": caption.text, "words": words, "plot": plot, **fields}
            text = json.dumps(result)
        print(text, flush=True)
        if self.grid and len(self.images_and_captions) < MAX_GRID_IMAGES:
            self.images_and_captions.append((thumbnail(read_image(path)), caption.text))

    def write_grid(self) -> None:
        """Writes the grid, if it was asked for and there are images."""
        if self.grid and self.images_and_captions:
            plot_caption_grid(self.images_and_captions, self.grid)
            log(f"grid: {self.grid}")


def caption_images(
    captioner: Captioner, images: Sequence[str], folder: Path, writer: ResultWriter, image_format: str = "png"
) -> int:
    """Captions files and addresses, and plots the attention into a folder.

    Returns:
        The number of images that could not be read.

    Raises:
        InputError: the only image cannot be read, or the CNN cannot be built.
    """
    _ = captioner.extractor  # built here, so that its failure is not taken for that of an image
    num_failed = 0
    plot_names: set[str] = set()
    for image in images:
        label = redact_url(image) if is_url(image) else image
        with tempfile.TemporaryDirectory() as download_dir:
            try:
                path = download_image(image, Path(download_dir)) if is_url(image) else Path(image)
                name = path.stem
                while name in plot_names:  # a/dog.jpg and b/dog.jpg
                    name += "_"
                plot_names.add(name)
                caption, plot_path = caption_and_plot(captioner, path, folder, name, image_format)
            except InputError as error:
                if len(images) == 1:
                    raise
                log(f"inference.py: {error}", error=True)
                num_failed += 1
                continue
            text = caption.text if len(images) == 1 else f"{label}\t{caption.text}"
            writer.write(label, path, caption, plot_path, text)
        if plot_path:
            log(f"attention: {plot_path}")
    return num_failed


# The test images of the run.


def caption_test_images(
    captioner: Captioner,
    dataset: data_utils.CaptionDataset,
    num_images: int,
    seed: int | None,
    writer: ResultWriter,
    image_format: str = "png",
) -> None:
    """Captions random test images of the run's dataset, next to their reference captions, as the tutorial does.

    A dataset without test images gives validation images. The plots are written into the run folder.
    """
    plot_dir = captioner.run / "attention"
    candidates = [example for example in dataset.examples if example.split == "test"] or dataset.split("val")
    for example in random.Random(seed).sample(candidates, min(num_images, len(candidates))):
        path = dataset.image_dir / example.image_path
        try:
            caption, plot_path = caption_and_plot(captioner, path, plot_dir, image_format=image_format)
        except InputError as error:
            log(f"skipped {error}", error=True)
            continue
        references = [f"  reference: {text}" for text in example.captions]
        plots = [f"  attention: {plot_path}"] if plot_path else []
        text = "\n".join([str(path), *references, f"  predicted: {caption.text}", *plots])
        writer.write(str(path), path, caption, plot_path, text, references=example.captions)


# The command.


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every script that captions: the run, and how captions are searched for."""
    group = parser.add_argument_group("model and decoding")
    group.add_argument("--run", type=Path, metavar="DIR", help="run folder (default: the latest in runs/)")
    add_options(group, DecodeConfig)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser(__doc__, "[option ...] [image ...]")
    parser.add_argument(
        "image", nargs="*", help="files, folders or http(s) addresses of images (default: a few test images)"
    )
    add_model_options(parser)
    group = parser.add_argument_group("test images, if no images are given")
    group.add_argument("--num-images", type=int_at_least(1), metavar="N", default=3, help="how many (default: 3)")
    group.add_argument("--seed", type=int, metavar="N", help="seed of the choice (default: other images each time)")
    data_utils.add_location_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        default=Path(),
        help="folder for <image>_attention.png (default: the current one; of test images, the run folder)",
    )
    group.add_argument("--format", choices=FORMATS, default="png", help="of the attention plots (default: png)")
    text = f"write one plot of all images with their captions, {MAX_GRID_IMAGES} at most: .png, .svg or .pdf"
    group.add_argument("--grid", type=Path, metavar="FILE", help=text)
    text = "print a JSON object per image, one a line: image, caption, words with probabilities, plot"
    group.add_argument("--json", action="store_true", help=text)
    add_options(group, FeatureConfig, only=("max_megapixels",))
    add_quiet_option(group)
    args = parser.parse_args(argv)
    if args.grid and args.grid.suffix[1:].lower() not in FORMATS:
        raise InputError(f"--grid {args.grid}: expected a file that ends in .{', .'.join(FORMATS)}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Captions the images of the command line, or a few test images."""
    args = parse(argv)
    set_max_megapixels(args.max_megapixels)
    images = expand_image_args(args.image)
    captioner = Captioner.load(args.run or latest_run(), DecodeConfig.from_args(args))
    log(f"run: {captioner.run}")
    writer = ResultWriter(args.json, args.grid)
    num_failed = 0
    if images:
        num_failed = caption_images(captioner, images, args.output_dir, writer, args.format)
    else:
        dataset = data_utils.load_run_dataset(captioner.config, locations=data_utils.locations_from_args(args))
        caption_test_images(captioner, dataset, args.num_images, args.seed, writer, args.format)
    writer.write_grid()
    if num_failed:
        raise InputError(f"{num_failed} of {len(images)} images could not be captioned")


if __name__ == "__main__":
    run_main(main)
