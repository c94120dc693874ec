"""Runs of the training on the small dataset, and what they leave."""

import csv
import dataclasses

import numpy as np

import train
from captioning.base.quiet_tensorflow import tf
from captioning.config.run_config import RunConfig
from captioning.config.settings import DataConfig, ModelConfig, TrainConfig
from captioning.training.input_pipeline import TrainData

# Times and counters of files, which differ between runs that are otherwise the same.
UNEQUAL_KEYS = ("seconds", "save_counter", "_CHECKPOINTABLE_OBJECT_GRAPH")
SMALL_SETTINGS = {
    "embedding_dim": 8,
    "units": 32,
    "epochs": 3,
    "batch_size": 5,
    "learning_rate": 1e-2,
    "patience": 0,
    "max_length": 12,  # the longest caption has 10 tokens; a model after few epochs ends none
}
MODEL_SETTINGS = {field.name for field in dataclasses.fields(ModelConfig)}


class SimulatedKill(Exception):
    """Stands for a kill: nothing is saved when it is raised."""


def make_config(dataset, cache, tokenizer, **settings):
    """Makes the settings of a small model; those of the model and of the training may be given."""
    settings = SMALL_SETTINGS | settings
    model_settings = {name: value for name, value in settings.items() if name in MODEL_SETTINGS}
    train_settings = {name: value for name, value in settings.items() if name not in MODEL_SETTINGS}
    return RunConfig(
        model=ModelConfig(vocab_size=len(tokenizer), **model_settings),
        train=TrainConfig(**train_settings),
        data=DataConfig(),
        objective={},
        features=cache.manifest | {"folder": str(cache.folder)},
        unreadable_images=(),
        data_fingerprint=dataset.fingerprint,
        vocabulary_sha256="",
    )


def stop_after(num_steps, error):
    """Returns an `on_step` that raises an error after so many steps."""
    steps = iter(range(1, num_steps + 1))

    def on_step(_):
        if next(steps) == num_steps:
            raise error

    return on_step


class LossRecorder:
    """An `on_step` that records the mean loss and the learning rate of every step."""

    def __init__(self):
        self.losses, self.learning_rates = [], []
        self._sums = (0.0, 0.0)

    def __call__(self, state):
        progress = state.progress
        loss_sum, token_count = progress.get("loss_sum"), progress.get("token_count")
        if progress.get("step") == 1:  # the sums are those of an epoch
            self._sums = (0.0, 0.0)
        self.losses.append((loss_sum - self._sums[0]) / (token_count - self._sums[1]))
        self.learning_rates.append(float(tf.convert_to_tensor(state.optimizer.learning_rate)))
        self._sums = (loss_sum, token_count)


def read_checkpoint(run, name="last"):
    """Returns all values of a checkpoint by key."""
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(run / "checkpoints" / name))
    return {
        key: reader.get_tensor(key)
        for key in reader.get_variable_to_shape_map()
        if not any(part in key for part in UNEQUAL_KEYS)
    }


def assert_same_checkpoint(actual, expected):
    """Compares two results of `read_checkpoint` bit by bit."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(actual[key], value, err_msg=key)


def read_history(run):
    """Returns the rows of history.csv, without times."""
    rows = csv.DictReader((run / "history.csv").read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in row.items() if name != "train_seconds"} for row in rows]


def run_training(run, data, on_step=None, build=train.build_train_state, objective=None, **settings):
    """Starts, or resumes, a run on (dataset, cache, tokenizer).

    `build` builds what is trained, and `objective` has the settings of an objective that is not cross-entropy.
    """
    data = TrainData(*data)
    config = dataclasses.replace(make_config(*data, **settings), objective=objective or {})
    strategy = tf.distribute.get_strategy()
    with train.open_run_folder(run, data, config, strategy):
        train.train(run, data, config, strategy, build, on_step)
    return run
