"""What captions score that need no model: one caption for all images, and those of the nearest training images.

A model that scores no more has not learnt to use the images, however fluent its captions are.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from captioning.base.cli import log
from captioning.data.annotations import Example
from captioning.images.feature_cache import FeatureCache, read_batches
from captioning.scores import metrics
from tokenizer import split_words

MAX_CAPTIONS = 10_000  # of the training, of which one is chosen
MAX_NEIGHBOURS = 5_000  # training images; to read the features of more takes long
BATCH_SIZE = 64  # images whose features are read together
FEW_DISTINCT = 0.1  # of the number of different captions that people wrote for the images


class Baselines(NamedTuple):
    """What captions without a model score on some images, in CIDEr."""

    constant: str  # the caption that is given to all images
    constant_cider: float
    nearest_cider: float | None  # of the captions of the nearest training images; None without their features
    num_distinct: int  # different captions, of one that people wrote for each image

    def verdict(self, cider: float, num_distinct: int) -> str | None:
        """Says what it means if captions score no more, or if few are different; None if neither is so."""
        if cider <= self.constant_cider:
            found = "no more than one caption for all images"
        elif num_distinct < FEW_DISTINCT * self.num_distinct:
            found = f"with {num_distinct:,} different captions, where people wrote {self.num_distinct:,}"
        elif self.nearest_cider is not None and cider <= self.nearest_cider:
            found = "no more than captions that are copied from similar images"
        else:
            return None
        return f"CIDEr {cider:.1f}, {found}: the model hardly uses the images; docs/same-caption.md says what to try"


def compare_with_baselines(
    examples: Sequence[Example],
    train_examples: Sequence[Example],
    cache: FeatureCache | None,
    words: str,
    cider: float,
    num_distinct: int,
) -> dict[str, Any] | None:
    """Logs what captions of the training images score on other images, and what it means if a model scores no more.

    Args:
        examples: the images, with their reference captions.
        train_examples: the training images.
        cache: has the features of both, or of none; None if there is no cache.
        words: what a word is, see `tokenizer.split_words`.
        cider: the CIDEr of the model's captions.
        num_distinct: the number of them that are different.

    Returns:
        The baselines, for JSON; None if CIDEr cannot tell, or there are no training images.
    """
    if len(examples) < metrics.MIN_CIDER_IMAGES or not train_examples or not metrics.has_pycocoevalcap():
        return None
    baselines = find_baselines(examples, train_examples, cache, words)
    nearest = "" if baselines.nearest_cider is None else f", of the nearest training images {baselines.nearest_cider}"
    log(f"CIDEr without a model: of {baselines.constant!r} for all images {baselines.constant_cider}{nearest}")
    if verdict := baselines.verdict(cider, num_distinct):
        log(verdict, error=True)
    return baselines._asdict()


def find_baselines(
    examples: Sequence[Example], train_examples: Sequence[Example], cache: FeatureCache | None, words: str
) -> Baselines:
    """Finds what captions of the training images score on other images; see `compare_with_baselines`."""
    references = [list(example.captions) for example in examples]
    scorer = metrics.ReferenceScorer(references, words)
    captions = [caption for example in train_examples for caption in example.captions]
    constant = most_typical(captions[:MAX_CAPTIONS], references, words)
    neighbours = [] if cache is None else find_neighbours(cache, examples, train_examples[:MAX_NEIGHBOURS])
    return Baselines(
        constant,
        scorer.score([constant] * len(examples))["CIDEr"],
        scorer.score([neighbour.captions[0] for neighbour in neighbours])["CIDEr"] if neighbours else None,
        len({example.captions[0] for example in examples}),
    )


def most_typical(captions: Sequence[str], references: Sequence[Sequence[str]], words: str) -> str:
    """Returns the caption that is most like all references by its weighted n-grams of 1 to 4 words, as CIDEr is."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import

    def split(text: str) -> list[str]:
        return split_words(text, words)

    texts = [text for image in references for text in image]
    similarity = np.zeros(len(captions))
    for n in range(1, min(4, max(len(split(text)) for text in texts)) + 1):
        vectorizer = TfidfVectorizer(tokenizer=split, token_pattern=None, lowercase=False, ngram_range=(n, n))
        vectorizer.fit(" ".join(image) for image in references)  # an image is a document
        similarity += vectorizer.transform(captions) @ np.asarray(vectorizer.transform(texts).mean(axis=0))[0]
    return captions[int(similarity.argmax())]


def find_neighbours(cache: FeatureCache, examples: Sequence[Example], candidates: Sequence[Example]) -> list[Example]:
    """Returns for each image the candidate whose mean features have the largest cosine with its own.

    Candidates without features are left out; the list is empty if none has any, or an image has none.
    """
    without = set(cache.missing(example.image_path for example in (*examples, *candidates)))
    candidates = [example for example in candidates if example.image_path not in without]
    if not candidates or any(example.image_path in without for example in examples):
        return []
    nearest = _mean_features(cache, examples) @ _mean_features(cache, candidates).T  # (images, candidates)
    return [candidates[index] for index in nearest.argmax(axis=1)]


def _mean_features(cache: FeatureCache, examples: Sequence[Example]) -> np.ndarray:
    """Returns the features of images as the mean of their locations, of length 1: (images, C) float32."""
    batches = read_batches(cache, (example.image_path for example in examples), BATCH_SIZE)
    means = np.concatenate([features.numpy().mean(axis=1, dtype=np.float32) for features in batches])
    return means / np.linalg.norm(means, axis=1, keepdims=True)
