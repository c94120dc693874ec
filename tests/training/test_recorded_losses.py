"""The losses of 20 steps, as recorded_losses.json has them: a change of the arithmetic is seen on its day.

Where it is meant to change, this writes the file anew:

    RECORD_LOSSES=1 python -m pytest -n 0 tests/training/test_recorded_losses.py
"""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import LossRecorder
from helpers.steps import make_step

import model
from beyond.cider.self_critical import CiderConfig, SelfCritical, make_reward
from beyond.paper.objective import PaperConfig, PaperObjective
from captioning.base.files import write_json
from captioning.config.settings import ModelConfig, TrainConfig
from captioning.training.input_pipeline import TrainData, encode_captions, make_dataset, make_epoch_batches
from captioning.training.objective import CrossEntropy
from captioning.training.optimizer import make_optimizer

FILE = Path(__file__).with_name("recorded_losses.json")
NUM_STEPS = 20
TRAIN = TrainConfig(label_smoothing=0.1)


def make_cross_entropy(config, data):
    return CrossEntropy(TRAIN)


def make_paper_objective(config, data):
    objective = PaperConfig(doubly_stochastic=1.0).to_json()
    return PaperObjective(dataclasses.replace(config, train=TRAIN, objective=objective))


def make_self_critical(config, data):
    return SelfCritical(TrainConfig(max_length=8), CiderConfig(), make_reward(data, bleu_weight=1.0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "decoder", "fused", "make_objective"),
    [
        ("tutorial", "tutorial", True, make_cross_entropy),
        ("paper", "paper", False, make_paper_objective),
        ("self-critical", "tutorial", False, make_self_critical),
    ],
    ids=["tutorial", "paper", "self-critical"],
)
def test_losses_are_as_recorded(dataset, tokenizer, cache, run_config, name, decoder, fused, make_objective):
    caption_model = model.build(ModelConfig(len(tokenizer), embedding_dim=8, units=16, decoder=decoder))
    caption_model.decoder.fused = fused
    rng = np.random.default_rng(0)
    for variable in caption_model.trainable_variables:  # not Keras's, which another version may draw otherwise
        variable.assign(rng.uniform(-0.2, 0.2, variable.shape))
    objective = make_objective(run_config, TrainData(dataset, cache, tokenizer))
    captions = encode_captions(dataset.split("train"), tokenizer.encode, cache.path)
    batches = [batch for epoch in range(NUM_STEPS) for batch in make_epoch_batches(captions, 8, 0, epoch)][:NUM_STEPS]
    adam = make_optimizer(1e-2, clip_norm=1.0, mixed_precision=False)
    state, train_step = make_step(caption_model, adam, objective, captions, cache)
    recorder = LossRecorder()
    for batch in make_dataset(captions, batches, cache.read):
        train_step(batch)
        recorder(state)
    recorded = json.loads(FILE.read_text()) if FILE.exists() else {}
    if os.environ.get("RECORD_LOSSES"):
        write_json(FILE, recorded | {name: [round(loss, 6) for loss in recorder.losses]})
    else:  # CPUs differ by rounding: by up to 3e-7 here
        np.testing.assert_allclose(recorder.losses, recorded[name], rtol=2e-5)
