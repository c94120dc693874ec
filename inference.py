"""Captions pictures, and shows where the model looked for each word.

    python inference.py photo.jpg                         # the newest run; writes photo_attention.png
    python inference.py --run runs/coco --beam-size 5 a.jpg b.png
    python inference.py https://example.com/photo.jpg
    python inference.py                                   # a few held-out pictures, real and predicted captions

From Python: `Captioning.load("runs/coco").caption("photo.jpg").text`.
"""

from common import (
    InputError,
    at_least,
    check_fields,
    file_sha256,
    from_zero,
    read_json,
    run_command,
    say,
)  # before TensorFlow

import argparse
import dataclasses
import math
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
from tokenizer import END, PAD, START, UNK, Tokenizer

MAX_WORDS = 50  # a caption that has not ended by then is cut
MAX_DOWNLOAD = 50_000_000  # bytes of a picture on the web
LENGTH_PENALTY = 1.0  # captions compete by their mean log p


@dataclasses.dataclass(frozen=True)
class Caption:
    """A caption, and what led to it."""

    words: tuple[str, ...]
    probabilities: tuple[float, ...]  # of each word, given those before it
    attention: np.ndarray  # (number of words, 64), how much each word looked at each location; sums to 1
    ended: bool  # whether the model said <end>, or was cut after MAX_WORDS

    @property
    def text(self) -> str:
        """The words in one line."""
        return " ".join(self.words)


# Decoding.


def never_said(vocabulary_size: int) -> tf.Tensor:
    """Which words no caption says: <pad>, <unk> and <start>; (vocabulary,) bool."""
    return tf.reduce_any(tf.one_hot([PAD, UNK, START], vocabulary_size, True, False), axis=0)


@tf.function(reduce_retracing=True)
def greedy_search(captioner: model.Captioner, pictures: tf.Tensor, max_words: int = MAX_WORDS) -> tuple[tf.Tensor, ...]:
    """The most probable word at every step, until <end>; never <pad>, <unk> or <start>.

    Args:
        captioner: the model.
        pictures: features, (B, 64, 2048).
        max_words: where a caption that does not end is cut.

    Returns:
        tokens (B, T), <end> included and padded with <pad>; their probabilities (B, T); attention weights
        (B, T, 64). T is at most `max_words`.
    """
    encoded = captioner.encode(pictures)
    batch = tf.shape(pictures)[0]
    token = tf.fill([batch], START)
    state = captioner.decoder.initial_state(batch)
    ended = tf.zeros([batch], tf.bool)
    never = never_said(captioner.config.vocabulary_size)
    tokens, probabilities, looks = (
        tf.TensorArray(kind, 0, dynamic_size=True) for kind in (tf.int32, tf.float32, tf.float32)
    )
    for t in tf.range(max_words):
        logits, state, weights = captioner.step(token, state, encoded)
        logits = tf.where(never, -np.inf, tf.cast(logits, tf.float32))  # (B, vocabulary)
        token = tf.where(ended, PAD, tf.argmax(logits, axis=1, output_type=tf.int32))  # (B,)
        tokens = tokens.write(t, token)
        probabilities = probabilities.write(t, tf.reduce_max(tf.nn.softmax(logits), axis=1))
        looks = looks.write(t, tf.cast(weights, tf.float32))
        ended |= token == END
        if tf.reduce_all(ended):
            break
    # Stacked by step, wanted by picture.
    swap = tf.experimental.numpy.swapaxes
    return swap(tokens.stack(), 0, 1), swap(probabilities.stack(), 0, 1), swap(looks.stack(), 0, 1)


def best_continuations(scores: tf.Tensor, log_p: tf.Tensor, ended: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """The K most probable captions that are one word longer than K others.

    Args:
        scores: (B, K), log p of the captions.
        log_p: (B, K, vocabulary), of their next words.
        ended: (B, K) bool. Such a caption has one continuation, <pad>, which costs nothing and which nothing can
            push out.

    Returns:
        All (B, K): which caption each continues, its new word, log p of the whole, and p of the word.
    """
    batch, (beam_size, vocabulary) = tf.shape(log_p)[0], log_p.shape[1:]
    padding = tf.one_hot(PAD, vocabulary, 0.0, -np.inf)
    log_p = tf.where(ended[:, :, tf.newaxis], padding, log_p)  # (B, K, vocabulary)
    total = scores[:, :, tf.newaxis] + log_p
    order = tf.where(ended[:, :, tf.newaxis] & (padding == 0), np.inf, total)
    _, best = tf.math.top_k(tf.reshape(order, [batch, -1]), beam_size)  # (B, K) of K * vocabulary
    of_best = lambda tensor: tf.gather(tf.reshape(tensor, [batch, -1]), best, batch_dims=1)
    return best // vocabulary, best % vocabulary, of_best(total), tf.exp(of_best(log_p))


@tf.function(reduce_retracing=True)
def beam_search(
    captioner: model.Captioner,
    pictures: tf.Tensor,
    beam_size: int,
    length_penalty: float = LENGTH_PENALTY,
    max_words: int = MAX_WORDS,
) -> tuple[tf.Tensor, ...]:
    """The best of the most probable captions that were followed at the same time, `beam_size` of them.

    At every step each unfinished caption is continued by every word, and the most probable continuations are
    kept. A caption that says <end> keeps its place, so that fewer go on. In the end the one with the largest
    log p(caption) / length ** length_penalty wins, <end> counted in the length: 0 prefers short captions,
    1 takes the mean over the words. A picture none of whose captions has ended gives its best so far.

    Args:
        captioner: the model.
        pictures: features, (B, 64, 2048).
        beam_size: K in the comments; 1 gives the greedy caption.
        length_penalty: see above.
        max_words: where a caption that does not end is cut.

    Returns:
        What `greedy_search` returns.
    """
    vocabulary, batch = captioner.config.vocabulary_size, tf.shape(pictures)[0]
    never = never_said(vocabulary)
    # The captions of a picture lie beside each other in one batch of B * K.
    encoded = model.Encoded(*(tf.repeat(tensor, beam_size, axis=0) for tensor in captioner.encode(pictures)))
    state = captioner.decoder.initial_state(batch * beam_size)  # (B * K, 512)
    locations = encoded.features.shape[1]
    first = tf.one_hot(0, beam_size, 0.0, -np.inf)  # at first there is one caption, the empty one
    scores = tf.tile(first[tf.newaxis], [batch, 1])  # (B, K), log p of the words so far
    ended = tf.zeros([batch, beam_size], tf.bool)
    token = tf.fill([batch, beam_size], START)
    tokens = tf.zeros([batch, beam_size, 0], tf.int32)
    probabilities = tf.zeros([batch, beam_size, 0])
    looks = tf.zeros([batch, beam_size, 0, locations])
    growing = tf.TensorShape([None, beam_size, None])  # by a word in every step
    for _ in tf.range(max_words):
        tf.autograph.experimental.set_loop_options(
            shape_invariants=[
                (tensor, tf.TensorShape([None, *tensor.shape[1:]])) for tensor in (state, token, scores, ended)
            ]
            + [(tokens, growing), (probabilities, growing), (looks, growing.concatenate(locations))]
        )
        logits, state, look = captioner.step(tf.reshape(token, [-1]), state, encoded)
        logits = tf.where(never, -np.inf, tf.cast(logits, tf.float32))
        log_p = tf.reshape(tf.nn.log_softmax(logits), [batch, beam_size, vocabulary])
        parent, token, scores, p = best_continuations(scores, log_p, ended)  # each (B, K)
        real = scores > -np.inf  # with few words to say, some of the K continue nothing
        ended = (tf.gather(ended, parent, batch_dims=1) | (token == END)) & real
        # What belongs to a caption follows it to its new place.
        tokens = tf.concat([tf.gather(tokens, parent, batch_dims=1), token[:, :, tf.newaxis]], axis=2)
        probabilities = tf.concat([tf.gather(probabilities, parent, batch_dims=1), p[:, :, tf.newaxis]], axis=2)
        look = tf.reshape(tf.cast(look, tf.float32), [batch, beam_size, 1, locations])
        looks = tf.gather(tf.concat([looks, look], axis=2), parent, batch_dims=1)
        place = tf.range(batch)[:, tf.newaxis] * beam_size + parent  # (B, K), in the batch of B * K
        state = tf.gather(state, tf.reshape(place, [-1]))
        if tf.reduce_all(ended | ~real):
            break
    lengths = tf.reduce_sum(tf.cast(tokens != PAD, tf.float32), axis=2)  # (B, K)
    final = scores / lengths**length_penalty
    done = tf.reduce_any(ended, axis=1, keepdims=True)
    winner = tf.argmax(tf.where(done & ~ended, -np.inf, final), axis=1)  # (B,)
    return tuple(tf.gather(tensor, winner, batch_dims=1) for tensor in (tokens, probabilities, looks))


def caption_features(
    captioner: model.Captioner,
    words: Tokenizer,
    pictures: tf.Tensor,
    beam_size: int = 1,
    length_penalty: float = LENGTH_PENALTY,
) -> list[Caption]:
    """Captions a batch of features, (B, 64, 2048): greedily, or with a beam of more than one."""
    if beam_size == 1:
        found = greedy_search(captioner, pictures)
    else:
        found = beam_search(captioner, pictures, beam_size, length_penalty)
    captions = []
    for row, probability, look in zip(*(tensor.numpy() for tensor in found), strict=True):
        ended = END in row
        length = int(np.argmax(row == END)) if ended else len(row)
        captions.append(
            Caption(
                tuple(words.words[i] for i in row[:length]),
                tuple(map(float, probability[:length])),
                look[:length],
                ended,
            )
        )
    return captions


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


# The attention plot.


def enlarge(weights: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The weights of 64 locations, smoothly enlarged over a picture of size (width, height): (height, width)."""
    side = math.isqrt(len(weights))
    grid = Image.fromarray(weights.reshape(side, side).astype(np.float32))
    return np.asarray(grid.resize(size, Image.Resampling.BICUBIC)).clip(0)


def plot_attention(picture: Image.Image, caption: Caption, path: Path | str) -> None:
    """Writes the picture, and for every word the picture lit where the model looked.

    Each panel is scaled to its own brightest location.
    """
    from matplotlib.figure import Figure  # no pyplot: no window system, and nothing to close

    picture = features.upright_rgb(picture)
    picture.thumbnail((448, 448))
    panels = len(caption.words) + 1
    rows = math.ceil(panels / 5)
    columns = math.ceil(panels / rows)  # as even as it gets: 11 panels are 4 + 4 + 3
    # A panel of a narrow strip has empty sides, since a plot has less than 65,536 pixels either way.
    height = 2.6 * min(4, max(0.25, picture.height / picture.width))
    figure = Figure(figsize=(2.6 * columns, (height + 0.35) * rows + 0.5), dpi=110, layout="constrained")
    figure.suptitle(caption.text, fontsize=13, wrap=True)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes:
        axis.axis("off")
    axes[0].imshow(picture)
    for axis, word, weights in zip(axes[1:panels], caption.words, caption.attention, strict=True):
        axis.imshow(picture)
        axis.imshow(enlarge(weights, picture.size), cmap="gray", alpha=0.65, vmin=0)
        axis.set_title(word, fontsize=12)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def caption_and_plot(captioning: Captioning, path: Path, folder: Path, name: str | None = None) -> tuple[Caption, Path]:
    """Captions a picture and writes `<name>_attention.png` into a folder; raises InputError if it cannot be read."""
    caption = captioning.caption(path)
    plot = folder / f"{name or path.stem}_attention.png"
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


def caption_files(captioning: Captioning, pictures: Sequence[str], output: Path) -> int:
    """Captions files and addresses, one line each, and plots their attention; returns how many could not be read.

    Raises:
        InputError: the only one cannot be read; or the CNN cannot be built.
    """
    _ = captioning.cnn  # so that its failure is not taken for that of a picture
    failed, taken = 0, set()
    for picture in pictures:
        with tempfile.TemporaryDirectory() as folder:
            try:
                path = fetch(picture, Path(folder)) if is_address(picture) else Path(picture)
                name = path.stem
                while name in taken:  # a/dog.jpg and b/dog.jpg
                    name += "_"
                taken.add(name)
                caption, plot = caption_and_plot(captioning, path, output, name)
            except InputError as error:
                if len(pictures) == 1:
                    raise
                say(f"inference.py: {error}")
                failed += 1
                continue
        label = shown(picture) if is_address(picture) else picture
        print(caption.text if len(pictures) == 1 else f"{label}\t{caption.text}", flush=True)
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


def caption_held_out(captioning: Captioning, count: int, seed: int | None) -> None:
    """Captions random held-out pictures of the run's data, beside what people wrote, as the tutorial ends."""
    dataset = dataset_of(captioning.config)
    held_out = [example for example in dataset.examples if example.split == "test"] or dataset.split("val")
    for example in random.Random(seed).sample(held_out, min(count, len(held_out))):
        path = dataset.images / example.image
        try:
            caption, plot = caption_and_plot(captioning, path, captioning.run / "attention")
        except InputError as error:
            say(f"skipped {error}")
            continue
        print(path, *(f"  real:      {text}" for text in example.captions), f"  predicted: {caption.text}", sep="\n")
        print(f"  attention: {plot}", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run and the search, for every script that captions."""
    parser.add_argument("--run", type=Path, help="run folder (default: the newest in runs/)")
    parser.add_argument(
        "--beam-size",
        type=at_least(1),
        default=1,
        help="captions followed at the same time; 1 takes the most probable word at every step (default: 1)",
    )
    parser.add_argument(
        "--length-penalty",
        type=from_zero,
        default=LENGTH_PENALTY,
        help="a beam's captions compete by log p / length ** this; more prefers longer ones (default: %(default)s)",
    )


def main(argv: list[str] | None = None) -> None:
    """Captions the pictures of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "pictures", nargs="*", help="files or http(s) addresses of pictures to caption (default: a few held-out ones)"
    )
    add_arguments(parser)
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path(),
        help="where <picture>_attention.png goes (default: here; of held-out pictures, into the run folder)",
    )
    parser.add_argument(
        "--count", type=at_least(1), default=3, help="how many held-out pictures, without a picture (default: 3)"
    )
    parser.add_argument("--seed", type=int, help="which held-out pictures (default: others each time)")
    args = parser.parse_args(argv)
    for picture in args.pictures:
        if not is_address(picture) and not Path(picture).is_file():
            raise InputError(f"{picture}: no such picture")
    captioning = Captioning.load(args.run or newest_run(), args.beam_size, args.length_penalty)
    say(f"run: {captioning.run}")
    if not args.pictures:
        caption_held_out(captioning, args.count, args.seed)
    elif failed := caption_files(captioning, args.pictures, args.output_dir):
        raise InputError(f"{failed} of {len(args.pictures)} pictures could not be captioned")


if __name__ == "__main__":
    run_command(main)
