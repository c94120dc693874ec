"""The training step of train.py on one device."""

import train
from captioning.base.quiet_tensorflow import tf
from captioning.training.checkpoints import TrainProgress
from captioning.training.input_pipeline import TrainBatches
from captioning.training.optimizer import WeightEMA


def make_step(caption_model, optimizer, objective, captions, cache, ema_decay=0.0):
    """Returns the state and the step of a training."""
    optimizer.build(caption_model.trainable_variables)
    ema = WeightEMA(caption_model.trainable_variables, ema_decay)
    state = train.TrainState(caption_model, optimizer, ema, TrainProgress(), objective)
    config, strategy = objective.config, tf.distribute.get_strategy()
    return state, train.make_train_step(
        state, config, strategy, TrainBatches(captions, cache.read, config, strategy).spec
    )


def read_weights(caption_model):
    """Returns the values of the weights."""
    return [variable.numpy() for variable in caption_model.trainable_variables]
