"""What a training minimises: cross-entropy, unless train.py is given another objective, which is a subclass of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import TrainConfig
from captioning.decoder.losses import label_smoothing_term, loss_function
from captioning.training.input_pipeline import Batch


class StepSums(NamedTuple):
    """Sums over a batch, float32 scalars."""

    loss: tf.Tensor  # the cross-entropy of all words, in nats
    num_tokens: tf.Tensor  # the number of words
    others: tuple[tf.Tensor, ...] = ()  # what else `CrossEntropy.update` needs


class CrossEntropy(tf.Module):
    """The tutorial's objective: the mean cross-entropy of the words of a batch, teacher forced.

    Its variables, if a subclass has any, are saved with the checkpoints of the training.
    """

    column = "train_loss"  # of history.csv
    can_be_compiled = True  # by XLA
    starts_trained = False  # whether the first weights are those of another run, which are scored before the training
    own_cider: Callable | None = None  # the CIDEr that it raises, see `Validator`

    def __init__(self, config: TrainConfig):
        super().__init__()
        self.config = config

    def prepare(self, model: tf.keras.Model, batch: Batch, step: tf.Tensor) -> Any:
        """Makes what the loss needs of a batch outside the gradient, such as samples; here the batch itself.

        Random numbers follow from the training `step`, int64, so that a resumed run draws the same.
        """
        return batch

    def loss(self, model: tf.keras.Model, prepared: Any) -> tuple[tf.Tensor, StepSums]:
        """Returns what is minimised, a mean over the words of the batch, and the sums that are reported."""
        batch: Batch = prepared
        outputs = model(batch.features, batch.tokens, batch.image_index, training=True, order=batch.order)
        word_losses, mask = loss_function(outputs.logits, outputs.targets)  # (N,)
        sums = StepSums(loss=tf.reduce_sum(word_losses), num_tokens=tf.reduce_sum(mask))
        total = sums.loss
        if self.config.label_smoothing:
            total += self.config.label_smoothing * label_smoothing_term(outputs.logits, outputs.targets, mask)
        return total / tf.maximum(sums.num_tokens, 1), sums

    def update(self, sums: StepSums) -> None:
        """Updates the objective's own variables after a step."""

    def result(self, mean_loss: float) -> float:
        """Returns the value of `column`, rounded, for the mean of `StepSums.loss` over an epoch."""
        return round(mean_loss, 4)
