"""Validation: the loss with teacher forcing, the scores of generated captions, and which epoch is the best."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from captioning.base import devices
from captioning.base.cli import log
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import DecodeConfig, TrainConfig
from captioning.data.annotations import Example
from captioning.decoder.losses import masked_cross_entropy
from captioning.images.feature_cache import FeatureSource
from captioning.scores import metrics
from captioning.training.input_pipeline import Batch, EncodedCaptions, encode_captions, make_dataset, make_epoch_batches

# Validation images from which CIDEr chooses the best epoch. CIDEr weighs an n-gram by log(images / images that have
# it): of one image all weights are log 1, and CIDEr is 0 whatever the caption is. With a few, it is the mean of so few
# captions that one of them decides; of 20, a caption is 5 % of the mean.
MIN_CIDER_IMAGES = 20


class EpochScore(NamedTuple):
    """How good an epoch is. Of two epochs the one with the larger tuple is better; the default is worse than any.

    CIDEr decides. Where two have the same, fewer empty captions are better, and then the lower validation loss. CIDEr
    is 0 for all epochs where it cannot be computed or the images are fewer than `MIN_CIDER_IMAGES`, so that the others
    decide. An epoch whose CIDEr is above 0 is therefore better than one without, if a run is resumed where
    pycocoevalcap was installed, or removed, in between.
    """

    cider: float = -math.inf
    negative_num_empty: float = -math.inf
    negative_val_loss: float = -math.inf

    @property
    def column(self) -> str:
        """The column of history.csv that decided, `cider` or `val_loss`."""
        return "cider" if self.cider > 0 else "val_loss"

    def __str__(self) -> str:
        return f"CIDEr {self.cider:.1f}" if self.cider > 0 else f"validation loss {-self.negative_val_loss:.2f}"


class Validation(NamedTuple):
    """What the validation after an epoch found."""

    row: dict[str, Any]  # the columns of history.csv that it fills; scores that cannot be computed are None
    score: EpochScore
    sample: str  # the first image's caption


class Validator:
    """Validates a model on the images of one split.

    Args:
        model: the caption model.
        captions: the reference captions, encoded.
        references: the reference captions of each image, as text.
        read_features: maps paths of feature files to their content; see `make_dataset`.
        generate_captions: captions the same images, without reference captions.
        split_words: splits a caption into the words that are scored, see `metrics.choose_tokenizer`.
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
        self.cider_decides = self.has_scores and len(references) >= MIN_CIDER_IMAGES
        self._log_what_decides()

        @tf.function(input_signature=[make_dataset(captions, [], read_features).element_spec])
        def val_step(batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
            outputs = model(batch.features, batch.tokens, batch.image_index, order=batch.order)
            losses, mask = masked_cross_entropy(outputs.logits, outputs.targets)
            return tf.reduce_sum(losses), tf.reduce_sum(mask)

        self._val_step = val_step

    def loss(self) -> float:
        """Computes the mean loss of the reference captions, in nats per word."""
        batches = make_epoch_batches(self.captions, self.batch_size, seed=0, epoch=0)
        sums = [self._val_step(batch) for batch in make_dataset(self.captions, batches, self.read_features)]
        return float(sum(loss for loss, _ in sums) / sum(num_tokens for _, num_tokens in sums))

    def evaluate(self) -> Validation:
        """Computes the scores of an epoch."""
        texts = self.generate_captions()
        scores: dict[str, float] = {}
        if self.has_scores:
            # Without Java, so that a run chooses the same epoch on every machine.
            scores = metrics.score(self.references, texts, self.split_words).total
        val_loss = round(self.loss(), 4)
        row = {
            "val_loss": val_loss,
            "bleu4": scores.get("BLEU-4"),
            "cider": scores.get("CIDEr"),
            "distinct_ratio": metrics.distinct_ratio(texts),
        }
        num_empty = sum(not text.strip() for text in texts)
        cider = scores["CIDEr"] if self.cider_decides else 0.0
        return Validation(row, EpochScore(cider, -num_empty, -val_loss), texts[0])

    def log_best_so_far(self, best: EpochScore) -> None:
        """Says where a resumed run compares epochs by something else than before."""
        if best.cider > 0 and not self.cider_decides:
            log("the best epoch so far was chosen by CIDEr, which cannot be computed now: it stays the best")
        if best.cider == 0 and self.cider_decides:
            log("the best epoch so far was chosen without CIDEr: the next one with a CIDEr above 0 is taken as better")

    def _log_what_decides(self) -> None:
        """Says what is left out, and what chooses the best epoch if not CIDEr."""
        num_images, chooser = len(self.references), ""
        if num_images < MIN_CIDER_IMAGES:
            images = "1 validation image is" if num_images == 1 else f"{num_images} validation images are"
            log(
                f"{images} too few for CIDEr to choose the best epoch (expected at least {MIN_CIDER_IMAGES}): the "
                "validation loss chooses it"
            )
        else:
            chooser = ", and the best epoch is chosen by the validation loss"
        if not self.has_scores:
            log(f"BLEU-4 and CIDEr are left out{chooser}: they need `pip install pycocoevalcap`")


def make_validator(
    model: tf.keras.Model,
    examples: list[Example],
    tokenizer: Any,
    cache: FeatureSource,
    config: TrainConfig,
    generate_captions: Callable[..., list[Any]],
    split_words: Callable[[str], list[str]],
) -> Validator:
    """Makes the validator of a run, for at most `max_val_images` images.

    Args:
        model: the caption model.
        examples: the images for validation.
        tokenizer: the `Tokenizer`.
        cache: holds the features of the images.
        config: the settings of the training.
        generate_captions: `evaluate.generate_captions`.
        split_words: splits a caption for the scores.
    """
    examples = examples[: config.max_val_images]

    def generate() -> list[str]:
        decoding = DecodeConfig(max_words=config.max_length)
        captions = generate_captions(model, tokenizer, cache, examples, config.batch_size, decoding)
        return [caption.text for caption in captions]

    return Validator(
        model,
        encode_captions(examples, tokenizer.encode, cache.path, config.max_length),
        [list(example.captions) for example in examples],
        cache.read,
        generate,
        split_words,
        config.batch_size,
    )


def score_start(validator: Validator, save_best: Callable[[], None], strategy: tf.distribute.Strategy) -> EpochScore:
    """Scores the weights that self-critical training starts from; they stay the best until an epoch is better.

    Args:
        validator: that of the run.
        save_best: saves the weights as the best.
        strategy: of several machines, one validates.
    """
    score = EpochScore()
    if devices.is_chief(strategy):
        score = validator.evaluate().score
        log(f"the start: {score}")
        save_best()
    return EpochScore(*devices.broadcast_from_chief(strategy, score))
