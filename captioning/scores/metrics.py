"""Scores captions against reference captions: BLEU-1 to 4, METEOR, ROUGE-L, CIDEr and SPICE.

The scores are computed by pycocoevalcap, the code of the COCO challenge, on the words that published scores are of
(`captioning/scores/ptb_tokenizer.py`). METEOR and SPICE need Java. Everything in percent.
"""

import contextlib
import importlib.util
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from captioning.base.cli import log
from captioning.scores import ptb_tokenizer
from captioning.scores.java_scores import NEED_JAVA, compute_java_score, has_java
from tokenizer import split_words

# Images that CIDEr needs to compare models. It weighs an n-gram by log(images / images that have it): of one image all
# weights are log 1, and CIDEr is 0 whatever the caption is. With a few, it is the mean of so few captions that one of
# them decides; of 20, a caption is 5 % of the mean.
MIN_CIDER_IMAGES = 20

# How captions are split for their scores, by what a word is: `words` of `DataConfig`.
TOKENIZERS = {"spaces": "PTB", "characters": "characters"}


class Scores(NamedTuple):
    """Scores in percent by name: BLEU-1 to BLEU-4, METEOR, ROUGE-L, CIDEr, SPICE; the last of those asked for."""

    total: dict[str, float]  # of all captions, rounded to hundredths
    by_image: dict[str, list[float]]  # of each image's caption


def has_pycocoevalcap() -> bool:
    """Tells whether pycocoevalcap, which all scores need, is installed."""
    return importlib.util.find_spec("pycocoevalcap") is not None


def tokenize(texts: dict[int, list[str]], words: str) -> dict[int, list[str]]:
    """Splits the captions of every image into words, joined by spaces, as pycocoevalcap expects them.

    Args:
        texts: captions by the number of their image.
        words: what a word is, a key of `TOKENIZERS`.
    """

    def split(text: str) -> list[str]:
        return split_words(text, words) if words == "characters" else ptb_tokenizer.tokenize(text)

    return {number: [" ".join(split(text)) for text in captions] for number, captions in texts.items()}


def score(
    references: list[list[str]], captions: list[str], words: str = "spaces", java_scores: Sequence[str] = ()
) -> Scores:
    """Scores captions, each against the reference captions of its image, with pycocoevalcap.

    Args:
        references: the reference captions of each image.
        captions: one caption for each image.
        words: what a word is, a key of `TOKENIZERS`.
        java_scores: what to compute of METEOR and SPICE. If its program fails, a score is left out.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    gts = tokenize(dict(enumerate(references)), words)  # pycocoevalcap's name: ground truths
    res = tokenize({number: [text] for number, text in enumerate(captions)}, words)  # and results
    found: dict[str, tuple[float, Sequence[float]] | None] = {}  # the score of all captions and those of the images
    with contextlib.redirect_stdout(io.StringIO()):  # pycocoevalcap prints its counts
        bleu = zip(*Bleu(4).compute_score(gts, res, verbose=0), strict=True)
        found |= {f"BLEU-{n}": values for n, values in enumerate(bleu, 1)}
        if "METEOR" in java_scores:
            found["METEOR"] = compute_java_score("METEOR", gts, res)
        found["ROUGE-L"] = Rouge().compute_score(gts, res)
        found["CIDEr"] = Cider().compute_score(gts, res)
    if "SPICE" in java_scores:
        found["SPICE"] = compute_java_score("SPICE", gts, res)
    scores = Scores({}, {})
    for name, result in found.items():
        if result is not None:
            scores.total[name] = round(100 * float(result[0]), 2)
            scores.by_image[name] = [100 * float(value) for value in result[1]]
    return scores


class ReferenceScorer:
    """BLEU-4 and CIDEr of captions of the same images, epoch after epoch: those of `score`, in a sixth of its time.

    The reference captions are split and counted once. For the arguments see `score`.
    """

    def __init__(self, references: list[list[str]], words: str = "spaces"):
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider_scorer import CiderScorer

        self.words = words
        self._bleu, cider = BleuScorer(n=4), CiderScorer()
        for captions in tokenize(dict(enumerate(references)), words).values():
            self._bleu.cook_append(None, captions)
            cider.cook_append(None, captions)
        cider.compute_doc_freq()
        self._log_num_images = np.log(float(len(references)))
        self._log_frequency = {ngram: np.log(count) for ngram, count in cider.document_frequency.items()}
        self._references = [list(map(self._weigh, captions)) for captions in cider.crefs]

    def score(self, captions: list[str]) -> dict[str, float]:
        """Returns BLEU-4 and CIDEr of a caption of each image, in percent, rounded to hundredths."""
        from pycocoevalcap.cider.cider_scorer import cook_test

        texts = [text for [text] in tokenize({i: [text] for i, text in enumerate(captions)}, self.words).values()]
        bleu = self._bleu.retest(texts).compute_score(option="closest")[0][3]
        weighed = (self._weigh(cook_test(text)) for text in texts)
        cider = np.mean([_cider(text, others) for text, others in zip(weighed, self._references, strict=True)])
        return {"BLEU-4": round(100 * float(bleu), 2), "CIDEr": round(100 * float(cider), 2)}

    def _weigh(self, counts: Mapping[tuple[str, ...], int]) -> "_WeighedCaption":
        """Weighs the n-grams of a caption, given how often each occurs."""
        weights, squares, num_pairs = {}, [0.0] * 4, 0
        for ngram, count in counts.items():
            weights[ngram] = weight = float(count) * (self._log_num_images - self._log_frequency.get(ngram, 0.0))
            squares[len(ngram) - 1] += pow(weight, 2)
            num_pairs += count if len(ngram) == 2 else 0
        return _WeighedCaption(weights, [np.sqrt(square) for square in squares], num_pairs)


class _WeighedCaption(NamedTuple):
    """The n-grams of a caption as CIDEr compares them."""

    weights: dict[tuple[str, ...], float]
    norms: list[float]  # of the weights of the n-grams of 1 to 4 words
    num_pairs: int  # of words, by which pycocoevalcap compares lengths


def _cider(caption: _WeighedCaption, references: list[_WeighedCaption]) -> float:
    """Returns the CIDEr of a caption, from 0 to 10: each sum in pycocoevalcap's order, for the same last digits."""
    total = np.zeros(4)  # of the n-grams of 1 to 4 words
    for reference in references:
        cosines = np.zeros(4)
        for ngram, weight in caption.weights.items():
            if other := reference.weights.get(ngram):
                cosines[len(ngram) - 1] += min(weight, other) * other
        for n, (norm, other_norm) in enumerate(zip(caption.norms, reference.norms, strict=True)):
            if norm and other_norm:
                cosines[n] /= norm * other_norm
        difference = float(caption.num_pairs - reference.num_pairs)
        total += cosines * np.e ** (-(difference**2) / (2 * 6.0**2))
    return float(np.mean(total)) / len(references) * 10.0


def score_all(references: list[list[str]], captions: list[str], words: str, with_spice: bool = False) -> Scores:
    """Computes all scores that this machine can compute, and logs which it cannot; for the arguments see `score`."""
    java_scores = ["SPICE"] if with_spice else []
    if words == "characters":
        log("METEOR knows English words only: it is left out, and scores are of characters")
    elif has_java():
        java_scores.append("METEOR")
    else:
        log(f"METEOR is left out: {NEED_JAVA}")
    return score(references, captions, words, java_scores)


def distinct_ratio(texts: list[str]) -> float:
    """Returns the number of different captions, in percent of all captions."""
    return round(100 * len(set(texts)) / len(texts), 1)


def copied_ratio(texts: list[str], train_captions: Iterable[str], words: str) -> float:
    """Returns the number of captions that some training caption has word by word, in percent of all captions."""
    known = {tuple(split_words(caption, words)) for caption in train_captions}
    return round(100 * sum(tuple(split_words(text, words)) in known for text in texts) / len(texts), 1)


# Words after which an English sentence goes on. People end a caption with one of them once in a thousand captions of
# Flickr8k; with "on", "by", "behind", "over" and "her" more often ("a man looks on"), so that these are not among them.
_WORDS_WITHIN_SENTENCES = """
    a an the this that his its their my your another and or of in with at to for from into near between beside through
    while as is are was were has have
"""


def mid_sentence_ratio(texts: list[str]) -> float:
    """Returns the number of English captions that stop in mid-sentence, as "a dog on a", in percent of all captions."""
    words_within_sentences = set(_WORDS_WITHIN_SENTENCES.split())
    last_words = [text.lower().rstrip(" .").rsplit(" ", 1)[-1] for text in texts]
    num_cut = sum(word in words_within_sentences for word in last_words)
    return round(100 * num_cut / len(texts), 1)
