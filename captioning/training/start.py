"""Training that starts from the weights of another run, on other captions: `python train.py --start RUN`.

The encoder, the attention and the GRU are taken over as they are. Of the layers that have a row for each word, the
embedding and the output layer, the rows of words that both vocabularies have are; the others are drawn.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

import inference
from captioning.base.cli import InputError, log
from captioning.base.quiet_tensorflow import tf
from captioning.config.run_config import RunConfig
from captioning.config.settings import FeatureConfig, ModelConfig
from captioning.images.feature_cache import check_cnn_weights, find_cnn_weights
from captioning.runs.run_folder import VOCABULARY_FILE, best_checkpoint, read_config
from captioning.training.input_pipeline import TrainData
from tokenizer import Tokenizer

SIZES = ("embedding_dim", "units", "attention", "decoder")  # of the model, which the weights fit
LEARNING_RATE = 2e-4  # a small one: the weights are good already


def start_settings(run: Path) -> dict[str, Any]:
    """Returns the settings, by name, that a training takes over from the run that it starts from.

    Raises:
        InputError: it is not a run, or has no weights.
    """
    best_checkpoint(run)
    config = read_config(run)
    sizes = {name: getattr(config.model, name) for name in SIZES}
    return {**sizes, **cnn_settings(run, config), "words": config.data.words, "learning_rate": LEARNING_RATE}


def cnn_settings(run: Path, config: RunConfig) -> dict[str, Any]:
    """Returns the settings, by name, of the CNN of a run."""
    weights = config.features["weights"]
    if weights != "imagenet" and not Path(weights).exists():
        weights = find_cnn_weights(run) or weights
    precision = config.features.get("precision", "float32")
    sized = {"cnn": config.cnn.option, "image_size": config.cnn.image_size}
    return {**sized, "cnn_weights": weights, "cnn_precision": precision}


def check_start(run: Path, features: FeatureConfig, model: ModelConfig) -> None:
    """Raises InputError if the settings are not those of the CNN, or of the sizes, that a run was trained with."""
    saved = read_config(run)
    for name in SIZES:
        if getattr(model, name) != getattr(saved.model, name):
            raise _other_setting(run, name, getattr(saved.model, name), getattr(model, name))
    if features.sized_cnn != saved.cnn:
        raise _other_setting(run, "CNN", f"{saved.cnn.option}, {saved.cnn.image_size}", features.cnn)
    check_start_cnn(run, features.cnn_weights)


def check_start_cnn(run: Path, cnn_weights: str) -> None:
    """Raises InputError if weights of the CNN are not those that a run was trained with."""
    saved = read_config(run).features
    if "sha256" in saved:
        check_cnn_weights(cnn_weights, saved["sha256"])
    elif cnn_weights != "imagenet":
        raise _other_setting(run, "weights of the CNN", "imagenet", cnn_weights)


def _other_setting(run: Path, name: str, expected: Any, found: Any) -> InputError:
    return InputError(f"{run}: expected its {name}, {expected}, found {found}; leave the option out")


def keep_words(run: Path, data: TrainData, config: RunConfig) -> tuple[TrainData, RunConfig]:
    """Returns the same with the words of a run, in its order, and after them those that only the new captions have."""
    words = dict.fromkeys((*Tokenizer.load(run / VOCABULARY_FILE).index_word, *data.tokenizer.index_word))
    model = dataclasses.replace(config.model, vocab_size=len(words))
    return data._replace(tokenizer=Tokenizer(tuple(words), data.tokenizer.words)), dataclasses.replace(
        config, model=model
    )


def copy_weights(run: Path, tokenizer: Tokenizer, model: tf.keras.Model) -> None:
    """Copies the best weights of a run into a model with the words of `tokenizer`, and logs how many it knows.

    Args:
        run: the run.
        tokenizer: the words of the model.
        model: takes the weights; those of words that the run does not know stay as they are.
    """
    source, words, _ = inference.load_run(run)
    old_ids = {word: index for index, word in enumerate(words.index_word)}
    known = [index for index, word in enumerate(tokenizer.index_word) if word in old_ids]
    old = [old_ids[tokenizer.index_word[index]] for index in known]
    log(f"--start {run}: knows {len(known):,} of {len(tokenizer):,} words; the others begin with random weights")
    by_word = {id(variable): axis for variable, axis in model.decoder.variables_by_word()}
    for variable, trained in zip(model.trainable_variables, source.trainable_variables, strict=True):
        values = trained.numpy()
        if (axis := by_word.get(id(variable))) is not None:
            drawn, values = np.moveaxis(variable.numpy(), axis, 0), np.moveaxis(values, axis, 0)
            if drawn.ndim == 1:  # the biases: as of the mean word, or words that were never seen would come first
                drawn[:] = values.mean()
            drawn[known] = values[old]
            values = np.moveaxis(drawn, 0, axis)
        variable.assign(values)
