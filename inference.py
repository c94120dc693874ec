"""Captions pictures, and shows where the model looked for each word.

    python inference.py photo.jpg                         # the newest run; writes photo_attention.png
    python inference.py --run runs/coco --beam-size 5 a.jpg b.png
    python inference.py https://example.com/photo.jpg photos/
    python inference.py *.jpg --json --grid all.png | jq  # results for programs, and a picture of all
    python inference.py                                   # a few held-out pictures, real and predicted captions

From Python: `Captioning.load("runs/coco").caption("photo.jpg").text`.
"""

from common import (
    InputError,
    add_quiet,
    at_least,
    check_fields,
    file_sha256,
    from_zero,
    make_parser,
    read_json,
    run_command,
    say,
)  # before TensorFlow

import argparse
import json
import os
import random
import tempfile
import typing
import urllib.parse
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import features
import numpy as np
import tensorflow as tf
from PIL import Image

import data_utils
import model
from downloads import download, shown
from plots import FORMATS, GRID_PICTURES, plot_attention, plot_overview, thumbnail
from search import LENGTH_PENALTY, Caption, caption_features
from tokenizer import Tokenizer

MAX_DOWNLOAD = 50_000_000  # bytes of a picture on the web


# A run folder: all that captioning needs.


def newest_run(folder: Path | str = "runs") -> Path:
    """The run whose checkpoint was written last.

    Raises:
        InputError: there is no run with a checkpoint.
    """
    checkpoints = sorted(Path(folder).glob("*/checkpoints/*/checkpoint"), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        raise InputError(
            f"no run with a checkpoint in {folder}/; train one with `python train.py`, or name one with --run"
        )
    return checkpoints[-1].parents[2]


def checkpoint_of(run: Path) -> str:
    """The prefix of a run's best checkpoint, or of its last while there is no best.

    Raises:
        InputError: the folder is no run, or has no checkpoint.
    """
    if not (run / "config.json").exists():
        raise InputError(f"{run}: not a run folder (it has no config.json); expected one that train.py made")
    for name in ("best", "last"):
        if prefix := latest_checkpoint(run / "checkpoints" / name):
            return prefix
    raise InputError(f"{run}: no checkpoint in {run / 'checkpoints'}/; train it with `python train.py`")


def latest_checkpoint(folder: Path) -> str | None:
    """The prefix of the checkpoint in a folder, None while there is none.

    Raises:
        InputError: the file that names it cannot be read, or names what is not there. TensorFlow would see no
            checkpoint, and training would begin again.
    """
    state = folder / "checkpoint"
    if not state.exists():
        return None
    try:
        prefix = tf.train.get_checkpoint_state(folder).model_checkpoint_path
    except (ValueError, AttributeError):  # not UTF-8 or without a name; None, which is no such file
        prefix = ""
    if not os.path.exists(f"{prefix}.index"):
        raise InputError(f"{state}: damaged, or the checkpoint it names is gone; put both back, or delete {folder}")
    return prefix


def read_config(run: Path) -> dict[str, Any]:
    """A run's config.json; raises InputError if it lacks what captioning needs, or holds what cannot be."""
    config = read_json(run / "config.json")
    try:
        check_fields(
            config, dict.fromkeys(("model", "training", "data", "features"), dict) | {"vocabulary_sha256": str}
        )
        check_fields(config["model"], typing.get_type_hints(model.ModelConfig))
        model.ModelConfig(**config["model"])
        check_fields(config["data"], {"fingerprint": str, "unreadable": list})
        check_fields(config["data"], typing.get_type_hints(data_utils.DataOptions))
        options_of(config)
        features.check_settings(config["features"])
        check_fields(config["features"], {"folder": str})
        if not all(isinstance(name, str) for name in config["data"]["unreadable"]):
            raise InputError(f"unreadable: expected names of pictures, found {config['data']['unreadable']}")
    except (InputError, TypeError) as error:  # the latter of fields that are not known
        raise InputError(f"{run / 'config.json'}: not the config.json of a run ({error})") from None
    return config


def options_of(config: dict[str, Any]) -> data_utils.DataOptions:
    """The data options in a run's config.json."""
    found = config["data"].items()
    return data_utils.DataOptions(**{key: value for key, value in found if key not in ("fingerprint", "unreadable")})


def load_run(run: Path | str) -> tuple[model.Captioner, Tokenizer, dict[str, Any]]:
    """Loads a run's best weights, its vocabulary and its config.json, checked against each other.

    Raises:
        InputError: something is missing or does not belong together.
    """
    run = Path(run)
    prefix = checkpoint_of(run)
    config = read_config(run)
    words = Tokenizer.load(run / "vocabulary.json")
    settings = model.ModelConfig(**config["model"])
    expected = config["vocabulary_sha256"]
    if file_sha256(run / "vocabulary.json") != expected or len(words) != settings.vocabulary_size:
        raise InputError(
            f"{run / 'vocabulary.json'}: not the vocabulary these weights were trained with; put back the "
            "vocabulary.json of this run"
        )
    sizes = {settings.vocabulary_size, settings.embedding_dim, settings.units}
    try:
        shapes = tf.train.load_checkpoint(prefix).get_variable_to_shape_map().values()
        if missing := sizes - {size for shape in shapes for size in shape}:  # before a model of any size is built
            raise ValueError(f"no weights of size {min(missing)} in it")
        captioner = model.build(settings)
        tf.train.Checkpoint(captioner=captioner).restore(prefix).expect_partial().assert_existing_objects_matched()
    except (tf.errors.OpError, ValueError, IndexError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise InputError(f"{prefix}: damaged, or not the weights of this config.json ({reason})") from None
    return captioner, words, config


class Captioning:
    """A trained run that captions pictures, with a beam of this size."""

    def __init__(
        self,
        captioner: model.Captioner,
        words: Tokenizer,
        config: dict[str, Any],
        run: Path,
        beam_size: int = 1,
        length_penalty: float = LENGTH_PENALTY,
    ):
        self.captioner, self.words, self.config, self.run = captioner, words, config, run
        self.beam_size, self.length_penalty = beam_size, length_penalty
        self._cnn: tf.keras.Model | None = None

    @classmethod
    def load(cls, run: Path | str, beam_size: int = 1, length_penalty: float = LENGTH_PENALTY) -> "Captioning":
        """Loads a run folder; raises InputError, see `load_run`."""
        return cls(*load_run(run), Path(run), beam_size, length_penalty)

    @property
    def cnn(self) -> tf.keras.Model:
        """The CNN whose features the run was trained on, built when first needed."""
        if self._cnn is None:
            settings = self.config["features"]
            weights = features.own_weights(self.run) or settings["weights"]
            features.check_weights(weights, settings.get("sha256"))
            self._cnn = features.build_cnn(weights)
        return self._cnn

    def caption(self, picture: Path | str) -> Caption:
        """Captions one picture; raises InputError if it cannot be read."""
        return self.caption_pixels(features.load_image(picture)[np.newaxis])[0]

    def caption_pixels(self, pixels: np.ndarray) -> list[Caption]:
        """Captions pictures read by `features.load_image`, (B, 299, 299, 3) uint8."""
        # Rounded as the cached features of the training were.
        return self.caption_features(tf.cast(self.cnn(pixels, training=False), self.config["features"]["dtype"]))

    def caption_features(self, pictures: tf.Tensor) -> list[Caption]:
        """Captions features, (B, 64, 2048)."""
        return caption_features(self.captioner, self.words, pictures, self.beam_size, self.length_penalty)


def caption_and_plot(
    captioning: Captioning, path: Path, folder: Path, name: str | None = None, kind: str = "png"
) -> tuple[Caption, Path]:
    """Captions a picture and writes `<name>_attention.<kind>` into a folder; raises InputError if it cannot be read."""
    caption = captioning.caption(path)
    plot = folder / f"{name or path.stem}_attention.{kind}"
    with Image.open(path) as picture:
        plot_attention(picture, caption, plot)
    return caption, plot


# The command.


def is_address(picture: str) -> bool:
    """Whether a picture is named by its address, not by its path."""
    return "://" in picture


def fetch(address: str, folder: Path) -> Path:
    """Downloads a picture; raises InputError if it cannot be had, is too large, or the address is not http(s)."""
    name = PurePosixPath(urllib.parse.urlsplit(address).path).name
    return download(address, folder / (name if name.strip(".") else "picture"), quiet=True, limit=MAX_DOWNLOAD)


def pictures_of(named: str) -> list[str]:
    """What a word of the command line names: a file, an address, or a folder's pictures, less the plots of this script.

    Raises:
        InputError: there is no such picture, or none in the folder.
    """
    if is_address(named) or Path(named).is_file():
        return [named]
    if not Path(named).is_dir():
        raise InputError(f"{named}: no such picture")
    known = set(Image.registered_extensions())
    files = sorted(path for path in Path(named).iterdir() if path.suffix.lower() in known)
    if not (found := [str(path) for path in files if not path.stem.endswith("_attention")]):
        raise InputError(f"{named}: expected a folder with pictures, found none in it")
    return found


class Results:
    """Says the captions on standard output, and keeps the pictures for an overview."""

    def __init__(self, as_json: bool, grid: Path | None):
        self.as_json, self.grid = as_json, grid
        self.pictures: list[tuple[Image.Image, str]] = []

    def add(self, label: str, path: Path, caption: Caption, plot: Path, text: str, **more: Any) -> None:
        """A captioned picture; `text` is how it is said without --json."""
        if self.as_json:
            words = [
                {"word": word, "probability": round(probability, 4)}
                for word, probability in zip(caption.words, caption.probabilities, strict=True)
            ]
            text = json.dumps({"picture": label, "caption": caption.text, "words": words, "plot": str(plot)} | more)
        print(text, flush=True)
        if self.grid and len(self.pictures) < GRID_PICTURES:
            with Image.open(path) as picture:
                self.pictures.append((thumbnail(picture), caption.text))

    def write_grid(self) -> None:
        """Writes the overview, if one is wanted and there is a picture to show."""
        if self.grid and self.pictures:
            plot_overview(self.pictures, self.grid)
            say(f"overview: {self.grid}")


def caption_files(
    captioning: Captioning, pictures: Sequence[str], output: Path, results: Results, kind: str = "png"
) -> int:
    """Captions files and addresses, and plots their attention; returns how many could not be read.

    Raises:
        InputError: the only one cannot be read; or the CNN cannot be built.
    """
    _ = captioning.cnn  # so that its failure is not taken for that of a picture
    failed, taken = 0, set()
    for picture in pictures:
        label = shown(picture) if is_address(picture) else picture
        with tempfile.TemporaryDirectory() as folder:
            try:
                path = fetch(picture, Path(folder)) if is_address(picture) else Path(picture)
                name = path.stem
                while name in taken:  # a/dog.jpg and b/dog.jpg
                    name += "_"
                taken.add(name)
                caption, plot = caption_and_plot(captioning, path, output, name, kind)
            except InputError as error:
                if len(pictures) == 1:
                    raise
                say(f"inference.py: {error}", error=True)
                failed += 1
                continue
            text = caption.text if len(pictures) == 1 else f"{label}\t{caption.text}"
            results.add(label, path, caption, plot, text)
        say(f"attention: {plot}")
    return failed


def dataset_of(config: dict[str, Any], pictures: bool = True) -> data_utils.Dataset:
    """The data a run was trained on, read again from where its config.json says; see `data_utils.load_dataset`.

    Raises:
        InputError: it is not there, or not the same any more, so that its held-out pictures may not be held out.
    """
    try:
        dataset = data_utils.load_dataset(options_of(config), pictures).without(set(config["data"]["unreadable"]))
    except InputError as error:
        raise InputError(f"the data of the run's config.json: {error}") from None
    if dataset.fingerprint != config["data"]["fingerprint"]:
        raise InputError(
            "the data have changed since this run was trained: their fingerprint is not that of its config.json, and "
            "the split may be another; restore them, or train anew"
        )
    return dataset


def caption_held_out(captioning: Captioning, count: int, seed: int | None, results: Results, kind: str = "png") -> None:
    """Captions random held-out pictures of the run's data, beside what people wrote, as the tutorial ends."""
    dataset = dataset_of(captioning.config)
    held_out = [example for example in dataset.examples if example.split == "test"] or dataset.split("val")
    for example in random.Random(seed).sample(held_out, min(count, len(held_out))):
        path = dataset.images / example.image
        try:
            caption, plot = caption_and_plot(captioning, path, captioning.run / "attention", kind=kind)
        except InputError as error:
            say(f"skipped {error}", error=True)
            continue
        real = [f"  real:      {text}" for text in example.captions]
        text = "\n".join([str(path), *real, f"  predicted: {caption.text}", f"  attention: {plot}"])
        results.add(str(path), path, caption, plot, text, real=example.captions)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run and the search, for every script that captions."""
    group = parser.add_argument_group("the model and its search")
    group.add_argument("--run", type=Path, metavar="DIR", help="run folder (default: the newest in runs/)")
    group.add_argument(
        "--beam-size",
        type=at_least(1),
        metavar="N",
        default=1,
        help="captions followed at the same time; 1 takes the most probable word at every step (default: 1)",
    )
    group.add_argument(
        "--length-penalty",
        type=from_zero,
        metavar="X",
        default=LENGTH_PENALTY,
        help="a beam's captions compete by log p / length ** this; more prefers longer ones (default: %(default)s)",
    )


def main(argv: list[str] | None = None) -> None:
    """Captions the pictures of the command line."""
    parser = make_parser(__doc__, "[option ...] [picture ...]")
    parser.add_argument(
        "pictures",
        nargs="*",
        help="files, folders or http(s) addresses of pictures to caption (default: a few held-out ones)",
    )
    add_arguments(parser)
    group = parser.add_argument_group("held-out pictures, when none are named")
    group.add_argument("--count", type=at_least(1), metavar="N", default=3, help="how many (default: 3)")
    group.add_argument("--seed", type=int, metavar="N", help="which ones (default: others each time)")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        default=Path(),
        help="where <picture>_attention.png goes (default: here; of held-out pictures, into the run folder)",
    )
    group.add_argument("--format", choices=FORMATS, default="png", help="of the attention plots (default: png)")
    text = f"write one picture of all, the first {GRID_PICTURES} at most, with their captions: .png, .svg or .pdf"
    group.add_argument("--grid", type=Path, metavar="FILE", help=text)
    text = "print a JSON object for every picture, one a line: picture, caption, words with probabilities, plot"
    group.add_argument("--json", action="store_true", help=text)
    add_quiet(group)
    args = parser.parse_args(argv)
    if args.grid and args.grid.suffix[1:].lower() not in FORMATS:
        raise InputError(f"--grid {args.grid}: expected a file that ends in .{', .'.join(FORMATS)}")
    pictures = [picture for named in args.pictures for picture in pictures_of(named)]
    captioning = Captioning.load(args.run or newest_run(), args.beam_size, args.length_penalty)
    say(f"run: {captioning.run}")
    results, failed = Results(args.json, args.grid), 0
    if pictures:
        failed = caption_files(captioning, pictures, args.output_dir, results, args.format)
    else:
        caption_held_out(captioning, args.count, args.seed, results, args.format)
    results.write_grid()
    if failed:
        raise InputError(f"{failed} of {len(pictures)} pictures could not be captioned")


if __name__ == "__main__":
    run_command(main)
