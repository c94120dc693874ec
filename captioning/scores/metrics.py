"""Scores captions against reference captions: BLEU-1 to 4, METEOR, ROUGE-L, CIDEr and SPICE.

The scores are computed by pycocoevalcap, the code of the COCO challenge, on the words that published scores are of
(`captioning/scores/ptb_tokenizer.py`). METEOR and SPICE need Java. Everything in percent.
"""

import contextlib
import functools
import importlib.util
import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

from captioning.base.cli import log
from captioning.scores import ptb_tokenizer
from captioning.scores.java_scores import NEED_JAVA, JavaError, has_java, meteor, spice

SplitWords = Callable[[str], list[str]]


class Scores(NamedTuple):
    """Scores in percent by name: BLEU-1 to BLEU-4, METEOR, ROUGE-L, CIDEr, SPICE; the last of those asked for."""

    total: dict[str, float]  # of all captions, rounded to hundredths
    by_image: dict[str, list[float]]  # of each image's caption


def has_pycocoevalcap() -> bool:
    """Tells whether pycocoevalcap, which all scores need, is installed."""
    return importlib.util.find_spec("pycocoevalcap") is not None


def choose_tokenizer(words: str, split_words: Callable[..., list[str]]) -> tuple[str, SplitWords]:
    """Chooses how captions are split for their scores.

    Args:
        words: what a word is, `spaces` or `characters`, as in `DataConfig`.
        split_words: `tokenizer.split_words`, which splits characters.

    Returns:
        The name of the tokenizer, `PTB` or `characters`, and its function.
    """
    if words == "characters":
        return words, functools.partial(split_words, words=words)
    return "PTB", ptb_tokenizer.tokenize


def tokenize(texts: dict[int, list[str]], split_words: SplitWords) -> dict[int, list[str]]:
    """Splits the captions of every image into words, joined by spaces, as pycocoevalcap expects them.

    Args:
        texts: captions by the number of their image.
        split_words: splits a caption into words.
    """
    return {number: [" ".join(split_words(text)) for text in captions] for number, captions in texts.items()}


def score(
    references: list[list[str]],
    captions: list[str],
    split_words: SplitWords = ptb_tokenizer.tokenize,
    with_meteor: bool = False,
    with_spice: bool = False,
) -> Scores:
    """Scores captions, each against the reference captions of its image, with pycocoevalcap.

    Args:
        references: the reference captions of each image.
        captions: one caption for each image.
        split_words: splits a caption into words.
        with_meteor: whether to compute METEOR, which needs Java.
        with_spice: whether to compute SPICE, see `java_scores.check_spice`.

    Returns:
        The scores. If the program of METEOR or of SPICE fails, that is logged and the score is left out.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    gts = tokenize(dict(enumerate(references)), split_words)  # pycocoevalcap's name: ground truths
    res = tokenize({number: [text] for number, text in enumerate(captions)}, split_words)  # and results
    found: dict[str, tuple[float, Sequence[float]]] = {}  # the score of all captions and those of the images, by name
    with contextlib.redirect_stdout(io.StringIO()):  # pycocoevalcap prints its counts
        bleu = zip(*Bleu(4).compute_score(gts, res, verbose=0), strict=True)
        found |= {f"BLEU-{n}": values for n, values in enumerate(bleu, 1)}
        if with_meteor:
            found |= _score_with_java("METEOR", meteor, gts, res)
        found["ROUGE-L"] = Rouge().compute_score(gts, res)
        found["CIDEr"] = Cider().compute_score(gts, res)
    if with_spice:
        found |= _score_with_java("SPICE", spice, gts, res)
    return Scores(
        {name: round(100 * float(total), 2) for name, (total, _) in found.items()},
        {name: [100 * float(value) for value in by_image] for name, (_, by_image) in found.items()},
    )


def _score_with_java(name: str, compute: Callable, gts: dict, res: dict) -> dict[str, tuple[float, Sequence[float]]]:
    """Computes a score that a Java program computes; logs a failure, and returns nothing then."""
    try:
        return {name: compute(gts, res)}
    except JavaError as error:
        log(f"{name} is left out: {error}")
        return {}


def score_all(
    references: list[list[str]],
    captions: list[str],
    split_words: Callable[..., list[str]],
    words: str,
    with_spice: bool = False,
) -> tuple[Scores, str]:
    """Computes all scores that this machine can compute, and logs which it cannot.

    Args:
        references: see `score`.
        captions: see `score`.
        split_words: see `choose_tokenizer`.
        words: see `choose_tokenizer`.
        with_spice: see `score`.

    Returns:
        The scores, and the name of the tokenizer.
    """
    name, split = choose_tokenizer(words, split_words)
    with_meteor = name == "PTB" and has_java()
    if name == "characters":
        log("METEOR knows English words only: it is left out, and scores are of characters")
    elif not with_meteor:
        log(f"METEOR is left out: {NEED_JAVA}")
    return score(references, captions, split, with_meteor, with_spice), name


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
