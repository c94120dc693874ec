"""Normal form, and scripts without spaces. Characters that look like others are written by their numbers."""

import random
import unicodedata

import pytest

from captioning.base.text import (
    describe_unspaced,
    join_words,
    normalize_text,
    punctuation_to_spaces,
    split_characters,
    strip_marks,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man\u2019s dog", "A man's dog"),
        ("\u2018a\u2019 \u201ab\u201b c\u2032s d\u02bcs e\uff07s f\u00b4s", "'a' 'b' c's d's e's f's"),
        ("\u201ea\u201c \u201cb\u201d \u00abc\u00bb \u2039d\u203a \u301de\u301e 6\u2033", '"a" "b" "c" "d" "e" 6"'),
        ("a\u2010b\u2011c \u2013 \u2014 \u2015 \u2212 \uff0d", "a-b-c - - - - -"),
        ("the dog\u200b runs\ufeff", "the dog runs"),
        ("in\u00advisi\u200cble\u200d \u202aa\u202c\u2060", "invisible a"),
        ("  a\u00a0 \t\u3000dog\r\n ", "a dog"),
        ("a\u0007 d\u0000og\u001b[0m\u007f \u0085b\u0081", "a dog b"),
        ("&am\u0007p; &#x81;x", "& x"),
        ("می\u200cرود", "می\u200cرود"),
        (
            "می\u200c\u200cرود \u200cو\u200c می\u200ca\u200cb \u06f1\u200c\u06f2 ،\u200cو",
            "می\u200cرود و میab \u06f1\u06f2 ،و",
        ),
        ("\ufee3\ufbfe\u200c\ufeae", "\u0645\u06cc\u200c\u0631"),  # forms of the letters by their place
        (
            "क\u094d\u200dष क\u094d\u200cष क\u200d अवन\u094d\u200d न\u094d\u200c",
            "क\u094d\u200dष क\u094d\u200cष क अवन\u094d\u200d न\u094d",
        ),
        ("\u1780\u200c\u1780 \U0001f468\u200d\U0001f469", "\u1780\u1780 \U0001f468\U0001f469"),
        ("a &amp; b don&#39;t &#x22;c&quot; d&nbsp;e", 'a & b don\'t "c" d e'),
        ("&amp;amp;quot; &amp;lt;", '" <'),
        ("\uff06amp; &am\u200bp;", "& &"),
        ("AT&T; R&D &; &lt", "AT&T; R&D &; <"),
        ("Stra\u00dfe a\u0308 \ufb01n \uff21\uff22\uff11 \u2026", "Stra\u00dfe \u00e4 fin AB1 ..."),
        ("\uff76\uff9e \u4e00\u53ea\u72d7\u3002", "\u30ac \u4e00\u53ea\u72d7\u3002"),
        ("&#0; &#xD800;", "\ufffd \ufffd"),
        ("", ""),
    ],
)
def test_normalize_text(text, expected):
    assert normalize_text(text) == expected


def test_normalize_text_done_twice_changes_nothing():
    choice = random.Random(0)
    entities = ["&amp;", "&#39;", "&shy;", "&nGt;", "amp;"]
    pieces = [*entities, *"&;#x3' \"am\u200b\uff06\uff1b\u2032\u0301\u72d7\ufb01\u0007\u0081\u06cc\u094d\u200c\u200d"]
    for _ in range(2000):
        text = "".join(choice.choices(pieces, k=choice.randrange(12)))
        normal = normalize_text(text)
        assert normalize_text(normal) == normal, ascii(text)
        assert not any(unicodedata.category(char) in ("Cf", "Cc") for char in normal if char not in "\u200c\u200d"), (
            ascii(text)
        )


def test_punctuation_to_spaces_of_any_script():
    words = punctuation_to_spaces("狗\uff0c猫。「鸟」 ¿que? man's 5€ 🍎").split()
    assert words == [*"狗猫鸟", "que", "man's", "5€", "🍎"]


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("<start> ", " <end>"),
        ("startseq ", " endseq"),
        ("[CLS] ", " [SEP]"),
        ("<s>", "</s>"),
        ("<bos> ", " <eos>"),
        ("<p>", "</p><br>"),
        ("", " <br />"),
        ("<SOS> ", ""),
        ("<start> ", " <end> <pad> <pad>"),
        ("<GO> ", " <EOS>."),
        ("<|startoftext|>", "<|endoftext|>"),
        ("<start_of_seq> ", " <end_of_seq> ."),
        ("sos ", " eos"),
        ("START ", " END"),
        ("__start__ ", " __end__"),
        ("start_ ", " _end"),
        ("{begin} ", " {stop}"),
    ],
)
def test_marks_around_most_captions_are_taken_off(start, end):
    captions = ["a dog", "the start of a <p> mark", "a cat endsequence"]
    marked = [f"{start}{text}{end}" for text in captions]
    marks = " and ".join(filter(None, (start.strip(), end.strip())))
    assert strip_marks(marked) == (captions, f"marks around 3 captions are taken off: {marks}")
    assert strip_marks([*marked[:2], "a hat"]) == (
        [*captions[:2], "a hat"],
        f"marks around 2 captions are taken off: {marks}",
    )
    half = [*marked[:1], "a hat"]
    assert strip_marks(half) == (half, ""), "one of two is no rule"


def test_marks_of_one_end_stay_if_few_captions_have_them():
    assert strip_marks(["<start> a", "<start> b", "c <end>"])[0] == ["a", "b", "c <end>"]
    assert strip_marks([]) == ([], "")


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("iphone手机", ["iphone", "手", "机"]),
        ("手3个a", ["手", "3", "个", "a"]),
        ("ひらがなカー々〇", list("ひらがなカー々〇")),
        ("ผู้ชาย", ["ผู้", "ช", "า", "ย"]),
        ("ក្រុម", ["ក្", "រុ", "ម"]),
        ("မြန်မာ", ["မြ", "န်", "မာ"]),
        ("ລາວ", ["ລ", "າ", "ວ"]),
        ("\u8fbb\U000e0100\U00020000", ["\u8fbb\U000e0100", "\U00020000"]),
        ("हिन्दी", ["हिन्दी"]),
        ("한국어", ["한국어"]),
        ("\u0e31a", ["\u0e31", "a"]),
        ("dog", ["dog"]),
        ("", [""]),
    ],
)
def test_split_characters(word, parts):
    assert split_characters(word) == parts
    assert "".join(parts) == word


def test_join_words_has_spaces_only_where_they_are_written():
    assert join_words(["一", "个", "iphone", "手", "机", "3", "只", "a", "b"]) == "一个 iphone 手机 3 只 a b"
    assert join_words(["ผู้", "ช", "า", "ย"]) == "ผู้ชาย"
    assert join_words(["手", "<unk>", "机"]) == "手 <unk> 机"
    assert join_words([]) == ""


# Captions without spaces.


def test_describe_unspaced_says_what_to_do():
    assert describe_unspaced(["一只狗在跑步。", "一个男孩在爬山\uff0c旁边有一棵树。"]) == (
        "captions are written without spaces between words: a caption has 1.5 words on average; "
        "`python train.py --words characters` takes every character as a word"
    )
    assert "a caption has 1.0 words" in describe_unspaced(iter(["いぬがはしっている", "いぬと猫がいる"]))
    assert describe_unspaced(["ผู้ชายกำลังวิ่ง สุนัข", "a dog", "ผู้ชายกำลังวิ่ง"]), "two of three"
    assert describe_unspaced(["一只狗\uff0c一只猫\uff0c一只鸟\uff0c在草地上"]), "clauses between commas are no words"


@pytest.mark.parametrize(
    "captions",
    [
        ["一只狗 坐着 旁边有一棵树", "一个男孩 在跑步 在草地上"],  # segmented
        ["a dog runs", "Straßenbahnhaltestellen", "개가 달린다"],
        ["一只狗在跑步", "a dog runs"],  # half of them
        ["狗", "一只猫"],
        [],
    ],
)
def test_describe_unspaced_of_captions_with_spaces(captions):
    assert describe_unspaced(captions) is None
