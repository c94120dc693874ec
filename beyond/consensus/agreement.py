"""How well captions agree with others: CIDEr-D (Vedantam et al. 2015) of token ids, for many captions at once.

In the comments R is the number of captions and T the number of words of the longest one.
"""

from typing import NamedTuple

import numpy as np

from captioning.base.special_tokens import PAD_ID

MAX_ORDER = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of the penalty of another length
# An n-gram is a number of 64 bits: a polynomial of its ids at this odd number. Of three million n-grams, as many as all
# of COCO has, two are the same by chance in one of four million collections.
BASE = np.uint64(0x9E3779B97F4A7C15)


class NGrams(NamedTuple):
    """The n-grams of some captions; of a caption that has one several times, one entry for each."""

    caption: np.ndarray  # (G,), the number of the caption
    code: np.ndarray  # (G,) uint64, the words
    order: np.ndarray  # (G,), the number of words less 1


def find_ngrams(tokens: np.ndarray) -> NGrams:
    """Finds the n-grams of 1 to 4 words of captions (R, T), padded with <pad>."""
    words = tokens.astype(np.uint64)
    codes = np.zeros_like(words)
    parts = []
    for n in range(min(MAX_ORDER, tokens.shape[1])):
        last = words[:, n:]  # the last words of the n-grams that begin at each place
        codes = codes[:, : last.shape[1]] * BASE + last  # which leaves the highest bits out
        caption, place = np.nonzero(last != PAD_ID)
        parts.append(NGrams(caption, codes[caption, place], np.full(len(caption), n, np.int8)))
    return NGrams(*map(np.concatenate, zip(*parts, strict=True)))


class DocumentFrequencies(NamedTuple):
    """How many images have an n-gram in one of their captions."""

    num_images: int
    codes: np.ndarray  # (F,) uint64, sorted; only n-grams of several images, since an unknown one counts as of one
    counts: np.ndarray  # (F,) int32

    @classmethod
    def of(cls, tokens: np.ndarray, images: np.ndarray) -> "DocumentFrequencies":
        """Counts the n-grams of captions (R, T), padded with <pad>; `images` (R,) are the numbers of their images."""
        ngrams = find_ngrams(tokens)
        image = images[ngrams.caption]
        order = np.lexsort((image, ngrams.code))
        image, code = image[order], ngrams.code[order]
        is_new_code = np.diff(code, prepend=code[:1] + np.uint64(1)) != 0
        is_new_image = is_new_code | (np.diff(image, prepend=-1) != 0)
        codes, counts = np.unique(code[is_new_image], return_counts=True)
        is_frequent = counts > 1
        return cls(len(np.unique(images)), codes[is_frequent], counts[is_frequent].astype(np.int32))

    def weights(self, codes: np.ndarray) -> np.ndarray:
        """Returns the inverse document frequencies of n-grams, log(images / images that have it)."""
        index = np.minimum(np.searchsorted(self.codes, codes), max(0, len(self.codes) - 1))
        counts = np.where(self.codes[index] == codes, self.counts[index], 1) if len(self.codes) else np.ones(len(codes))
        return np.log(self.num_images) - np.log(counts)


def cider_d(captions: np.ndarray, references: np.ndarray, frequencies: DocumentFrequencies) -> np.ndarray:
    """Returns the CIDEr-D of each of K captions with each of R references, (K, R), from 0 to 10.

    Both are token ids padded with <pad>, (K, T) and (R, T), without <start>.
    """
    num_captions, num_references = len(captions), len(references)
    width = max(captions.shape[1], references.shape[1])
    both = np.concatenate([np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (captions, references)])
    ngrams = find_ngrams(both)
    codes, first, column = np.unique(ngrams.code, return_index=True, return_inverse=True)
    order, inverse_frequency = ngrams.order[first], frequencies.weights(codes)
    # How often a caption has an n-gram.
    cells, counts = np.unique(ngrams.caption * len(codes) + column, return_counts=True)
    row, column = np.divmod(cells, max(1, len(codes)))
    weights = counts * inverse_frequency[column]
    squares = np.bincount(row * MAX_ORDER + order[column], weights**2, len(both) * MAX_ORDER)
    norms = np.sqrt(squares).reshape(-1, MAX_ORDER)
    # As a table, of the n-grams that one of the captions has: others add nothing to a product.
    is_used = np.zeros(len(codes), bool)
    is_used[column[row < num_captions]] = True
    table = np.zeros((len(both), is_used.sum()))
    used = is_used[column]
    table[row[used], (np.cumsum(is_used) - 1)[column[used]]] = weights[used]
    mine, theirs, order = table[:num_captions], table[num_captions:], order[is_used]
    similarities = np.empty((num_captions, num_references))
    for k, caption in enumerate(mine):
        (own,) = np.nonzero(caption)  # its n-grams, a few of all
        products = np.minimum(caption[own], theirs[:, own]) * theirs[:, own]  # (R, n-grams)
        by_order = products @ np.eye(MAX_ORDER)[order[own]]  # (R, 4)
        scale = norms[k] * norms[num_captions:]  # (R, 4)
        similarities[k] = np.divide(by_order, scale, out=np.zeros_like(scale), where=scale > 0).sum(axis=1)
    lengths = np.count_nonzero(both != PAD_ID, axis=1)
    difference = lengths[:num_captions, np.newaxis] - lengths[np.newaxis, num_captions:]
    return 10 / MAX_ORDER * similarities * np.exp(-(difference**2) / (2 * SIGMA**2))
