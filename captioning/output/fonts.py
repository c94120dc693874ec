"""Fonts for text in any script: Matplotlib's own has no Chinese, Japanese, Thai and many other characters.

    axes.text(0, 0, text, family=font_families(text))

What no font has is drawn as boxes, which is said once for each script.
"""

import contextlib
import functools
import logging
import unicodedata
import warnings
from collections.abc import Iterable, Iterator

from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.ft2font import FT2Font

from captioning.base.cli import log

# Parts of the names of fonts that have many characters, or those of one script. They are opened first.
LARGE_FONTS = ("noto", "source han", "wenquanyi", "pingfang", "hiragino", "yahei", "gothic", "arial unicode")
# Matplotlib's own font of boxes, and fonts of coloured bitmaps, which Matplotlib cannot draw.
UNUSABLE_FONTS = ("last resort", "lastresort", "color")
SCRIPT_NAMES = {"Cjk": "Han", "Ideographic": "Han"}  # by the first word of Unicode's name of a character
CJK_SCRIPTS = ("Han", "Hiragana", "Katakana", "Hangul", "Bopomofo")
SYMBOLS = "some emoji or symbols"

_reported: set[str] = set()  # the scripts that were said to have no font


def font_families(text: str) -> list[str]:
    """Returns the fonts to draw a text with: Matplotlib's default font, and fonts for what it lacks.

    Matplotlib draws every character with the first of them that has it. Scripts that no installed font has are logged
    once in a process.
    """
    default, charmap = _read_font(fontManager.findfont(FontProperties()))
    families, missing = [default], {char for char in text if ord(char) not in charmap and _is_visible(char)}
    for family in _sort_families(missing) if missing else ():
        charmap = _read_family(family)
        if has := {char for char in missing if ord(char) in charmap}:
            families.append(family)
            missing -= has
        if not missing:
            break
    for script in sorted({script_name(char) for char in missing} - _reported):
        _reported.add(script)
        what = script if script == SYMBOLS else f"{script} characters"
        log(
            f"plots: no installed font has {what}; they are drawn as boxes (install one, such as "
            f"{_suggest_font(script)})"
        )
    return families


@contextlib.contextmanager
def hide_font_warnings() -> Iterator[None]:
    """Hides what Matplotlib says of every character that no font has, and of a font's weight that is not normal."""
    logger = logging.getLogger("matplotlib.font_manager")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from", category=UserWarning)
            yield
    finally:
        logger.setLevel(level)


def script_name(char: str) -> str:
    """Returns the script of a character, by the first word of its name in Unicode; emoji and symbols are together."""
    if unicodedata.category(char)[0] not in "LMN":
        return SYMBOLS
    first_word = unicodedata.name(char, "unknown").replace("-", " ").split()[0].title()
    return SCRIPT_NAMES.get(first_word, first_word)


def _suggest_font(script: str) -> str:
    """Returns the name of a free font for a script."""
    if script == SYMBOLS:
        return "Noto Emoji"
    return "Noto Sans CJK" if script in CJK_SCRIPTS else f"Noto Sans {script}"


def _is_visible(char: str) -> bool:
    """Tells whether a character needs a glyph: no space, control character or selector of a glyph's variant."""
    return not char.isspace() and unicodedata.category(char)[0] != "C" and not "\ufe00" <= char <= "\ufe0f"


def _sort_families(chars: Iterable[str]) -> list[str]:
    """Sorts the installed fonts: first those whose names promise a script of some characters, then large ones.

    Of these, fonts without serifs come before others, as the default font has none.
    """
    scripts = {script_name(char) for char in chars}
    words = {script.lower() for script in scripts} | ({"cjk"} if scripts & {*CJK_SCRIPTS} else set())

    def sort_key(family: str) -> tuple[bool, bool, bool, str]:
        name = family.lower()
        is_large = any(part in name for part in LARGE_FONTS)
        is_special = "serif" in name or "mono" in name
        return not any(word in name.split() for word in words), not is_large, is_special, family

    families = {font.name for font in fontManager.ttflist}
    return sorted((name for name in families if not any(part in name.lower() for part in UNUSABLE_FONTS)), key=sort_key)


def _read_family(family: str) -> frozenset[int]:
    """Returns the character codes of the file that Matplotlib would draw a font with; none if it cannot be used."""
    try:
        with hide_font_warnings():
            path = fontManager.findfont(FontProperties(family=[family]), fallback_to_default=False)
        return _read_font(path)[1]
    except (OSError, RuntimeError, ValueError):  # gone, or damaged
        return frozenset()


@functools.cache
def _read_font(path: str) -> tuple[str, frozenset[int]]:
    """Returns a font file's name and character codes; none of a font without outlines, which cannot be drawn."""
    face_index = getattr(path, "face_index", 0)  # of a collection, where Matplotlib knows more than its first face
    font = FT2Font(path, face_index=face_index) if face_index else FT2Font(path)
    return font.family_name, frozenset(font.get_charmap() if font.scalable else ())
