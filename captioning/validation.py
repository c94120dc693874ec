"""Validation: the loss with teacher forcing, and the scores of generated captions."""

from collections.abc import Callable
from typing import Any

from captioning import metrics
from captioning.cli import log
from captioning.input_pipeline import Batch, EncodedCaptions, make_dataset, make_epoch_batches
from captioning.losses import gather_targets, masked_cross_entropy
from captioning.quiet_tensorflow import tf


class Validator:
    """Validates a model on the images of one split.

    Args:
        model: the caption model.
        captions: the reference captions, encoded.
        references: the reference captions of each image, as text.
        read_features: maps paths of feature files to their content; see `make_dataset`.
        generate_captions: captions the same images, without reference captions.
        split_words: the tokenizer's way to split a caption.
        batch_size: captions in a batch.
    """

    def __init__(
        self,
        model: tf.keras.Model,
        captions: EncodedCaptions,
        references: list[list[str]],
        read_features: Callable[[tf.Tensor], tf.Tensor],
        generate_captions: Callable[[], list[str]],
        split_words: Callable[[str], list[str]],
        batch_size: int,
    ):
        self.captions, self.references, self.batch_size = captions, references, batch_size
        self.read_features, self.generate_captions, self.split_words = read_features, generate_captions, split_words
        self.has_scores = metrics.has_pycocoevalcap()
        if not self.has_scores:
            log(
                "BLEU-4 and CIDEr are left out, and the best epoch is chosen by the validation loss: they need "
                "`pip install pycocoevalcap`"
            )

        @tf.function(input_signature=[make_dataset(captions, [], read_features).element_spec])
        def val_step(batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
            outputs = model(batch.features, batch.tokens, batch.image_index)
            losses, mask = masked_cross_entropy(outputs.logits, gather_targets(batch.tokens, outputs.positions))
            return tf.reduce_sum(losses), tf.reduce_sum(mask)

        self._val_step = val_step

    def loss(self) -> float:
        """Computes the mean loss of the reference captions, in nats per word."""
        batches = make_epoch_batches(self.captions, self.batch_size, seed=0, epoch=0)
        sums = [self._val_step(batch) for batch in make_dataset(self.captions, batches, self.read_features)]
        return float(sum(loss for loss, _ in sums) / sum(num_tokens for _, num_tokens in sums))

    def evaluate(self) -> tuple[dict[str, Any], str]:
        """Computes the scores of an epoch.

        Returns:
            A row of history.csv, in which scores that cannot be computed are None; and the first image's caption.
        """
        texts = self.generate_captions()
        scores = {}
        if self.has_scores:
            # Without Java, so that a run chooses the same epoch on every machine.
            scores = metrics.score(self.references, texts, java=False, split_words=self.split_words)
        row = {
            "val_loss": round(self.loss(), 4),
            "bleu4": scores.get("BLEU-4"),
            "cider": scores.get("CIDEr"),
            "distinct_ratio": metrics.distinct_ratio(texts),
        }
        return row, texts[0]
