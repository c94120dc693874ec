"""Validation: the loss with teacher forcing, the scores of generated captions, and which epoch is the best."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import evaluate
from captioning.base.cli import InputError, log
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import DecodeConfig, TrainConfig
from captioning.decoder.losses import loss_function
from captioning.images.feature_cache import FeatureCache
from captioning.output.captions import Caption
from captioning.scores import metrics
from captioning.scores.baselines import compare_with_baselines
from captioning.scores.metrics import MIN_CIDER_IMAGES
from captioning.training.input_pipeline import Batch, TrainData, encode_captions, make_dataset, make_epoch_batches

# Maps the token ids of captions, and of the reference captions of each, to their CIDEr in percent.
OwnCider = Callable[[list[list[int]], list[list[list[int]]]], float]


class EpochScore(NamedTuple):
    """How good an epoch is. Of two epochs the one with the larger tuple is better; the default is worse than any.

    CIDEr is 0 where it cannot be computed or the images are fewer than `MIN_CIDER_IMAGES`, so that the others decide.
    An objective that raises CIDEr brings one of its own for them: the loss, which rises with it, would decide falsely.
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
    """Validates a model on the images of the val split, at most `max_val_images` of them.

    `own_cider` is the objective's, see `CrossEntropy`; it counts where the images are too few.

    Raises:
        InputError: the objective needs pycocoevalcap for its CIDEr, which is not installed.
    """

    def __init__(self, model: tf.keras.Model, data: TrainData, config: TrainConfig, own_cider: OwnCider | None = None):
        self.model, self.data, self.config = model, data, config
        self.examples = data.dataset.split("val")[: config.max_val_images]
        self.references = [list(example.captions) for example in self.examples]
        self.captions = encode_captions(self.examples, data.tokenizer.encode, data.cache.path, config.max_length)
        self.has_scores = metrics.has_pycocoevalcap()
        has_images = len(self.references) >= MIN_CIDER_IMAGES
        if own_cider and has_images and not self.has_scores:  # a run must not compare two kinds of CIDEr
            raise InputError("this training chooses its best epoch by CIDEr: it needs `pip install pycocoevalcap`")
        self.own_cider = None if has_images else own_cider
        self.cider_decides = (has_images and self.has_scores) or self.own_cider is not None
        own = "CIDEr with the document frequencies of the training captions"
        chooser = own if self.own_cider else "the validation loss"
        if not has_images:
            log(
                f"too few validation images for CIDEr to choose the best epoch (found {len(self.references)}, expected "
                f"at least {MIN_CIDER_IMAGES}): {chooser} chooses it"
            )
        if not self.has_scores:
            chooser = f"the best epoch is chosen by {chooser}"
            log(f"BLEU-4 and CIDEr are left out, and {chooser}: they need `pip install pycocoevalcap`")

        @tf.function(input_signature=[make_dataset(self.captions, [], data.cache.read).element_spec])
        def val_step(batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
            outputs = model(batch.features, batch.tokens, batch.image_index, order=batch.order)
            losses, mask = loss_function(outputs.logits, outputs.targets)
            return tf.reduce_sum(losses), tf.reduce_sum(mask)

        self._val_step = val_step

    @functools.cached_property
    def _scorer(self) -> metrics.ReferenceScorer:
        # Without Java, so that a run chooses the same epoch on every machine.
        return metrics.ReferenceScorer(self.references, self.data.tokenizer.words)

    def generate_captions(self) -> list[Caption]:
        """Captions the images by greedy search, without the reference captions."""
        decoding = DecodeConfig(max_words=self.config.max_length)
        return evaluate.generate_captions(
            self.model, self.data.tokenizer, self.data.cache, self.examples, self.config.batch_size, decoding
        )

    def loss(self) -> float:
        """Computes the mean loss of the reference captions, in nats per word."""
        batch_size = self.config.batch_size
        if isinstance(self.data.cache, FeatureCache):  # a CNN in front would need more memory than in training
            batch_size = evaluate.widen(batch_size)
        batches = make_epoch_batches(self.captions, batch_size, seed=0, epoch=0)
        sums = [self._val_step(batch) for batch in make_dataset(self.captions, batches, self.data.cache.read)]
        return float(sum(loss for loss, _ in sums) / sum(num_tokens for _, num_tokens in sums))

    def evaluate(self) -> Validation:
        """Computes the scores of an epoch."""
        captions = self.generate_captions()
        texts = [caption.text for caption in captions]
        scores: dict[str, float] = {}
        if self.has_scores:
            scores = self._scorer.score(texts)
        if self.own_cider:
            encode = self.data.tokenizer.encode
            references = [list(map(encode, captions)) for captions in self.references]
            # A caption that was cut has no <end>, which counts as a word.
            ids = [encode(each.text)[: None if each.finished else -1] for each in captions]
            scores |= {"CIDEr": round(self.own_cider(ids, references), 2)}
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

    def log_baselines(self, row: dict[str, Any] | None) -> None:
        """Logs what captions without a model score on the images, and what it means if those of an epoch are no better.

        `row` has the epoch's scores, see `Validation`; None if no epoch was the best.
        """
        if row is None or row["cider"] in (None, ""):  # it is not scored
            return
        cache = self.data.cache if isinstance(self.data.cache, FeatureCache) else None
        train_examples, words = self.data.dataset.split("train"), self.data.tokenizer.words
        num_distinct = round(float(row["distinct_ratio"]) * len(self.examples) / 100)
        compare_with_baselines(self.examples, train_examples, cache, words, float(row["cider"]), num_distinct)

    def log_best_so_far(self, best: EpochScore) -> None:
        """Logs where a resumed run compares epochs by another score than before it stopped."""
        if best.cider > 0 and not self.cider_decides:
            log("the best epoch so far was chosen by CIDEr, which cannot be computed now: it stays the best")
        if best.cider == 0 and self.cider_decides:
            log("the best epoch so far was chosen without CIDEr: the next one with a CIDEr above 0 is taken as better")
