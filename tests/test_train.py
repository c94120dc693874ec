import csv
import dataclasses
import itertools
import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import tensorflow as tf

import inference
import model
import train
import batches
from batches import Captions, encode_captions, make_pipeline, order_batches
from checkpoints import Average, Progress
from common import InputError
from data_utils import DataOptions
from train import TrainConfig


def settings(dataset, words, cache, dropout=0.0, attention="soft", **training):
    """A run's config.json for a small model."""
    defaults = {"epochs": 3, "batch_size": 5, "learning_rate": 1e-2, "patience": 0}
    return {
        "model": dataclasses.asdict(model.ModelConfig(len(words), 8, 32, dropout, attention)),
        "training": dataclasses.asdict(TrainConfig(**defaults | training)),
        "data": dataclasses.asdict(DataOptions()) | {"unreadable": [], "fingerprint": dataset.fingerprint},
        "features": cache.settings | {"folder": str(cache.folder)},
    }


@pytest.fixture
def start(dataset, words, cache, tmp_path):
    """Starts, or continues, a run of this name, and returns its folder."""

    def start(name, **kwargs):
        run, config = tmp_path / name, settings(dataset, words, cache, **kwargs)
        train.start_run(run, config, words, cache)
        train.train(run, dataset, cache, config, words, tf.distribute.get_strategy())
        return run

    return start


def weights(run, name="last"):
    """Everything in a checkpoint, by name."""
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(run / "checkpoints" / name))
    return {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}


def history(run):
    return list(csv.DictReader((run / "history.csv").read_text().splitlines()))


# Batches.


def some_captions(count):
    """Captions of 5 to 49 tokens, most pictures with five."""
    picture = np.arange(count, dtype=np.int32) // 5
    lengths = np.random.default_rng(0).integers(5, 50, count)
    return Captions(np.array([f"{i}.npy" for i in range(picture[-1] + 1)]), picture, np.zeros((count, 50)), lengths)


def test_an_epoch_sees_every_caption_once_and_pictures_together():
    captions = some_captions(1003)
    found = order_batches(captions, 16, seed=0, epoch=0)
    assert sorted(np.concatenate(found)) == list(range(1003))
    assert [len(batch) for batch in found] == [16] * 62 + [11]
    pictures = sum(len(set(captions.picture[batch])) for batch in found)
    assert pictures <= 201 + 62, "only a batch's first and last picture may be cut"
    longest = [captions.lengths[batch].max() for batch in found]
    shuffled = np.random.default_rng(1).permutation(1003)
    assert np.mean(longest) < np.mean([captions.lengths[shuffled[i : i + 16]].max() for i in range(0, 1003, 16)]) - 1


def test_captions_can_be_shuffled_one_by_one():
    captions = some_captions(1003)
    found = order_batches(captions, 16, seed=0, epoch=0, together=False)
    assert sorted(np.concatenate(found)) == list(range(1003))
    padded = sum(len(batch) * captions.lengths[batch].max() for batch in found)
    assert padded < 1.15 * captions.lengths.sum(), "captions of similar length share a batch"
    assert sum(len(set(captions.picture[batch])) for batch in found) > 700, "pictures are torn apart"


def test_order_depends_on_seed_and_epoch_only():
    order = lambda seed, epoch: np.concatenate(order_batches(some_captions(200), 16, seed, epoch)).tolist()
    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 1)
    assert [len(b) for b in order_batches(some_captions(3), 16, 0, 0)] == [3], "fewer captions than a batch"
    assert [len(b) for b in order_batches(some_captions(33), 16, 0, 0, least=2)] == [16, 17], "one cannot be shared"


def test_pipeline_gives_every_caption_its_own_picture(dataset, words, cache):
    captions = encode_captions(dataset.split("train"), words, cache, 50)
    seen = []
    for batch in make_pipeline(captions, order_batches(captions, 5, 0, 0), cache):
        assert batch.pictures.shape[1:] == (64, 2048) and batch.pictures.dtype == tf.float16
        assert len(batch.pictures) == len(set(batch.picture.numpy())), "each picture is read once"
        assert batch.tokens.shape[1] == max(np.count_nonzero(batch.tokens, axis=1)), "padded to the longest, no more"
        for values, ids in zip(batch.pictures.numpy()[batch.picture], batch.tokens.numpy(), strict=True):
            text = words.decode(ids)
            colour = ("red", "green", "blue")[int(values[10, :300:100].argmax())]
            noun = ("dog", "cat", "bird", "horse")[int(values[20, 1000:1400:100].argmax())]
            assert f"{colour} {noun}" in text, "a caption was paired with another picture's features"
            seen.append(text)
    expected = [c for e in dataset.split("train") for c in e.captions]
    assert sorted(seen) == sorted(expected)


def test_the_end_of_an_epoch_does_not_wait_for_the_autotuner(dataset, words, cache):
    captions = encode_captions(dataset.split("train"), words, cache, 50)
    assert make_pipeline(captions, order_batches(captions, 5, 0, 0), cache).options().autotune.enabled is False


@pytest.fixture
def batch(dataset, words, cache):
    """The first batch of five captions."""
    captions = encode_captions(dataset.split("train"), words, cache, 50)
    return next(iter(make_pipeline(captions, order_batches(captions, 5, 0, 0), cache)))


def make_step(captioner, optimizer, average, progress, config, batch):
    """A training step on one device, for batches such as this."""
    spec = batches.Batch(*(tf.TensorSpec([None] * len(part.shape[:1]) + part.shape[1:], part.dtype) for part in batch))
    spec = spec._replace(tokens=tf.TensorSpec((None, None), tf.int32))
    return train.make_train_step(captioner, optimizer, average, progress, config, tf.distribute.get_strategy(), [spec])


# Runs.


def test_training_learns_and_leaves_a_complete_run(start, dataset, cache):
    run = start("run", epochs=40, batch_size=4)
    rows = history(run)
    assert float(rows[-1]["train_loss"]) < 0.3 * float(rows[0]["train_loss"])
    assert [int(row["epoch"]) for row in rows] == list(range(1, 41))
    assert (run / "loss.png").stat().st_size > 5000
    assert list((run / "tensorboard").iterdir())
    shutil.rmtree(run / "checkpoints/best")  # the last has learnt the training pictures best
    captioner, words, config = inference.load_run(run)
    examples = dataset.split("train")
    pictures = cache.read(tf.constant([str(cache.path(example.image)) for example in examples]))
    captions = inference.caption_features(captioner, words, pictures)
    right = [caption.text in example.captions for caption, example in zip(captions, examples, strict=True)]
    assert sum(right) >= 8, "the model has not learnt what it was taught: guessing gets 1 of 12"
    assert config["vocabulary_sha256"]


def test_best_is_the_epoch_with_the_best_cider(start, monkeypatch):
    """With the average in the place of the weights."""
    ciders, seen = iter([1.0, 3.0, 2.0]), []

    def scores(self):
        seen.append(self.captioner.encoder.fc.kernel.numpy())
        return {"val_loss": 1.0, "bleu4": 0.0, "cider": next(ciders), "distinct": 1}, ""

    monkeypatch.setattr(train.Validation, "scores", scores)
    run = start("run", epochs=3, average_decay=0.9)
    # In `last` the weights are reached through their average first.
    name = re.compile("(captioner/encoder/fc/_kernel|average/weights/0)/")
    kernel = lambda found: next(value for key, value in found.items() if name.match(key))
    best = kernel(weights(run, "best"))
    np.testing.assert_array_equal(best, seen[1])
    last = weights(run)
    assert last["progress/best_score/.ATTRIBUTES/VARIABLE_VALUE"] == 3.0
    assert np.abs(kernel(last) - seen[2]).max() > 0, "training must go on from the weights, not from their average"


class Stop(Exception):
    """Stands for a kill: nothing is saved when it is raised."""


def stop_at(monkeypatch, step, error):
    """Makes the training stop after so many steps in all."""
    make, count = train.make_train_step, [0]

    def make_train_step(*args):
        run_step = make(*args)

        def train_step(*batch):
            run_step(*batch)
            count[0] += 1
            if count[0] == step:
                raise error

        return train_step

    monkeypatch.setattr(train, "make_train_step", make_train_step)


@pytest.mark.parametrize(
    ("error", "minutes", "attention"), [(KeyboardInterrupt, 5.0, "hard"), (Stop, 0.0, "soft"), (Stop, 5.0, "soft")]
)
def test_a_stopped_run_ends_with_the_same_numbers(start, monkeypatch, error, minutes, attention):
    """Stopped in the second epoch: by Ctrl-C, by a kill just after a checkpoint, and by a kill long after one."""
    kind = {"dropout": 0.3, "average_decay": 0.9, "learning_rate_decay": 0.7, "attention": attention}
    whole = start("whole", save_minutes=minutes, **kind)
    with monkeypatch.context() as patch:
        stop_at(patch, 10, error)  # an epoch has 7 steps
        with pytest.raises(error):
            start("stopped", save_minutes=minutes, **kind)
    step = weights(whole.parent / "stopped")["progress/step/.ATTRIBUTES/VARIABLE_VALUE"]
    assert step == {KeyboardInterrupt: 3, Stop: 2 if minutes == 0 else 0}[error]
    stopped = start("stopped", save_minutes=minutes, **kind)
    expected, found = weights(whole), weights(stopped)
    skip = ("seconds", "save_counter")
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        if not any(name in key for name in skip) and key != "_CHECKPOINTABLE_OBJECT_GRAPH":
            np.testing.assert_array_equal(value, found[key], err_msg=f"{key} differs from the run that was not stopped")
    seconds = ("train_seconds",)
    rows = [[{k: v for k, v in row.items() if k not in seconds} for row in history(run)] for run in (whole, stopped)]
    assert rows[0] == rows[1]


def test_the_same_command_adds_nothing_when_all_is_done(start):
    run = start("run")
    before = weights(run)
    start("run")
    assert all(np.array_equal(value, weights(run)[key]) for key, value in before.items() if "GRAPH" not in key)
    assert len(history(start("run", epochs=4))) == 4, "more epochs may be asked for"


def test_early_stopping(start, monkeypatch):
    monkeypatch.setattr(
        train.Validation, "scores", lambda self: ({"val_loss": 1.0, "bleu4": 0.0, "cider": 7.0, "distinct": 1}, "")
    )
    run = start("run", epochs=20, patience=2)
    assert len(history(run)) == 3, "the first is best, two are not better"


def test_other_settings_are_refused(start):
    start("run", epochs=1)
    with pytest.raises(InputError, match="training batch_size = 5, expected 6"):
        start("run", epochs=1, batch_size=6)


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_checkpoint(start, monkeypatch):
    run = start("run", epochs=1)
    before = weights(run)
    bad = lambda taught, targets: (
        tf.gather(tf.reduce_sum(taught.logits, 1), taught.beginning) * np.nan,
        tf.ones_like(targets, tf.float32),
    )
    monkeypatch.setattr(train, "word_losses", bad)
    with pytest.raises(InputError, match="the loss is nan by step"):
        start("run", epochs=2)
    assert all(np.array_equal(value, weights(run)[key]) for key, value in before.items() if "GRAPH" not in key)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_disk_that_is_full_keeps_the_checkpoint_before(start):
    import resource

    run = start("run", epochs=1)
    before, best = weights(run), weights(run, "best")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file can grow beyond, as on a full disk
    try:
        with pytest.raises(InputError, match=r"cannot save a checkpoint .* free some space and run the same command"):
            start("run", epochs=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for name, expected in (("last", before), ("best", best)):
        found = weights(run, name)
        assert all(np.array_equal(value, found[key]) for key, value in expected.items() if "GRAPH" not in key)
    start("run", epochs=2)
    assert [int(row["epoch"]) for row in history(run)] == [1, 2]
    kept = [path.name for path in (run / "checkpoints/last").iterdir() if path.name != "checkpoint"]
    assert len(kept) == 2, f"what could not be written whole is not left behind: {kept}"


@pytest.mark.parametrize(
    "regulariser",
    [{}, {"label_smoothing": 0.2}, {"doubly_stochastic": 2.0}, {"jit": "on"}, {"jit": "on", "doubly_stochastic": 2.0}],
)
def test_one_step_equals_adam_on_the_mean_loss_of_real_words(words, cache, small_model, batch, regulariser):
    """The compiled step and its pipeline against plain, eager TensorFlow."""
    start = [variable.numpy() for variable in small_model.trainable_variables]
    optimizer = train.Adam(1e-2, global_clipnorm=0.1)
    progress, average = Progress(), Average(small_model.trainable_variables, 0.5)
    make_step(small_model, optimizer, average, progress, TrainConfig(**regulariser), batch)(batch)
    after = [variable.numpy() for variable in small_model.trainable_variables]

    for variable, value in zip(small_model.trainable_variables, start, strict=True):
        variable.assign(value)
    with tf.GradientTape() as tape:
        objective = loss = 0.0
        for number, caption in zip(batch.picture.numpy(), batch.tokens, strict=True):
            caption = caption[: np.count_nonzero(caption)]
            encoded, state = (
                small_model.encode(batch.pictures[number : number + 1]),
                tf.zeros((1, small_model.decoder.units)),
            )
            seen = 0.0
            for word, following in itertools.pairwise(caption):
                logits, state, weights = small_model.step(word[tf.newaxis], state, encoded)
                loss += (
                    found := tf.keras.losses.sparse_categorical_crossentropy(following, logits[0], from_logits=True)
                )
                seen += weights[0]
                if share := regulariser.get("label_smoothing"):
                    true = tf.one_hot(following, len(words))
                    found = tf.keras.losses.categorical_crossentropy(
                        true, logits[0], from_logits=True, label_smoothing=share
                    )
                objective += found
            objective += regulariser.get("doubly_stochastic", 0.0) * tf.reduce_sum((1 - seen) ** 2)
        count = np.count_nonzero(batch.tokens[:, 1:])
        objective, loss = objective / count, loss / count
    gradients = [tf.convert_to_tensor(g) for g in tape.gradient(objective, small_model.trainable_variables)]
    norm = tf.linalg.global_norm(gradients)
    assert norm > 0.1, "the test must see the clipping"
    for value, gradient, found in zip(start, gradients, after, strict=True):
        clipped = gradient.numpy() * 0.1 / norm.numpy()
        expected = value - 1e-2 * clipped / (
            np.abs(clipped) + 1e-7 / np.sqrt(1e-3)
        )  # Adam's first step, in Keras's form
        certain = np.abs(clipped) > 1e-6  # elsewhere rounding decides the direction
        np.testing.assert_allclose(found[certain], expected[certain], rtol=1e-3, atol=2e-4)
    assert float(progress.loss / progress.words) == pytest.approx(float(loss), rel=1e-5)
    assert int(progress.step) == 1
    # The average follows by (1 - 2/11), quicker than its decay of 0.5 at first.
    for value, found, mean in zip(start, after, average.means, strict=True):
        np.testing.assert_allclose(mean, value + (1 - 2 / 11) * (found - value), rtol=1e-3, atol=1e-6)


def test_the_average_captions_and_the_weights_train_on(small_model):
    weight = small_model.trainable_variables[0]
    average = Average(small_model.trainable_variables, 0.9)
    before = weight.numpy()
    weight.assign(before + 1)
    with average.in_place():
        np.testing.assert_array_equal(weight, before)
    np.testing.assert_array_equal(weight, before + 1)


def test_one_step_of_hard_attention_follows_the_estimate(words, cache, batch):
    """The compiled step against a plain sum over captions and words, for the same draws."""
    tf.keras.utils.set_random_seed(0)
    captioner = model.build(model.ModelConfig(len(words), 8, 16, attention="hard"))
    lengths = np.count_nonzero(batch.tokens, axis=1) - 1
    noise = tf.constant(np.random.default_rng(0).gumbel(size=(lengths.sum(), 64)).astype(np.float32))
    sampled = np.array([[True], [False], [True], [True], [False]])
    captioner.decoder.attention.draw = lambda *_: model.Chance(noise, tf.constant(sampled))
    progress, average = Progress(), Average(captioner.trainable_variables, 0.0)
    progress.likelihood.assign(-1.5)
    start = [variable.numpy() for variable in captioner.trainable_variables]
    config = TrainConfig(reward=0.7, entropy=0.3, clip_norm=1e9)
    make_step(captioner, tf.keras.optimizers.SGD(1.0), average, progress, config, batch)(batch)
    after = [variable.numpy() for variable in captioner.trainable_variables]

    for variable, value in zip(captioner.trainable_variables, start, strict=True):
        variable.assign(value)
    with tf.GradientTape() as tape:
        taught = captioner(batch.pictures, batch.tokens, batch.picture, training=True)
        row = {tuple(place): i for i, place in enumerate(taught.place.numpy())}
        log_p = tf.nn.log_softmax(tf.gather(taught.logits, taught.beginning))
        objective, of_sampled = 0.0, []
        for b, length in enumerate(lengths):
            likelihoods = [log_p[row[b, t], batch.tokens[b, t + 1]] for t in range(length)]
            for t, likelihood in enumerate(likelihoods):
                weights = taught.weights[row[b, t]]
                objective -= likelihood
                objective -= 0.3 * -tf.reduce_sum(weights * tf.math.log(weights))
                if sampled[b]:
                    of_sampled.append(float(likelihood))
                    ahead = sum(float(likelihoods[later]) - -1.5 for later in range(t, length))
                    objective -= 0.7 * ahead * tf.math.log(weights[int(tf.argmax(taught.looks[row[b, t]]))])
        objective /= lengths.sum()
    gradients = tape.gradient(objective, captioner.trainable_variables)
    for variable, value, gradient, found in zip(captioner.trainable_variables, start, gradients, after, strict=True):
        np.testing.assert_allclose(
            value - found, tf.convert_to_tensor(gradient), rtol=1e-3, atol=2e-6, err_msg=variable.path
        )
    assert float(progress.likelihood) == pytest.approx(0.9 * -1.5 + 0.1 * np.mean(of_sampled), rel=1e-4)


def test_hard_attention_follows_the_likelihood_of_its_draws(words, cache, batch):
    tf.keras.utils.set_random_seed(0)
    captioner = model.build(model.ModelConfig(len(words), 8, 16, attention="hard"))
    progress, average = Progress(), Average(captioner.trainable_variables, 0.0)
    optimizer = tf.keras.optimizers.Adam(0.0)  # so that the model stays as it is
    step = make_step(captioner, optimizer, average, progress, TrainConfig(), batch)
    step(batch)
    assert float(progress.likelihood) == pytest.approx(-0.1 * math.log(len(words)), rel=0.1)
    for _ in range(60):
        step(batch)
    assert float(progress.likelihood) == pytest.approx(-math.log(len(words)), rel=0.1)


@pytest.mark.parametrize("attention", ["soft", "hard"])
def test_mixed_precision_learns_the_same(start, words, attention):
    """In float16 losses differ by rounding, and by a step left out for its size; the kept weights are float32."""
    options = {"attention": attention, "epochs": 4, "reward": 0.0, "entropy": 0.0}
    exact, mixed = start("exact", **options), start("mixed", **options, mixed_precision=True)
    for one, other in zip(history(exact), history(mixed), strict=True):
        for name in ("train_loss", "val_loss"):
            assert float(other[name]) == pytest.approx(float(one[name]), rel=0.06)
    found = weights(mixed, "best")
    assert {value.dtype for key, value in found.items() if "captioner" in key} <= {
        np.dtype("float32"),
        np.dtype("int64"),
    }
    scale = next(value for key, value in weights(mixed).items() if "dynamic_scale" in key)
    assert scale >= 1024, "many steps were left out because a gradient was too large for float16"
    captioner, _, _ = inference.load_run(mixed)
    assert captioner.compute_dtype == "float32"


def test_the_learning_rate_falls_after_every_epoch(start):
    run = start("run", learning_rate_decay=0.5)
    rate = next(value for key, value in weights(run).items() if "learning_rate" in key)
    assert rate == pytest.approx(1e-2 * 0.5**2), "the third epoch's"


def test_recipes_give_settings_that_options_overrule(start):
    ours = lambda *words: {k: v for k, v in vars(train.parse(words)).items() if k in train.RECIPES["best"]}
    plain = {**vars(TrainConfig()), **vars(model.ModelConfig())}
    assert ours() == ours("--recipe", "tutorial") == {name: plain[name] for name in train.RECIPES["best"]}
    assert ours("--recipe", "best") == train.RECIPES["best"] != ours()
    assert ours("--recipe", "best", "--dropout", "0.1") == train.RECIPES["best"] | {"dropout": 0.1}


@pytest.mark.parametrize(
    "bad",
    [
        {"batch_size": 0},
        {"learning_rate": float("nan")},
        {"average_decay": 1.0},
        {"epochs": -1},
        {"label_smoothing": 1.0},
        {"learning_rate_decay": 1.1},
        {"doubly_stochastic": -1.0},
    ],
)
def test_impossible_settings(bad):
    with pytest.raises(InputError, match=f"{next(iter(bad))}: expected"):
        TrainConfig(**bad)


# Loading a run.


@pytest.fixture
def run(start):
    return start("run", epochs=1)


def test_a_folder_without_a_checkpoint(tmp_path, run):
    with pytest.raises(InputError, match="not a run folder"):
        inference.load_run(tmp_path)
    for path in (run / "checkpoints").rglob("checkpoint"):
        path.unlink()
    with pytest.raises(InputError, match="no checkpoint"):
        inference.load_run(run)
    with pytest.raises(InputError, match="no run with a checkpoint"):
        inference.newest_run(tmp_path / "runs")


def test_a_vocabulary_of_other_weights_is_refused(run):
    path = run / "vocabulary.json"
    words = json.loads(path.read_text())
    words[-1], words[-2] = words[-2], words[-1]
    path.write_text(json.dumps(words))
    with pytest.raises(InputError, match="not the vocabulary these weights were trained with"):
        inference.load_run(run)


def test_settings_of_other_weights_are_refused(run):
    path = run / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model": config["model"] | {"units": 20}}))
    with pytest.raises(InputError, match=r"damaged, or not the weights of this config\.json"):
        inference.load_run(run)
    path.write_text(json.dumps({"model": {}}))
    with pytest.raises(InputError, match=r"not the config\.json of a run"):
        inference.load_run(run)


def test_a_damaged_checkpoint_is_refused(run):
    for path in (run / "checkpoints").rglob("*.data-*"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="damaged"):
        inference.load_run(run)
