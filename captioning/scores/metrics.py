"""Scores captions against reference captions: BLEU-1 to 4, METEOR, ROUGE-L, CIDEr and SPICE.

The scores are computed by pycocoevalcap, the code of the COCO challenge, on the words that published scores are of
(`captioning/scores/ptb_tokenizer.py`). METEOR and SPICE need Java. Everything in percent.
"""

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from typing import NamedTuple

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
