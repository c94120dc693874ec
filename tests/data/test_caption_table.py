"""Tables of captions: separators, quotes, columns, and rows that do not fit."""

import pytest

from captioning.base.cli import InputError
from captioning.data.caption_table import (
    ReadOptions,
    find_dialect,
    find_field,
    is_headerless,
    parse_separator,
    read_headerless,
    read_table,
)

AS_FOUND = ReadOptions()


def rows(content, options=AS_FOUND):
    return [(row.image_path, row.caption) for row in read_table("file", content, options).rows if not row.problem]


def problems(content):
    return [row.problem for row in read_table("file", content, AS_FOUND).rows if row.problem]


def test_unquoted_separators_belong_to_the_caption():
    assert rows("image,caption\na.jpg,a dog , running\n") == [("a.jpg", "a dog , running")]
    assert rows("image, caption\na.jpg, a dog, running\n") == [("a.jpg", "a dog, running")]
    assert rows("image;caption\na.jpg;a dog;a cat;;\n") == [("a.jpg", "a dog;a cat")]
    assert rows("id,caption,image\n1,a dog, running,a.jpg\n") == [("a.jpg", "a dog, running")]


def test_quotes_are_undone():
    assert rows('image,caption\na.jpg,"a ""big"" dog, running"\na.jpg,a ""big"" dog\n') == [
        ("a.jpg", 'a "big" dog, running'),
        ("a.jpg", 'a ""big"" dog'),
    ]
    assert rows('image, caption\na.jpg, "a dog, running"\n') == [("a.jpg", "a dog, running")]


def test_cells_may_be_lists_or_have_several_lines():
    assert rows(
        """image,caption\na.jpg,"['a dog', \\"the dog's\\"]"\nb.jpg,"[red] a cat"\n""".replace('\\"', '""')
    ) == [
        ("a.jpg", "a dog"),
        ("a.jpg", "the dog's"),
        ("b.jpg", "[red] a cat"),
    ]
    text = "a dog\n\n\nruns at 3.pm, fast"
    assert rows(f'image,caption\na.jpg,"{text}"\n') == [("a.jpg", text)]


def test_open_quotes_of_tsv_are_text():
    parsed = read_table("file", 'image\tcaption\na.jpg\t"a dog\nb.jpg\ta cat\n', AS_FOUND)
    assert [row[:2] for row in parsed.rows] == [("a.jpg", '"a dog'), ("b.jpg", "a cat")]
    assert parsed.notes == ["file: quotes are part of the captions, since one of them is left open"]
    table = '"image"\t"caption"\na.jpg\t"a dog\nb.jpg\ta cat\n'
    assert rows(table) == [("a.jpg", '"a dog'), ("b.jpg", "a cat")]


@pytest.mark.parametrize("separator", [",", ";", "|"])
def test_open_quotes_are_refused_with_the_line(separator):
    table = f'image{separator}caption\na.jpg{separator}"a dog\nb.jpg{separator}a cat\n'
    with pytest.raises(
        InputError, match=r"file: the caption of 'a.jpg' runs over other lines, to line \d; close its quote"
    ):
        rows(table)


def test_flickr30k_row_without_a_separator_is_repaired_and_named():
    table = "image_name| comment_number| comment\na.jpg| 3| A dog .\na.jpg| 4   A dog runs .\nb.jpg| 0\nc.jpg\n"
    parsed = read_table("file", table, AS_FOUND)
    assert [row[:2] for row in parsed.rows[:2]] == [("a.jpg", "A dog ."), ("a.jpg", "A dog runs .")]
    assert parsed.notes == ["file, line 3: a separator is missing, repaired: 'a.jpg' 'A dog runs .'"]
    assert problems(table) == ["line 4 has 2 columns, expected 3", "line 5 has 1 columns, expected 3"]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("image,caption", ","),
        ("Image;CAPTION", ";"),
        ('"file_name"\t"text"', "\t"),
        ("image_name| comment_number| comment", "|"),
        ("id,date,filename,title", ","),
        ("image", None),
        ("caption", None),
        ("text,image text", None),
        ("a.jpg,a dog", None),
        ("", None),
    ],
)
def test_find_dialect_looks_for_the_two_columns(header, expected):
    dialect = find_dialect(f"{header}\nx,y\n", AS_FOUND)
    assert (dialect and dialect.separator) == expected


def test_columns_and_separator_can_be_named():
    table = "picture:words:image\na.jpg:a dog:no\n"
    assert find_dialect(table, AS_FOUND) is None
    assert rows(table, ReadOptions("Picture", "words", ":")) == [("a.jpg", "a dog")]
    assert find_dialect(table, ReadOptions("photo", "words", ":")) is None


def test_parse_separator():
    assert [parse_separator(text) for text in ("tab", r"\t", "semicolon", ":")] == ["\t", "\t", ";", ":"]
    for text in ("", "ab", '"', "\n"):
        with pytest.raises(InputError, match="--separator: expected one character, or tab"):
            parse_separator(text)


def test_find_field_prefers_the_first_usual_name():
    names = ["id", " Caption ", "text", "image_name", "image"]
    assert find_field(names, ("image", "image_name")) == "image"
    assert find_field(names, ("caption", "text")) == " Caption "
    assert find_field(names, ("caption",), "TEXT") == "text"
    assert find_field(names, ("caption",), "words") is None


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a.jpg,a dog", True),
        ("a b.PNG\ta dog", True),
        ("ROCO_00001\ta scan", True),
        ("image\tcaption", False),
        ("a dog\tin a box", False),
        ("a.jpg,", False),
        ("a.jpg", False),
        ("a1\thttp://example.com/a.jpg", False),
    ],
)
def test_is_headerless(line, expected):
    assert is_headerless(line + "\n", AS_FOUND) == expected


def test_read_headerless_marks_lines_without_a_separator():
    parsed = read_headerless("file", "ROCO_1\ta scan, of a\tbrain\nROCO_2 a scan\n", AS_FOUND)
    assert parsed.rows[0][:2] == ("ROCO_1", "a scan, of a\tbrain")
    assert parsed.rows[1].problem == "line 2 has no tab"
