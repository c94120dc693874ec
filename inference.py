"""Captions images with a trained model, and shows where it attends for each word.

Tutorial sections: "Caption!" and "Try it on your own images".

    python inference.py photo.jpg                       # the latest run; writes photo_attention.png
    python inference.py photos/ --csv results.csv       # all images in a folder; resumes if interrupted
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from PIL import Image

import data_utils
import features
import model
from captioning.base.cli import InputError, add_quiet_option, int_at_least, log, make_parser, progress_bar, run_main
from captioning.base.files import check_output, file_sha256
from captioning.base.quiet_tensorflow import tf
from captioning.config.guests import load_guest
from captioning.config.options import add_options
from captioning.config.run_config import RunConfig
from captioning.config.settings import DecodeConfig, FeatureConfig
from captioning.decoder.decoding import StepModel, decode
from captioning.images.feature_cache import check_cnn_weights, find_cnn_weights
from captioning.images.image_args import find_images, image_key, open_image, plot_paths, shown_name
from captioning.images.reading import ImageSource, map_threads, read_image, set_max_megapixels
from captioning.output.captions import Caption, to_captions
from captioning.output.plots import FORMATS, MAX_GRID_IMAGES, is_plot, thumbnail
from captioning.output.results import CaptionedImage, CsvWriter, GridWriter, JsonWriter, TextWriter, Writer, write_plot
from captioning.runs.run_folder import VOCABULARY_FILE, best_checkpoint, open_run, read_config, restore_model
from tokenizer import Tokenizer

GREEDY = DecodeConfig()  # the default: the most probable word at every step
BATCH_SIZE = 32  # images
NUM_AHEAD = 2  # batches of images that are read ahead
NUM_IMAGES = 3  # of the test images, unless it is said


# The captioner.


class Chooser(Protocol):
    """What chooses among the captions that a search has found; a guest, by --choose."""

    def choose(self, captions: Sequence[Caption], features: tf.Tensor) -> list[Caption]:
        """Ranks the captions of each of B images anew: the best first, all others as its alternatives.

        Args:
            captions: of each image, the others as its alternatives.
            features: (B, L, C), of the images.
        """


def decode_captions(
    model: StepModel,
    tokenizer: Tokenizer,
    features: tf.Tensor,
    config: DecodeConfig = GREEDY,
    chooser: Chooser | None = None,
    **options: Any,
) -> list[Caption]:
    """Captions a batch of image features, (B, L, C): L locations with C channels, of InceptionV3 (B, 64, 2048).

    Without a chooser the most probable captions are the best. The other options are those of `decode`.
    """
    captions = to_captions(decode(model, features, config, **options), tokenizer, config.num_candidates)
    if not chooser:
        return captions
    chosen = chooser.choose(captions, features)
    return [dataclasses.replace(each, alternatives=each.alternatives[: config.captions - 1]) for each in chosen]


def load_run(run: Path | str) -> tuple[model.CaptionModel, Tokenizer, RunConfig]:
    """Loads a run: the model with its best weights, its tokenizer and its settings, checked against each other."""
    run = Path(run)
    prefix = best_checkpoint(run)  # the epoch with the best score on the validation images, not the last one
    config = read_config(run)
    tokenizer = Tokenizer.load(run / VOCABULARY_FILE, config.data.words)
    # The weights know words only by their ids. With another vocabulary they would give fluent, but wrong captions.
    if file_sha256(run / VOCABULARY_FILE) != config.vocabulary_sha256 or len(tokenizer) != config.model.vocab_size:
        raise InputError(
            f"{run / VOCABULARY_FILE}: not the vocabulary these weights were trained with; restore this run's own"
        )
    build = functools.partial(model.build, features_shape=config.cnn.features_shape)
    return restore_model(prefix, config.model, build), tokenizer, config


class Captioner:
    """A trained run that captions images.

    Attributes:
        decode_config: how captions are searched for.
        image_size: the sides of the square images that the CNN takes, in pixels.
        compile_cnn: whether the CNN runs as a graph, which is several times faster but takes seconds to build.
        locations: where the data of the run, and its `features_dir`, are now, if they were moved.
    """

    def __init__(
        self,
        model: model.CaptionModel,
        tokenizer: Tokenizer,
        config: RunConfig,
        run: Path,
        decode_config: DecodeConfig = GREEDY,
        compile_cnn: bool = True,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.run = run
        self.decode_config = self._with_max_words(decode_config)
        self.image_size = config.cnn.image_size
        self.compile_cnn = compile_cnn
        self.locations: Mapping[str, Any] = {}
        self._choosers: dict[str, Chooser] = {}  # of this captioner and those of other searches of the run

    @classmethod
    def load(
        cls,
        run: Path | str | None,
        config: DecodeConfig = GREEDY,
        compile_cnn: bool = True,
        locations: Mapping[str, Any] = MappingProxyType({}),
    ) -> "Captioner":
        """Loads a run: its folder, a .zip of it or the address of one; None for the latest in runs/."""
        if config.length_penalty != 1 and (config.sample or config.num_beams == 1 or config.choose != "probability"):
            log("--length-penalty changes nothing: it ranks the captions of a beam by probability, see --beam-size")
        folder = open_run(run)
        captioner = cls(*load_run(folder), folder, config, compile_cnn)
        captioner.locations = locations
        return captioner

    def with_decoding(self, config: DecodeConfig) -> "Captioner":
        """Returns a captioner of the same run with another search; they share the CNN if it is built already."""
        other = copy.copy(self)
        other.decode_config = self._with_max_words(config)
        return other

    @property
    def chooser(self) -> Chooser | None:
        """What chooses among the captions of a beam, loaded when it is first needed; None if their probability does."""
        choose = self.decode_config.choose
        if choose == "probability":
            return None
        if choose not in self._choosers:
            self._choosers[choose] = load_guest(f"--choose {choose}").make_chooser(self)
        return self._choosers[choose]

    def _with_max_words(self, config: DecodeConfig) -> DecodeConfig:
        """Fills in the run's longest caption: the model has never seen a longer one."""
        return dataclasses.replace(config, max_words=config.max_words or self.config.train.max_length)

    def caption(self, image: ImageSource) -> Caption:
        """Captions one image: the tutorial's `evaluate(image)`. Raises InputError if it cannot be read.

        Args:
            image: a path, a file's content, an open file, pixels or a Pillow image; see `reading.read_image`.
        """
        image = image.read() if hasattr(image, "read") else image  # an open file can be read only once
        # Read the image and compute its features exactly as for the training: the model knows no others.
        pixels = self.load_image(image)[np.newaxis]  # (1, 299, 299, 3)
        image_features = self.extract_features(pixels)  # (1, 64, 2048)
        # Begin with <start> and predict one word after the other, each from the word before it and the decoder's state,
        # until <end>. The tutorial draws each word at random by its probability, so that a bad word comes up now and
        # then, and the next call gives another caption. Greedy search takes the most probable word at every step, which
        # is repeatable. A beam search (--beam-size) also keeps captions whose first words are less probable, but which
        # are more probable as a whole. The pixels only seed the random words of --sample.
        # Then look up the words of the ids, (1, T). Each has its probability, and its attention weights: the shares,
        # which sum to 1, of the 64 locations in the context vector from which the word was predicted. `plot_attention`
        # draws them over the image. They show where the model looked, which is not always why it chose the word.
        caption = self._decode(image_features, pixels)[0]
        return dataclasses.replace(caption, image=image)

    def caption_batch(self, images: Iterable[ImageSource], batch_size: int = BATCH_SIZE) -> list[Caption]:
        """Captions many images, faster than one by one. Raises InputError if one cannot be read."""
        sources = (image.read() if hasattr(image, "read") else image for image in images)
        # Threads read the next images while the CNN and the decoder work on these.
        loaded = map_threads(self.load_image, sources, NUM_AHEAD * batch_size)
        captions = []
        while batch := list(itertools.islice(loaded, batch_size)):
            pixels = np.stack([pixels for _, pixels in batch])  # (B, 299, 299, 3)
            for (image, _), caption in zip(batch, self.caption_pixels(pixels), strict=True):
                captions.append(dataclasses.replace(caption, image=image))
        return captions

    def load_image(self, image: ImageSource) -> np.ndarray:
        """Reads an image as for the training, (size, size, 3) uint8; see `features.load_image`."""
        return features.load_image(image, self.image_size)

    def caption_pixels(self, pixels: np.ndarray) -> list[Caption]:
        """Captions images read by `load_image`, (B, size, size, 3) uint8."""
        # The captions of a batch grow in step, word by word. One that has its <end> is padded until the longest
        # has ended, too.
        return self._decode(self.extract_features(pixels), pixels)

    def _decode(self, image_features: tf.Tensor, pixels: np.ndarray) -> list[Caption]:
        config, chooser = self.decode_config, self.chooser
        return decode_captions(self.model, self.tokenizer, image_features, config, chooser, pixels=pixels)

    def extract_features(self, pixels: np.ndarray) -> tf.Tensor:
        """Computes the features (B, L, C) of images (B, size, size, 3)."""
        # Without training=False, batch normalization would use the statistics of these images, not the trained ones.
        image_features = self._run_extractor(pixels, training=False)
        # The training read its features from a cache, which usually rounds them to float16. They are rounded here, too,
        # so that an image has the same caption whether its features were cached or not.
        return tf.cast(image_features, self.config.features["dtype"])

    @functools.cached_property
    def extractor(self) -> tf.keras.Model:
        """The CNN whose features the run was trained on, built when it is first needed."""
        # The run folder has its own copy of weights that cannot be downloaded. Features of other weights would mean
        # something else in every channel, and the captions would be nonsense without an error: hence the SHA-256.
        cnn_weights = find_cnn_weights(self.run) or self.config.features["weights"]
        check_cnn_weights(cnn_weights, self.config.features.get("sha256"))
        return features.build_feature_extractor(cnn_weights, self.config.cnn)

    @functools.cached_property
    def _run_extractor(self) -> tf.keras.Model | tf.types.experimental.PolymorphicFunction:
        return tf.function(self.extractor, reduce_retracing=True) if self.compile_cnn else self.extractor


def caption_and_plot(captioner: Captioner, path: Path, folder: Path) -> tuple[Caption, Path | None]:
    """Captions an image, and plots the attention for each word into a folder.

    Returns:
        The caption, and the path of the plot; None if it cannot be written there, which is logged.
    """
    # The plot has the proportions of the image, and the CNN a square: the grid of attention is stretched for it.
    image = read_image(path, 2 * captioner.image_size)
    caption = captioner.caption(image)
    plot_path = folder / f"{path.stem}_attention.png"
    return caption, plot_path if write_plot(thumbnail(image), caption, plot_path) else None


# Many images.


def caption_stream(
    captioner: Captioner,
    images: Iterable[str],
    batch_size: int = BATCH_SIZE,
    with_copies: bool = True,
    before_reading: Callable[[str], None] = lambda _: None,
) -> Iterator[CaptionedImage | InputError]:
    """Captions files and addresses in batches; the next ones are read, or downloaded, while the CNN computes.

    Args:
        captioner: the run.
        images: paths and addresses; any number of them, since the memory does not grow with it.
        batch_size: images that are captioned at the same time.
        with_copies: whether to give a small copy of each image, for plots and other outputs that show it.
        before_reading: is called with each image before it is read, in any thread.

    Yields:
        Each image with its caption, in the given order, or the reason why it cannot be read.
    """

    def load(image: str) -> tuple[np.ndarray, Image.Image | None] | InputError:
        # A bad image must not stop the others: its error is passed on as a value.
        before_reading(image)
        try:
            whole = open_image(image, 2 * captioner.image_size)
        except InputError as error:
            return error
        # The image itself is dropped: a batch of large photos would fill the memory.
        return features.to_pixels(whole, captioner.image_size), thumbnail(whole) if with_copies else None

    loaded = map_threads(load, images, NUM_AHEAD * batch_size)
    while batch := list(itertools.islice(loaded, batch_size)):
        # Only images that could be read go through the CNN; their captions are taken in the same order below.
        pixels = [result[0] for _, result in batch if not isinstance(result, InputError)]
        captions = iter(captioner.caption_pixels(np.stack(pixels)) if pixels else [])
        for name, result in batch:
            if isinstance(result, InputError):
                yield result
            else:
                yield CaptionedImage(shown_name(name), result[1], next(captions))


def caption_images(
    captioner: Captioner,
    images: Sequence[str],
    writers: Sequence[Writer],
    plots: dict[str, Path] | None = None,
    batch_size: int = BATCH_SIZE,
    references: Mapping[str, Sequence[str]] | None = None,
) -> int:
    """Captions files and addresses, and hands each caption to the writers.

    Args:
        captioner: the run.
        images: paths and addresses.
        writers: the outputs.
        plots: the file of each image's attention plot, if plots are wanted.
        batch_size: images that are captioned at the same time.
        references: the captions that people wrote for each image, if they are known.

    Returns:
        The number of images that could not be read, which are logged. If it is the only one, that is an InputError.
    """
    for path in plots.values() if plots else ():
        check_output("--output-dir", path, is_plot)
    num_failed = 0
    # Copies cost time and memory: only if something shows the images.
    with_copies = plots is not None or any(writer.shows_images for writer in writers)
    tables = [writer for writer in writers if isinstance(writer, CsvWriter)]
    before_reading = tables[0].note if tables else lambda _: None
    results = caption_stream(captioner, images, batch_size, with_copies, before_reading)
    with progress_bar(total=len(images), unit="image", desc="captions", disable=len(images) <= 1) as progress:
        for image, result in zip(images, results, strict=True):
            progress.update()
            if isinstance(result, InputError):
                if len(images) == 1:
                    raise result
                log(f"inference.py: {result}", error=True)
                num_failed += 1
                continue
            plot = plots[image] if plots else None
            if plot and not (result.image and write_plot(result.image, result.caption, plot)):
                plot = None
            if references:
                result = result._replace(references=references[image])
            elif plot:
                log(f"attention: {plot}")
            for writer in writers:
                writer.write(result, plot)
    return num_failed


def caption_test_images(
    captioner: Captioner,
    dataset: data_utils.CaptionDataset,
    num_images: int,
    seed: int | None,
    writers: Sequence[Writer],
    image_format: str | None = "png",
) -> int:
    """Captions random test images of the run's dataset, next to their reference captions, as the tutorial does.

    The choice is another one each time, unless a seed is given. The attention plots are written into the run folder,
    unless their format is None. Returns the number of images that could not be read.
    """
    # Not training images: the model may have memorized their captions. A dataset need not have test images.
    candidates = [example for example in dataset.examples if example.split == "test"] or dataset.split("val")
    examples = random.Random(seed).sample(candidates, min(num_images, len(candidates)))
    references = {str(dataset.image_dir / example.image_path): example.captions for example in examples}
    plots = plot_paths(references, captioner.run / "attention", image_format) if image_format else None
    return caption_images(captioner, list(references), writers, plots, references=references)


# The command.


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every script that captions: the run, and how captions are searched for."""
    parser.add_argument_group("model").add_argument(
        "--run", metavar="DIR|ZIP|URL", help="run folder, a .zip of one, or its address (default: the latest in runs/)"
    )
    add_options(parser.add_argument_group("decoding"), DecodeConfig)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; `args.inputs` are the paths and addresses of the images, each once."""
    parser = make_parser(__doc__, "[option ...] [image ...]")
    add = parser.add_argument
    add("image", nargs="*", help="files, folders or addresses of images (default: a few test images)")
    list_help = "read more images from a list, one a line; - reads it from standard input"
    add("--from", dest="image_list", metavar="FILE", help=list_help)
    add_model_options(parser)
    add = parser.add_argument_group("test images, if no images are given").add_argument
    add("--num-images", type=int_at_least(1), metavar="N", help=f"caption this many (default: {NUM_IMAGES})")
    add("--seed", type=int, metavar="N", help="seed of the choice (default: other images each time)")
    data_utils.add_location_options(parser)
    add_output_options(parser.add_argument_group("output"))
    args = parser.parse_args(argv)
    if args.grid and args.grid.suffix[1:].lower() not in FORMATS:
        raise InputError(f"--grid {args.grid}: expected a file that ends in .{', .'.join(FORMATS)}")
    if args.csv and not (args.image or args.image_list):
        raise InputError("--csv is for the images of the command line; evaluate.py captions those of a split")
    if args.output_dir and not (args.image or args.image_list):
        raise InputError("--output-dir is for the images of the command line; plots of test images are in the run")
    if (args.image or args.image_list) and (args.num_images, args.seed) != (None, None):
        raise InputError("--num-images and --seed choose test images; omit them, or the images")
    args.num_images = args.num_images or NUM_IMAGES
    args.inputs = find_images(args.image, args.image_list)
    if args.grid:
        check_output("--grid", args.grid, is_plot, args.inputs)
    return args


def add_output_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options that say where captions and plots go, and how images are read."""
    add = group.add_argument
    add("--csv", type=Path, metavar="FILE", help="write a table of the captions; run again, the command resumes it")
    add("--json", action="store_true", help="print a JSON object for each image, one a line")
    plots_help = "plot the attention of each image (default: of one image, and of test images)"
    add("--plots", action=argparse.BooleanOptionalAction, help=plots_help)
    dir_help = "write <image>_attention.png there (default: the current folder); those of test images are in the run"
    add("--output-dir", type=Path, metavar="DIR", help=dir_help)
    add("--format", choices=FORMATS, default="png", help="format of the plots (default: png)")
    grid_help = f"write one plot of the images with their captions, {MAX_GRID_IMAGES} at most: .png, .svg or .pdf"
    add("--grid", type=Path, metavar="FILE", help=grid_help)
    add_options(group, FeatureConfig, only=("cnn_batch_size", "max_megapixels"))
    add_quiet_option(group)


def load_captioner(args: argparse.Namespace) -> Captioner:
    """Loads the run of the command line."""
    set_max_megapixels(args.max_megapixels)
    # For a single image, building a graph of the CNN would take longer than running it as it is.
    compile_cnn = (len(args.inputs) or args.num_images) > 1
    locations = data_utils.locations_from_args(args)
    captioner = Captioner.load(args.run, DecodeConfig.from_args(args), compile_cnn, locations)
    log(f"run: {captioner.run}")
    return captioner


def caption_from_args(args: argparse.Namespace, captioner: Captioner, writers: Iterable[Writer] = ()) -> int:
    """Captions the images of the command line, or a few test images.

    `writers` are outputs in addition to those that the command line asks for. Returns the number of images that could
    not be read, which are logged.
    """
    outputs = list(writers)
    images = args.inputs
    with contextlib.ExitStack() as stack:  # closes the table and draws the grid at the end
        if args.csv:
            table = CsvWriter(args.csv, captioner.run, captioner.decode_config, args.inputs)
            stack.enter_context(contextlib.closing(table))
            outputs.append(table)
            images = [image for image in args.inputs if image_key(shown_name(image)) not in table.done]
            if num_done := len(args.inputs) - len(images):
                log(f"{args.csv}: {num_done:,} of {len(args.inputs):,} images are in it already; all outputs skip them")
        if args.json:
            outputs.append(JsonWriter())
        elif not args.csv:  # of thousands of images nobody reads the captions twice
            outputs.append(TextWriter(show_names=len(args.inputs) > 1))
        if args.grid:
            outputs.append(stack.enter_context(contextlib.closing(GridWriter(args.grid))))
        if not args.inputs:
            dataset = data_utils.load_run_dataset(captioner.config, locations=data_utils.locations_from_args(args))
            image_format = None if args.plots is False else args.format
            return caption_test_images(captioner, dataset, args.num_images, args.seed, outputs, image_format)
        with_plots = len(args.inputs) == 1 if args.plots is None else args.plots  # None: neither option was given
        # The names come from all images, so that a command which is resumed gives each plot the same name again.
        plots = plot_paths(args.inputs, args.output_dir or Path(), args.format) if with_plots else None
        if args.output_dir and not plots:
            log("--output-dir is for plots, and there are none; of several images, --plots asks for them")
        return caption_images(captioner, images, outputs, plots, args.cnn_batch_size or BATCH_SIZE)


def check_all_captioned(num_failed: int, args: argparse.Namespace) -> None:
    """Raises InputError, for the exit code, if images could not be captioned."""
    if num_failed:
        raise InputError(f"{num_failed} of {len(args.inputs) or args.num_images} images could not be captioned")


def main(argv: list[str] | None = None) -> None:
    """Captions the images of the command line, or a few test images."""
    args = parse(argv)
    captioner = load_captioner(args)
    check_all_captioned(caption_from_args(args, captioner), args)


if __name__ == "__main__":
    run_main(main)
