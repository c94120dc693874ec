"""Trainings that start from the best weights of a run, and train them further into another one.

The model, the data and the features are those of that run. What can be given are paths, dropout rates, and the
settings of the training.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from captioning.base.cli import InputError, add_quiet_option, log
from captioning.base.files import file_sha256
from captioning.config.options import add_options
from captioning.config.run_config import RunConfig
from captioning.config.settings import DATA_PATHS, DataConfig, FeatureConfig, ModelConfig, TrainConfig
from captioning.runs.run_folder import VOCABULARY_FILE, best_checkpoint, read_config
from captioning.training.input_pipeline import TrainData
from captioning.training.start import check_start_cnn, cnn_settings
from tokenizer import Tokenizer

FEATURE_OPTIONS = ("cnn_weights", "features_dir", "cnn_batch_size", "max_megapixels")
DROPOUT_OPTIONS = ("dropout", "feature_dropout")


def parse_start(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    recipe: Mapping[str, Any],
    kept: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
) -> argparse.Namespace:
    """Adds `--run` and the options of train.py that still apply, and parses the command line.

    Args:
        parser: has the command's own options.
        argv: the command line.
        recipe: settings that this kind of training has instead of the defaults, by name.
        kept: names of settings of `TrainConfig` that are taken over from the run.
        without: names of settings of `TrainConfig` and `FeatureConfig` that this kind of training does not have.

    Raises:
        InputError: the folder is not a run, has no weights, or they are not for the CNN that is there.
    """
    run_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    run_parser.add_argument("--run", type=Path)  # not required, for --help
    start = run_parser.parse_known_args(argv)[0].run
    defaults = {**(_read_settings(start, kept) if start else {}), **recipe}
    text = "folder of the run to start from, which is not changed"
    parser.add_argument("--run", type=Path, metavar="DIR", required=True, help=text)
    data = parser.add_argument_group("the data of the run, if they were moved")
    add_options(data, DataConfig, defaults, only=DATA_PATHS)
    add_options(parser.add_argument_group("features"), FeatureConfig, defaults, only=FEATURE_OPTIONS, skip=without)
    add_options(parser.add_argument_group("model"), ModelConfig, defaults, only=DROPOUT_OPTIONS)
    add_options(parser.add_argument_group("training"), TrainConfig, defaults, skip=without)
    add_quiet_option(parser)
    # All other settings have the values of the run, too.
    for settings in (DataConfig(), FeatureConfig(), ModelConfig(), TrainConfig()):
        parser.set_defaults(**{name: defaults.get(name, value) for name, value in settings.to_json().items()})
    args = parser.parse_args(argv)
    args.run = args.run if args.run.name else args.run.resolve()  # "." has no name, of which the new run's is made
    if "sha256" not in read_config(args.run).features and Path(args.cnn_weights).is_file():
        log(f"{args.run} was trained with Keras's weights of ImageNet: {args.cnn_weights} must hold the same")
    else:
        check_start_cnn(args.run, args.cnn_weights)
    return args


def _read_settings(run: Path, kept: tuple[str, ...]) -> dict[str, Any]:
    """Returns the settings, by name, that a training takes over from the run that it starts from."""
    best_checkpoint(run)  # raises an error if there is none
    config = read_config(run)
    return {
        **config.data.to_json(),
        **config.model.to_json(),
        **cnn_settings(run, config),
        "features_dir": config.features["folder"],
        "dtype": config.features["dtype"],
        **{name: getattr(config.train, name) for name in ("max_length", "max_val_images", *kept)},
    }


def check_start(start: Path, config: RunConfig) -> None:
    """Checks that a run has soft attention, and the images and captions of `config`; logs what is not taken over."""
    saved = read_config(start)
    if config.model.attention != "soft":
        raise InputError(f"{start}: expected a run with soft attention, found {config.model.attention} attention")
    if penalty := saved.objective.get("doubly_stochastic"):
        log(f"{start} was trained with --doubly-stochastic {penalty:g}, which this training does not have")
    if saved.data_fingerprint != config.data_fingerprint:
        raise InputError(
            f"{start} was trained on other images or captions; expected the same to start from its weights"
        )


def take_words(start: Path, data: TrainData, config: RunConfig) -> tuple[TrainData, RunConfig]:
    """Returns the same with the vocabulary of a run, which may hold more than its captions (`--keep-words`).

    Raises:
        InputError: it is not the vocabulary of its weights.
    """
    if file_sha256(start / VOCABULARY_FILE) != read_config(start).vocabulary_sha256:
        raise InputError(f"{start / VOCABULARY_FILE}: not the vocabulary of this run; restore its own")
    tokenizer = Tokenizer.load(start / VOCABULARY_FILE, config.data.words)
    model = dataclasses.replace(config.model, vocab_size=len(tokenizer))
    return data._replace(tokenizer=tokenizer), dataclasses.replace(config, model=model)
