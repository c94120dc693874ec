"""Rewards of sampled captions for self-critical training: CIDEr-D (Vedantam et al. 2015) and BLEU-4.

Both are those of pycocoevalcap, the code of the COCO challenge, whose CIDEr is CIDEr-D; but of token ids instead of
words, a caption at a time, and CIDEr-D with the document frequencies of the training captions. A caption's <end> is a
word like the others, so that a caption that stops in mid-sentence loses the n-grams with it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from captioning.base.special_tokens import PAD_ID, START_ID

MAX_ORDER = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of CIDEr-D's penalty of another length
TINY, SMALL = 1e-15, 1e-9  # pycocoevalcap's, which keep a BLEU without a common n-gram above 0

NGram = tuple[int, ...]

# Maps captions (R, T) and the numbers of their images (R,) to rewards (R,) float32.
Reward = Callable[[np.ndarray, np.ndarray], np.ndarray]


def count_ngrams(words: Sequence[int]) -> Counter[NGram]:
    """Counts the n-grams of 1 to 4 words of a caption."""
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_ORDER + 1) for i in range(len(words) - n + 1))


def words_of(tokens: Iterable[int]) -> list[int]:
    """Returns the ids of a caption that count: all but <start> and the padding after <end>."""
    return [int(token) for token in tokens if token not in (PAD_ID, START_ID)]


class NGrams(NamedTuple):
    """The n-grams of a caption, as BLEU and CIDEr-D compare them."""

    length: int  # number of words
    counts: Counter[NGram]
    weights: dict[NGram, float]  # of each n-gram its count times its inverse document frequency
    norms: list[float]  # of the weights of each order


class CaptionReward:
    """Scores captions of the training images by their reference captions.

    Args:
        references: the token ids of the reference captions of each image.
        bleu_weight: how much of BLEU-4 is added to CIDEr-D.
    """

    def __init__(self, references: Iterable[Iterable[Iterable[int]]], bleu_weight: float = 0.0):
        self.references = [[words_of(caption) for caption in captions] for captions in references]
        self.bleu_weight = bleu_weight
        self.log_num_images = math.log(len(self.references))
        num_images: Counter[NGram] = Counter()  # that have an n-gram in a reference caption
        for captions in self.references:
            num_images.update(set().union(*map(count_ngrams, captions)))
        # Most n-grams occur once. An unknown one counts the same, so they need not be kept.
        self.log_frequency = {ngram: math.log(count) for ngram, count in num_images.items() if count > 1}

    def __call__(self, tokens: np.ndarray, image_numbers: np.ndarray) -> np.ndarray:
        """Returns the rewards (R,) float32 of captions (R, T), padded with <pad>, of the images (R,).

        A caption like the references has a CIDEr-D of about 1, and a BLEU-4 of at most 1.
        """
        rewards = np.zeros(len(tokens), np.float32)
        references = {number: list(map(self.weigh, self.references[number])) for number in set(image_numbers)}
        for row, number in enumerate(image_numbers):
            caption = self.weigh(words_of(tokens[row]))
            rewards[row] = cider_d(caption, references[number])
            if self.bleu_weight:
                rewards[row] += self.bleu_weight * bleu4(caption, references[number])
        return rewards

    def cider(self, captions: list[list[int]], references: list[list[list[int]]]) -> float:
        """Returns the mean CIDEr-D, in percent, of captions of other images, with the reference captions of each."""
        weighed = [[self.weigh(words_of(caption)) for caption in others] for others in references]
        scores = [cider_d(self.weigh(words_of(caption)), own) for caption, own in zip(captions, weighed, strict=True)]
        return 100 * sum(scores) / len(scores)

    def weigh(self, words: list[int]) -> NGrams:
        """Weighs the n-grams of a caption: frequent ones of few images are worth most."""
        counts = count_ngrams(words)
        weights = {
            ngram: count * (self.log_num_images - self.log_frequency.get(ngram, 0.0)) for ngram, count in counts.items()
        }
        squares = [0.0] * MAX_ORDER
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight * weight
        return NGrams(len(words), counts, weights, [math.sqrt(square) for square in squares])


def cider_d(caption: NGrams, references: list[NGrams]) -> float:
    """Returns the mean over the references and orders of the clipped cosine of two captions, times 10."""
    total = 0.0
    for reference in references:
        products = [0.0] * MAX_ORDER
        for ngram, weight in caption.weights.items():
            if other := reference.weights.get(ngram):
                products[len(ngram) - 1] += min(weight, other) * other
        norms = zip(products, caption.norms, reference.norms, strict=True)
        cosines = sum(product / (x * y) for product, x, y in norms if x and y)
        total += cosines * math.exp(-((caption.length - reference.length) ** 2) / (2 * SIGMA**2))
    return 10 * total / (MAX_ORDER * len(references))


def bleu4(caption: NGrams, references: list[NGrams]) -> float:
    """Returns the BLEU-4 of one caption (Papineni et al. 2002), with the length of the closest reference."""
    largest: Counter[NGram] = Counter()
    for reference in references:
        largest |= reference.counts
    common = [0] * MAX_ORDER
    for ngram, count in caption.counts.items():
        common[len(ngram) - 1] += min(count, largest[ngram])
    precision = 1.0
    for n, num_common in enumerate(common):
        precision *= (num_common + TINY) / (max(0, caption.length - n) + SMALL)
    lengths = sorted(reference.length for reference in references)
    closest = min(lengths, key=lambda length: abs(length - caption.length))
    ratio = (caption.length + TINY) / (closest + SMALL)
    return precision ** (1 / MAX_ORDER) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)
