import dataclasses
import shutil
import signal

import numpy as np
import pytest
from helpers.runs import (
    LossRecorder,
    SimulatedKill,
    assert_same_checkpoint,
    make_config,
    read_checkpoint,
    read_history,
    run_training,
    stop_after,
)

import inference
import train
from captioning.base import devices
from captioning.base.cli import InputError, defer_interrupts, end_signals
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import RECIPES, ModelConfig, TrainConfig
from captioning.images.feature_cache import FeatureCache
from captioning.scores import metrics
from captioning.training import objective, training_log, validation
from captioning.training.input_pipeline import TrainData
from captioning.training.validation import EpochScore, Validation, Validator

NUM_STEPS = 7  # of an epoch with batches of 5
RUN_SETTINGS = {"epochs": 2, "dropout": 0.3, "ema_decay": 0.9, "learning_rate_decay": 0.5}

pytestmark = pytest.mark.usefixtures("compare_decoders_once")


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch):
    """Saves time; `trained_run` is trained before and has its plot."""
    monkeypatch.setattr(training_log, "plot_history", lambda *_: None)


@pytest.fixture(scope="module")
def recorder():
    """What was recorded of `trained_run`."""
    return LossRecorder()


@pytest.fixture(scope="module")
def trained_run(data, recorder, tmp_path_factory):
    """A run of two epochs, which no test changes."""
    return run_training(tmp_path_factory.mktemp("trained") / "run", data, recorder, **RUN_SETTINGS)


@pytest.fixture
def run(trained_run, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained_run, tmp_path / "run")


def fake_scores(monkeypatch, ciders, on_evaluate=lambda: None):
    """Replaces the validation: epochs get these scores."""
    remaining = iter(ciders)

    def evaluate(_):
        on_evaluate()
        cider = next(remaining)
        row = {"val_loss": 1.0, "bleu4": 0.0, "cider": cider, "distinct_ratio": 1}
        return Validation(row, EpochScore(cider, 0, -1.0), "a caption")

    monkeypatch.setattr(Validator, "evaluate", evaluate)


# A run.


def test_gradients_are_clipped_as_the_settings_say(small_model):
    state = train.make_train_state(small_model, objective.CrossEntropy(TrainConfig()), TrainConfig(clip_norm=3.0))
    assert state.optimizer.global_clipnorm == 3.0 and TrainConfig().clip_norm == 5.0


@pytest.mark.slow
def test_train_leaves_a_complete_run(trained_run, recorder, data):
    rows = read_history(trained_run)
    assert [int(row["epoch"]) for row in rows] == [1, 2]
    assert float(rows[-1]["train_loss"]) < 0.9 * float(rows[0]["train_loss"])
    assert (trained_run / "loss.png").stat().st_size > 5000
    assert list((trained_run / "tensorboard").iterdir())
    _, tokenizer, config = inference.load_run(trained_run)
    assert tokenizer.index_word == data[2].index_word
    assert config.vocabulary_sha256
    assert (config.train.epochs, config.train.batch_size, config.model.dropout) == (2, 5, 0.3)


@pytest.mark.slow
def test_train_learns_captions(data, tmp_path, monkeypatch):
    fake_scores(monkeypatch, [1.0] * 25)
    run = run_training(tmp_path / "run", data, epochs=25, batch_size=4)
    rows = read_history(run)
    assert float(rows[-1]["train_loss"]) < 0.3 * float(rows[0]["train_loss"])
    shutil.rmtree(run / "checkpoints/best")  # the last model knows the training images best
    dataset, cache, _ = data
    caption_model, tokenizer, _ = inference.load_run(run)
    examples = dataset.split("train")
    features = cache.read(tf.constant([str(cache.path(example.image_path)) for example in examples]))
    captions = inference.decode_captions(caption_model, tokenizer, features)
    correct = [caption.text in example.captions for caption, example in zip(captions, examples, strict=True)]
    assert sum(correct) >= 8, "captions that ignore the image get 1 of 12"


@pytest.mark.slow
def test_train_decays_the_learning_rate_after_every_epoch(trained_run, recorder):
    expected = np.repeat([1e-2, 0.5e-2], NUM_STEPS)
    np.testing.assert_allclose(recorder.learning_rates, expected, rtol=1e-6)
    rate = next(value for key, value in read_checkpoint(trained_run).items() if "learning_rate" in key)
    assert rate == pytest.approx(1e-2 * 0.5), "the second epoch's"


@pytest.mark.slow
def test_train_keeps_the_best_epoch_and_stops_early(data, tmp_path, monkeypatch, capsys):
    """The best checkpoint holds the moving average of the weights; training continues from the weights."""
    trained, validated_kernels, marked = [], [], []
    monkeypatch.setattr(training_log, "plot_history", lambda rows, *best: marked.append(best[:2]))
    fake_scores(
        monkeypatch, [1.0, 3.0, 2.0, 3.0], lambda: validated_kernels.append(trained[0].encoder.fc.kernel.numpy())
    )
    run = run_training(
        tmp_path / "run", data, lambda state: trained.append(state.model), epochs=20, patience=2, ema_decay=0.9
    )
    assert len(read_history(run)) == 4, "the second epoch is best, two are not better"
    assert marked == [(1, "cider"), (2, "cider"), (2, "cider"), (2, "cider")]
    log = capsys.readouterr().err
    assert "stopped early: 2 epochs without a better score" in log
    assert "best: epoch 2, CIDEr 3.0" in log
    best_model, _, _ = inference.load_run(run)
    np.testing.assert_array_equal(best_model.encoder.fc.kernel, validated_kernels[1])
    shutil.rmtree(run / "checkpoints/best")
    last_model, _, _ = inference.load_run(run)
    np.testing.assert_array_equal(last_model.encoder.fc.kernel, trained[0].encoder.fc.kernel)
    assert np.abs(last_model.encoder.fc.kernel - validated_kernels[3]).max() > 0, "the average was trained on"


@pytest.mark.slow
@pytest.mark.parametrize(("learning_rate", "is_bad"), [(1e-2, False), (100.0, True)])
def test_train_says_that_the_loss_is_worse_than_guessing(data, tmp_path, capsys, learning_rate, is_bad):
    run_training(tmp_path / "run", data, epochs=1, learning_rate=learning_rate, max_length=4)
    lines = capsys.readouterr().err
    assert f"{len(data[2])} words (0.0 % of those" in lines
    bad = f"is above {np.log(len(data[2])):.2f}, that of guessing all words alike: the learning rate may be too large"
    assert (bad in lines) == is_bad


@pytest.mark.slow
def test_train_stops_at_a_loss_that_is_not_finite(run, data, monkeypatch):
    before = read_checkpoint(run)

    def nan_losses(logits, targets):
        return tf.reduce_sum(logits, 1) * np.nan, tf.ones_like(targets, tf.float32)

    monkeypatch.setattr(objective, "loss_function", nan_losses)
    with pytest.raises(InputError, match=r"loss is nan by step \d of epoch 3; the last checkpoint is from before it"):
        run_training(run, data, **RUN_SETTINGS | {"epochs": 3})
    assert_same_checkpoint(read_checkpoint(run), before)


@pytest.mark.slow
def test_mixed_precision_learns_the_same(trained_run, data, tmp_path):
    """In float16 losses differ by rounding, and by a step left out for its size; the saved weights are float32."""
    scales = []
    mixed = run_training(
        tmp_path / "mixed",
        data,
        lambda state: scales.append(float(state.optimizer.dynamic_scale)),
        **RUN_SETTINGS,
        mixed_precision=True,
    )
    for exact_row, mixed_row in zip(read_history(trained_run), read_history(mixed), strict=True):
        for name in ("train_loss", "val_loss"):
            assert float(mixed_row[name]) == pytest.approx(float(exact_row[name]), rel=0.1)
    dtypes = {value.dtype for value in read_checkpoint(mixed, "best").values() if isinstance(value, np.ndarray)}
    assert dtypes <= {np.dtype("float32"), np.dtype("int64")}
    assert scales[-1] >= 1024, "many steps were left out because a gradient was too large for float16"
    caption_model, _, _ = inference.load_run(mixed)
    assert caption_model.compute_dtype == "float32"


# A run that was stopped.


@pytest.mark.slow
@pytest.mark.parametrize(("ciders", "best_epoch"), [((3.0, None), 1), ((None, 3.0), 2)])
def test_resumed_run_compares_epochs_with_and_without_cider(data, tmp_path, monkeypatch, capsys, ciders, best_epoch):
    """Validation losses fall; `None`: pycocoevalcap is not installed, so that CIDEr counts as 0."""

    def run_epoch(epoch, cider):
        row = {"val_loss": 3.0 - epoch, "bleu4": cider, "cider": cider, "distinct_ratio": 1}
        validation = Validation(row, EpochScore(cider or 0.0, 0, epoch - 3.0), "a caption")
        monkeypatch.setattr(Validator, "evaluate", lambda _: validation)
        monkeypatch.setattr(metrics, "has_pycocoevalcap", lambda: cider is not None)
        return run_training(tmp_path / "run", data, epochs=epoch)

    monkeypatch.setattr(validation, "MIN_CIDER_IMAGES", 4)  # the small dataset has so many
    # Only what validation finds matters.
    monkeypatch.setattr(train, "train_epoch", lambda *args: args[2].progress.token_count.assign(1))
    run_epoch(1, ciders[0])
    capsys.readouterr()
    run = run_epoch(2, ciders[1])
    lines = capsys.readouterr().err
    kept = "the best epoch so far was chosen by CIDEr, which cannot be computed now: it stays the best"
    replaced = "the best epoch so far was chosen without CIDEr: the next one with a CIDEr above 0 is taken as better"
    assert (kept in lines) == (ciders[0] == 3.0)
    assert (replaced in lines) == (ciders[0] is None)
    assert f"best: epoch {best_epoch}, " in lines
    assert tf.train.latest_checkpoint(run / "checkpoints/best").endswith(f"ckpt-{best_epoch}")


@pytest.mark.slow
@pytest.mark.parametrize(("error", "batches"), [(KeyboardInterrupt, 3), (SimulatedKill, 0)])
def test_resumed_run_is_identical(trained_run, data, tmp_path, capsys, error, batches):
    """Ctrl-C saves first; a kill loses what followed the last checkpoint."""
    with pytest.raises(error):
        run_training(tmp_path / "run", data, stop_after(NUM_STEPS + 3, error), **RUN_SETTINGS)
    resumed = run_training(tmp_path / "run", data, **RUN_SETTINGS)
    assert f"after 1 epochs and {batches} batches" in capsys.readouterr().err
    assert_same_checkpoint(read_checkpoint(resumed), read_checkpoint(trained_run))
    assert_same_checkpoint(read_checkpoint(resumed, "best"), read_checkpoint(trained_run, "best"))
    assert read_history(resumed) == read_history(trained_run)


@pytest.mark.slow
def test_features_that_are_gone_end_training_in_one_line(run, data, tmp_path):
    dataset, cache, tokenizer = data
    gone = FeatureCache(tmp_path / "gone", cache.manifest)
    with pytest.raises(InputError, match=r"gone/.*\.npy: these features are gone or damaged"):
        run_training(run, (dataset, gone, tokenizer), **RUN_SETTINGS | {"epochs": 3})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["best", "last"])
def test_resumed_run_goes_on_with_the_checkpoints_that_are_whole(run, data, capsys, name):
    for path in (run / "checkpoints" / name).glob("*.data-*"):
        path.write_bytes(path.read_bytes()[:1000])
    before = read_history(run)
    run_training(run, data, **RUN_SETTINGS | {"epochs": 3})
    lines = capsys.readouterr().err
    assert f"{name}/ckpt-" in lines and "is damaged" in lines and "resuming" in lines
    assert "after 2 epochs and 0 batches" in lines and "score of the initial weights: " in lines
    assert read_history(run)[:2] == before and len(read_history(run)) == 3
    inference.load_run(run)
    assert "damaged" not in capsys.readouterr().err


@pytest.mark.slow
def test_complete_run_is_left_as_it_is(run, data):
    before, recorder = read_checkpoint(run), LossRecorder()
    run_training(run, data, recorder, **RUN_SETTINGS)
    assert recorder.losses == []
    assert_same_checkpoint(read_checkpoint(run), before)
    run_training(run, data, **RUN_SETTINGS | {"epochs": 3})
    assert len(read_history(run)) == 3, "more epochs may be asked for"


# The command line.


def test_parse_takes_a_recipe_that_options_overrule():
    def parse(*argv):
        return {name: value for name, value in vars(train.parse(argv)).items() if name in RECIPES["best"]}

    defaults = {**dataclasses.asdict(TrainConfig()), **dataclasses.asdict(ModelConfig())}
    assert parse() == parse("--recipe", "tutorial") == {name: defaults[name] for name in RECIPES["best"]}
    assert parse("--recipe", "best") == RECIPES["best"] != parse()
    assert parse("--recipe", "best", "--dropout", "0.1") == RECIPES["best"] | {"dropout": 0.1}


def test_batch_size_below_the_number_of_devices_is_refused(monkeypatch):
    class FourDevices:
        num_replicas_in_sync = 4

    monkeypatch.setattr(devices, "make_strategy", lambda name: FourDevices())
    with pytest.raises(InputError, match=r"^--batch-size: expected at least 4, the number of devices, found 3$"):
        train.main(["--strategy", "mirrored", "--batch-size", "3"])


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_operations_are_chosen_before_tensorflow_does_anything(monkeypatch, deterministic):
    calls = []
    monkeypatch.setattr(tf.config.experimental, "enable_op_determinism", lambda: calls.append("deterministic"))
    monkeypatch.setattr(devices, "check_gpus", lambda: calls.append("GPUs"))
    train.start_devices(TrainConfig(deterministic=deterministic))
    assert calls == ["deterministic"] * deterministic + ["GPUs"]


def test_operation_that_cannot_be_deterministic_is_reported(dataset, cache, tokenizer, tmp_path):
    message = "A deterministic GPU implementation of Some is not currently available.\n\t [[node]]"
    for deterministic, error in ((True, InputError), (False, tf.errors.UnimplementedError)):
        config = make_config(dataset, cache, tokenizer, deterministic=deterministic)
        data, strategy = TrainData(dataset, cache, tokenizer), tf.distribute.get_strategy()
        with (
            pytest.raises(error, match=r"implementation of Some is not"),
            train.open_run_folder(tmp_path / "run", data, config, strategy),
        ):
            raise tf.errors.UnimplementedError(None, None, message)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_that_ask_to_stop_save_as_ctrl_c_does(name):
    if not (number := getattr(signal, name, None)):
        pytest.skip("Windows has no such signal")
    handlers = {other: signal.getsignal(other) for other in {number, *end_signals()}}
    ended = []
    try:
        signal.signal(number, signal.SIG_DFL)  # a process in the background ignores some
        train.start_devices(TrainConfig())
        with pytest.raises(KeyboardInterrupt):  # at which `train` saves
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt), defer_interrupts():
            signal.raise_signal(number)
            ended.append("the block ends first")
        signal.signal(number, signal.SIG_IGN)  # as nohup does with SIGHUP
        train.start_devices(TrainConfig())
        with defer_interrupts():
            signal.raise_signal(number)
    finally:
        for other, handler in handlers.items():
            signal.signal(other, handler)
    assert ended
