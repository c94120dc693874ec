"""Scores captions against reference captions: BLEU-1 to 4, METEOR, ROUGE-L and CIDEr.

The scores are computed by pycocoevalcap, the code of the COCO challenge. METEOR and the tokenizer of published scores
(PTB) need Java. Everything in percent.
"""

import contextlib
import functools
import importlib.util
import io
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from captioning.cli import log, suppress_stderr

NEED_JAVA = (
    "METEOR and the PTB tokenizer of published scores need Java (Debian, Ubuntu, Colab: "
    "apt-get install default-jre-headless)"
)

SplitWords = Callable[[str], list[str]]


class JavaError(Exception):
    """A failure of one of pycocoevalcap's Java programs."""


def has_pycocoevalcap() -> bool:
    """Tells whether pycocoevalcap, which all scores need, is installed."""
    return importlib.util.find_spec("pycocoevalcap") is not None


def has_java() -> bool:
    """Tells whether Java runs; macOS has a `java` that only prints where to download one."""
    return bool(shutil.which("java")) and subprocess.run(["java", "-version"], capture_output=True).returncode == 0


def tokenize(texts: dict[int, list[str]], java: bool, split_words: SplitWords) -> dict[int, list[str]]:
    """Splits the captions of every image into words, joined by spaces, as pycocoevalcap expects them.

    Args:
        texts: captions by the number of their image.
        java: whether to use the PTB tokenizer instead of `split_words`.
        split_words: splits a caption into words.

    Raises:
        JavaError: the PTB tokenizer failed.
    """
    if not java:
        return {i: [" ".join(split_words(text)) for text in captions] for i, captions in texts.items()}
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    rows = {i: [{"caption": text} for text in captions] for i, captions in texts.items()}
    try:
        with suppress_stderr():
            tokenized = PTBTokenizer().tokenize(rows)
    except OSError as error:  # it writes into the folder of its code, which may be read-only
        raise JavaError(f"the PTB tokenizer failed ({error})") from None
    num_expected = {i: len(captions) for i, captions in texts.items()}
    if {i: len(captions) for i, captions in tokenized.items()} != num_expected:
        raise JavaError("the PTB tokenizer failed")
    return tokenized


def meteor(references: dict[int, list[str]], captions: dict[int, list[str]]) -> float:
    """Computes METEOR, between 0 and 1, of captions split by `tokenize`.

    Raises:
        JavaError: METEOR's Java program failed.
    """
    from pycocoevalcap.meteor import meteor

    program = meteor.Meteor()
    try:
        return program.compute_score(references, captions)[0]
    except BaseException as error:
        program.lock.release()  # a failure leaves it locked, and `__del__` would wait for it forever
        with contextlib.suppress(OSError):  # otherwise `__del__` complains that the program is gone
            program.meteor_p.stdin.close()
        if not isinstance(error, OSError | ValueError):  # such as Ctrl-C
            raise
        folder = str(Path(meteor.__file__).parent)
        if " " in folder:
            reason = f", as it does in a folder with a space in its path: {folder}"
        else:
            reason = "; it needs 2 GB of memory"
        raise JavaError(f"METEOR's Java program failed{reason}") from None


def score(references: list[list[str]], captions: list[str], java: bool, split_words: SplitWords) -> dict[str, float]:
    """Scores captions, each against the reference captions of its image, with pycocoevalcap.

    Args:
        references: the reference captions of each image.
        captions: one caption for each image.
        java: whether to use what needs Java, the PTB tokenizer and METEOR. Without it, both sides are split by
            `split_words`, which is fast and the same on every machine, and METEOR is left out.
        split_words: splits a caption into words.

    Returns:
        Scores in percent by name: BLEU-1 to BLEU-4, METEOR, ROUGE-L, CIDEr. If METEOR's program fails, that is logged
        and METEOR is left out.

    Raises:
        JavaError: see `tokenize`.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    gts = tokenize(dict(enumerate(references)), java, split_words)  # pycocoevalcap's name: ground truths
    res = tokenize({i: [text] for i, text in enumerate(captions)}, java, split_words)  # and results
    with contextlib.redirect_stdout(io.StringIO()):  # pycocoevalcap prints its counts
        bleu = Bleu(4).compute_score(gts, res, verbose=0)[0]
        scores = {f"BLEU-{n}": value for n, value in enumerate(bleu, 1)}
        if java:
            try:
                scores["METEOR"] = meteor(gts, res)
            except JavaError as error:
                log(f"METEOR is left out: {error}; {NEED_JAVA}")
        scores["ROUGE-L"] = Rouge().compute_score(gts, res)[0]
        scores["CIDEr"] = Cider().compute_score(gts, res)[0]
    return {name: round(100 * float(value), 2) for name, value in scores.items()}


def cider_by_image(
    references: list[list[str]], captions: list[str], java: bool, split_words: SplitWords
) -> list[float]:
    """Computes the CIDEr of each caption, whose mean `score` returns; the arguments and errors as there."""
    from pycocoevalcap.cider.cider import Cider

    gts = tokenize(dict(enumerate(references)), java, split_words)
    res = tokenize({i: [text] for i, text in enumerate(captions)}, java, split_words)
    return [100 * float(value) for value in Cider().compute_score(gts, res)[1]]


def score_with_fallback(
    references: list[list[str]], captions: list[str], split_words: Callable[..., list[str]], words: str
) -> tuple[dict[str, float], str]:
    """Computes all scores that this machine can compute, and logs which it cannot.

    Args:
        references: see `score`.
        captions: see `score`.
        split_words: splits a caption into words, of the kind that its second argument names; used if Java does not
            work, and for characters.
        words: what a word is, `spaces` or `characters`, as in `DataConfig`.

    Returns:
        The scores, see `score`; and the name of the tokenizer: `PTB`, or for `split_words` `plain` or `characters`.
    """
    split = functools.partial(split_words, words=words)
    if words == "characters":
        log("METEOR and the PTB tokenizer know English words only: they are left out, and scores are of characters")
        return score(references, captions, java=False, split_words=split), "characters"
    reason = "there is no Java"
    if has_java():
        try:
            return score(references, captions, java=True, split_words=split), "PTB"
        except JavaError as error:
            reason = str(error)
    log(f"METEOR is left out, and words are split as for the vocabulary: {reason}; {NEED_JAVA}")
    return score(references, captions, java=False, split_words=split), "plain"


def distinct_ratio(texts: list[str]) -> float:
    """Returns the number of different captions, in percent of all captions."""
    return round(100 * len(set(texts)) / len(texts), 1)


# Words after which an English sentence goes on. People end a caption with one of them once in a thousand captions of
# Flickr8k; with "on", "by", "behind", "over" and "her" more often ("a man looks on"), so that these are not among them.
WORDS_WITHIN_SENTENCES = frozenset(
    [
        "a",
        "an",
        "the",
        "this",
        "that",
        "his",
        "its",
        "their",
        "my",
        "your",
        "another",
        "and",
        "or",
        "of",
        "in",
        "with",
        "at",
        "to",
        "for",
        "from",
        "into",
        "near",
        "between",
        "beside",
        "through",
        "while",
        "as",
        "is",
        "are",
        "was",
        "were",
        "has",
        "have",
    ]
)


def mid_sentence_ratio(texts: list[str]) -> float:
    """Returns the number of English captions that stop in mid-sentence, as "a dog on a", in percent of all captions."""
    last_words = (text.lower().rstrip(" .").rsplit(" ", 1)[-1] for text in texts)
    return round(100 * sum(word in WORDS_WITHIN_SENTENCES for word in last_words) / len(texts), 1)
