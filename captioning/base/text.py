"""Text of any language: one form for the same text, and words in scripts that are written without spaces.

    normalize_text("A man’s dog &amp; a  cat")  # "A man's dog & a cat"
    split_characters("iphone手机")              # ["iphone", "手", "机"]
    join_words(["iphone", "手", "机"])          # "iphone 手机"

No dictionary of any language is used, so that words of such scripts cannot be told apart: their characters are.
"""

import codecs
import html
import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence

SAMPLE_SIZE = 1000  # captions that are looked at to find out how words are written
MAX_UNSPACED_WORDS = 2  # between the spaces of a caption that is written without spaces between words
MIN_UNSPACED_LETTERS = 5  # of such a caption; a shorter one may be a single word

# The scripts that are written without spaces between words.
_UNSPACED = re.compile(
    "["
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Han
    "\U00020000-\U0003ffff"  # rare Han
    "\u3041-\u309f\U0001b001-\U0001b11f"  # Hiragana
    "\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Katakana
    "\u0e01-\u0e3a\u0e40-\u0e5b"  # Thai
    "\u0e80-\u0eff"  # Lao
    "\u1780-\u17ff\u19e0-\u19ff"  # Khmer
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Myanmar
    "]"
)

# Control characters, without those that are white space.
CONTROLS = re.compile(r"(?![\t\n\v\f\r\x1c-\x1f\x85])[\x00-\x1f\x7f-\x9f]")

_TO_ASCII = str.maketrans(
    # Quotes from ‘ to ‛, ′ and ‵, the acute accent that some type for an apostrophe, letters like it, ׳ and ＇.
    dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u2035\u00b4\u02b9\u02bb\u02bc\u02bd\ua78b\ua78c\u05f3\uff07", "'")
    # Quotes from “ to ‟, ″ and ‶, « and », ‹ and ›, 〝 to 〟, ״ and ＂.
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u2036\u00ab\u00bb\u2039\u203a\u301d\u301e\u301f\u05f4\uff02", '"')
    # Hyphens and dashes from ‐ to ―, ⁃, the minus sign, ﹘, ﹣ and －.
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2043\u2212\ufe58\ufe63\uff0d", "-")
)

# The zero-width non-joiner and joiner (U+200C and U+200D) are part of how Persian and the languages of India are spelt,
# between letters; the joiner also after a sign that takes the vowel off. Elsewhere they change nothing that is seen.
_JOINING = (
    "\u0620-\u065f\u066e-\u06d3\u06d5-\u06dc\u06fa-\u06ff\u0710-\u077f\u08a0-\u08ff"  # Arabic, Syriac
    "\u0900-\u0963\u0971-\u0dff"  # Devanagari to Sinhala
)
_VIRAMAS = "\u094d\u09cd\u0a4d\u0acd\u0b4d\u0bcd\u0c4d\u0ccd\u0d4d\u0dca"
_STRAY_JOINER = re.compile(
    rf"(?<![{_JOINING}])[\u200c\u200d]|\u200c(?![{_JOINING}\u200c\u200d])"
    rf"|(?<![{_VIRAMAS}])\u200d(?![{_JOINING}\u200c\u200d])"
)

# What programs write around captions: the tutorial's "<start> a dog <end>", startseq and endseq, [CLS] and [SEP], HTML.
_TAG = r"[<\[{{]\|?(?:{})\|?[>\]}}]"
_START = _TAG.format(r"start(?:seq|_?of_?\w+)?|beg(?:in)?|bos|sos|go|/?s|cls|(?:p|div|span)\b[^>]*|br ?/?")
_END = _TAG.format(r"end(?:seq|_?of_?\w+)?|stop|eos|/?s|sep|pad|/(?:p|div|span)|br ?/?")
_START_MARKS = re.compile(rf"^\s*(?:(?:{_START}|(?:__)?(?:start(?:seq)?|sos)_{{0,2}}(?!\S))\s*)+", re.IGNORECASE)
_END_MARKS = re.compile(rf"(?:(?:{_END}|(?<!\S)_{{0,2}}(?:end(?:seq)?|eos)(?:__)?)[\s.]*)+$", re.IGNORECASE)
_TERMINAL_CODE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?)")  # such as that of a colour


def is_utf16(content: bytes) -> bool:
    """Tells whether the content of a file begins with the byte order mark of UTF-16."""
    return content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


# One form for the same text.


def normalize_text(text: str) -> str:
    """Brings text to one form, so that the same words are the same characters however they were typed.

    HTML entities are undone, and characters have their compatible, composed form (Unicode's NFKC). Typographic quotes
    and dashes become those of ASCII, invisible characters go (but for joiners between letters that need them), and one
    space stands for any white space.
    """
    if not text.isprintable():
        text = CONTROLS.sub("", _TERMINAL_CODE.sub("", text))
    while not text.isascii() or "&" in text:
        # Quotes before NFKC, which takes ″ for two ′.
        normal = CONTROLS.sub("", html.unescape(text)).translate(_TO_ASCII)
        normal = "".join(char for char in normal if unicodedata.category(char) != "Cf" or char in "\u200c\u200d")
        normal = _STRAY_JOINER.sub("", unicodedata.normalize("NFKC", normal).translate(_TO_ASCII))
        if normal == text:
            break
        text = normal  # and again: an entity may hide another one, or a character that has another form
    return " ".join(text.split())


def punctuation_to_spaces(text: str) -> str:
    """Replaces punctuation of any script by spaces. The apostrophe stays, so that "man's" is one word."""
    return "".join(" " if unicodedata.category(char)[0] == "P" and char != "'" else char for char in text)


def strip_marks(texts: Sequence[str]) -> tuple[list[str], str]:
    """Takes the marks of start and end off captions, at either end only if most captions have one there.

    Returns:
        The captions, and a line that says how many had which marks; empty if nothing was taken off.
    """
    stripped, marks = list(texts), []
    for pattern in (_START_MARKS, _END_MARKS):
        found = [match[0].strip() for text in stripped if (match := pattern.search(text))]
        if len(found) > len(stripped) / 2:
            stripped = [pattern.sub("", text).rstrip() for text in stripped]
            marks.append(found[0])
    num_changed = sum(map(str.__ne__, texts, stripped))
    return stripped, f"marks around {num_changed:,} captions are taken off: {' and '.join(marks)}" if marks else ""


# Scripts without spaces between words.


def split_characters(word: str) -> list[str]:
    """Splits a word into the characters of scripts without spaces, each with its marks; other parts stay whole."""
    if not _UNSPACED.search(word):
        return [word]
    parts: list[str] = []
    for char in word:
        is_mark = unicodedata.category(char).startswith("M")
        # A mark belongs to the character before it; another letter to the part before it, if that has such letters.
        if parts and (is_mark or not (_UNSPACED.match(char) or _UNSPACED.match(parts[-1]))):
            parts[-1] += char
        else:
            parts.append(char)
    return parts


def join_words(words: Iterable[str]) -> str:
    """Joins the parts that `split_characters` made: with a space, but not between characters that are written so."""
    text, previous = "", ""
    for word in words:
        is_unspaced = _UNSPACED.match(previous) and _UNSPACED.match(word)
        text += word if is_unspaced or not text else f" {word}"
        previous = word
    return text


def describe_unspaced(captions: Iterable[str]) -> str | None:
    """Says what to do, in one line, if most captions are written without spaces between words; else None."""
    sample = list(itertools.islice(captions, SAMPLE_SIZE))
    num_unspaced = sum(
        len(caption.split()) <= MAX_UNSPACED_WORDS and len(_UNSPACED.findall(caption)) >= MIN_UNSPACED_LETTERS
        for caption in sample
    )
    if num_unspaced <= len(sample) / 2:
        return None
    mean_words = sum(len(punctuation_to_spaces(caption).split()) for caption in sample) / len(sample)
    return (
        f"captions are written without spaces between words: a caption has {mean_words:.1f} words on average; "
        "`python train.py --words characters` takes every character as a word"
    )
