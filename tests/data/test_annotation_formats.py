"""Every format of annotations, written and read again; and what in them is left out, repaired or refused."""

import json
import random
import re
from pathlib import Path

import pytest
from helpers.annotation_files import WRITERS, coco, karpathy, objects

from captioning.base.cli import InputError
from captioning.base.text import normalize_text
from captioning.data.annotation_formats import FORMATS, parse_annotations
from captioning.data.annotations import read_annotations
from captioning.data.caption_rows import ReadOptions
from captioning.data.text_formats import parse_separator

CAPTIONS = {
    "a.jpg": ["a dog runs", "the dog , which is brown , runs"],
    "b.jpg": ["a cat"],
    "c d.jpg": ['a "big" horse; it stands', "a sign: 1/2 | stop"],
    "e.jpg": ["ein Mädchen läuft über die Straße", "一只狗 在跑步"],
}
# What the formats of UNQUOTED cannot hold is left out.
PLAIN = {name: [" ".join(re.sub('["|;]', "", text).split()) for text in texts] for name, texts in CAPTIONS.items()}
UNQUOTED = ("results.csv", "rows", "Flickr8k.token.txt", "Flickr8k-CN", "text files")


def write(description, captions, tmp_path):
    """Writes captions in a format; returns its name and the path."""
    name, writer = WRITERS[description]
    path = tmp_path / "annotations"
    writer(captions, path)
    return name, path


def captions_of(examples):
    return {example.image_path.rpartition("/")[2]: list(example.captions) for example in examples}


@pytest.mark.parametrize("description", WRITERS)
def test_every_format_is_read_as_it_was_written(description, tmp_path, capsys):
    rng = random.Random(description)
    letters = "abc äß犬é01" + ("" if description in UNQUOTED else "\",;|'\\#{}[]:")
    captions = dict(PLAIN if description in UNQUOTED else CAPTIONS)
    for number in range(20):
        texts = ["a" + "".join(rng.choices(letters, k=rng.randint(1, 30))) for _ in range(rng.randint(1, 5))]
        captions[f"{number}.jpg"] = [normalize_text(text) for text in texts]
    if description in ("Flickr8k-CN", "descriptions.txt"):  # which have no spaces in their names
        captions = {name.replace(" ", ""): texts for name, texts in captions.items()}
    name, path = write(description, captions, tmp_path)
    assert captions_of(read_annotations(path)) == captions
    logged = capsys.readouterr().err
    assert f"{path}: {name}" in logged and "captions of 24 images" in logged and "skipped" not in logged


def documented_examples():
    """Yields the name and the example of every format that docs/data.md shows."""
    text = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    yield from re.findall(r"^### ([^\n]*)\n\n```\n(.*?)```", text, re.MULTILINE | re.DOTALL)


def test_every_format_is_documented_in_three_lines():
    examples = dict(documented_examples())
    assert sorted(examples) == sorted(FORMATS)
    assert {len(example.splitlines()) for example in examples.values()} == {3}


@pytest.mark.parametrize(("name", "example"), [e for e in documented_examples() if "folder" not in e[0]])
def test_documented_examples_are_read(tmp_path, name, example):
    (tmp_path / "file").write_text(example.replace("<TAB>", "\t"), encoding="utf-8")
    found, parsed = parse_annotations(tmp_path / "file", ReadOptions())
    assert found == name and len(parsed.rows) >= 2 and not any(row.problem for row in parsed.rows)


@pytest.fixture
def read(tmp_path):
    """Reads JSON, or text; returns what the reader found."""

    def read(content, options=None):
        path = tmp_path / "annotations"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return parse_annotations(path, options or ReadOptions())[1]

    return read


def pairs(parsed):
    """The names and captions of the rows that can be used."""
    return [row[:2] for row in parsed.rows if not row.problem]


def problems(parsed):
    return [row.problem for row in parsed.rows if row.problem]


# JSON.


def test_coco_ids_may_be_text_and_annotations_of_other_images_are_marked(read):
    content = coco({"a.jpg": ["a dog"], "b.jpg": ["a cat"]})
    content["annotations"][1]["image_id"] = "10"
    content["annotations"].append({"image_id": 99, "caption": "a ghost"})
    rows = read(content).rows
    assert [(row.image_path, row.image_id, row.problem) for row in rows] == [
        ("a.jpg", 0, ""),
        ("b.jpg", 10, ""),
        ("image_id 99", None, "an annotation of an image that is not listed"),
    ]


@pytest.mark.parametrize("field", ["coco_url", "flickr_url", "url"])
def test_coco_images_without_a_name_have_that_of_their_address(read, field):
    content = coco({"a.jpg": ["a dog"], "b.jpg": ["a cat"]})
    content["images"][1] = {"id": 10, field: "http://example.com/val/b%20c.jpg?size=1"}
    parsed = read(content)
    assert pairs(parsed) == [("a.jpg", "a dog"), ("b c.jpg", "a cat")]
    assert parsed.details == "names from the images' addresses"
    with pytest.raises(InputError, match=r"wrong: KeyError\('file_name'\)"):
        read(content | {"images": [{"id": 0}]})
    same_name = [{"id": index, field: f"http://example.com/{index}/image.jpg"} for index in (0, 10)]
    with pytest.raises(InputError, match="the addresses of the images 0 and 10 end in the same name"):
        read(content | {"images": same_name})


def test_vizwiz_sentences_that_are_no_captions_are_marked(read):
    content = coco({"a.jpg": ["Quality issues are too severe to recognize visual content.", "spam", "a dog"]})
    content["annotations"][0] |= {"is_precanned": True, "is_rejected": False}
    content["annotations"][1] |= {"is_precanned": False, "is_rejected": True}
    assert [bool(row.problem) for row in read(content).rows] == [True, True, False]


def test_stair_gives_its_tokenized_captions(read):
    content = coco({"a.jpg": ["犬が走る"]})
    content["annotations"][0]["tokenized_caption"] = "犬 が 走る"
    parsed = read(content)
    assert pairs(parsed) == [("a.jpg", "犬 が 走る")] and "tokenized_caption" in parsed.details


def test_karpathys_folders_and_images_without_sentences(read):
    content = karpathy({"a.jpg": ["a dog"], "b.jpg": []})
    content["images"][0]["filepath"] = "val2014"
    assert [row[:2] for row in read(content).rows] == [("val2014/a.jpg", "a dog"), ("b.jpg", "")]


def test_json_lines_mark_broken_lines(read):
    lines = [json.dumps(row) for row in objects({"a.jpg": ["a dog"], "b.jpg": ["a cat"]}, "file_name", "text")]
    parsed = read("\n".join([lines[0], '{"file_name": "x.jpg", "te', lines[1], '{"file_name": "y.jpg"}']))
    assert pairs(parsed) == [("a.jpg", "a dog"), ("b.jpg", "a cat")]
    assert problems(parsed) == ["not JSON with file_name and text"] * 2
    assert pairs(read('{"file_name": "a.jpg", "text": "a dog"}\n')) == [("a.jpg", "a dog")], "a single line"


def test_objects_may_be_in_a_list_for_each_split_and_have_several_images(read):
    content = {"training": [{"image": ["a.jpg", "b.jpg"], "text": ["a dog", "the dog"]}], "dev": [], "test": []}
    content["dev"].append({"image": "c.jpg", "text": "a cat"})
    parsed = read(content)
    assert pairs(parsed) == [(name, text) for name in ("a.jpg", "b.jpg") for text in ("a dog", "the dog")] + [
        ("c.jpg", "a cat")
    ]
    assert [row.split for row in parsed.rows] == ["training"] * 4 + ["dev"]
    assert parsed.details == "fields image, text, split; 1 objects have several images, each with all captions"


def test_fields_of_objects_can_be_named(read):
    content = [{"photo": "a.jpg", "says": ["a dog", "the dog"]}]
    parsed = read(content, ReadOptions(image_column="photo", caption_column="says"))
    assert pairs(parsed) == [("a.jpg", "a dog"), ("a.jpg", "the dog")]


# Tables.


def test_unquoted_separators_belong_to_the_caption(read):
    assert pairs(read("image,caption\na.jpg,a dog , running\n")) == [("a.jpg", "a dog , running")]
    assert pairs(read("image, caption\na.jpg, a dog, running\n")) == [("a.jpg", "a dog, running")]
    assert pairs(read("id,caption,image\n1,a dog, running,a.jpg\n")) == [("a.jpg", "a dog, running")]


@pytest.mark.parametrize(
    "table",
    [
        "image,license,caption\na.jpg,CC BY, attribution needed,a cat",
        "image,caption,source\na.jpg,a dog,Smith, John",
        "image,caption\nmy dog, brown.jpg,a dog",
        "caption,image\na dog,mine, brown.jpg",
        "image,caption,split\na.jpg,a dog,my, own",
        "image,caption,price\na.jpg,a hat,1,50",
        "image,caption_1,caption_2\na.jpg,a dog, running,the dog",
        "image,caption,caption\na.jpg,a dog, running,the dog",
    ],
)
def test_a_row_is_left_out_if_another_column_may_have_the_separator(read, table):
    parsed = read(f"{table}\n{table.splitlines()[0].replace('caption', 'b').replace('image', 'b.jpg')}\n")
    assert len(problems(parsed)) == 1 and "columns, expected" in problems(parsed)[0]
    assert {row.image_path for row in parsed.rows if not row.problem} == {"b.jpg"}


def test_names_with_the_separator_are_left_out_without_a_header(read):
    parsed = read("a.jpg,a dog, running\nmy dog, brown.jpg,a dog\n")
    assert pairs(parsed) == [("a.jpg", "a dog, running")]
    assert problems(parsed) == ["the separator seems to be in the name"]
    assert parsed.details.endswith("; 1 captions without quotes have the separator in them")


@pytest.mark.parametrize(
    "header",
    [
        "image,caption_1,caption_2,title",
        "image,caption,caption_2,title",
        "image,Caption 1,Caption 2,title",
        "image,text,text.1,title",
        "image,sentence1,sentence2,title",
        "image,caption,caption,title",
        "image,description,description,title",
    ],
)
def test_all_columns_of_captions_are_used(read, header):
    parsed = read(f"{header}\na.jpg,a dog,the dog,X\nb.jpg,a cat,,Y\nc.jpg,,,Z\n")
    assert pairs(parsed) == [("a.jpg", "a dog"), ("a.jpg", "the dog"), ("b.jpg", "a cat"), ("c.jpg", "")]
    assert parsed.details.endswith(", separated by comma; not used: title")


def test_all_fields_of_captions_are_used(read):
    objects = [{"image": "a.jpg", "id": 1, "caption1": "a dog"}]
    objects.append({"image": "b.jpg", "caption1": "a cat", "caption2": ["the cat", "it"], "caption3": None})
    parsed = read(objects)
    assert pairs(parsed) == [("a.jpg", "a dog"), ("b.jpg", "a cat"), ("b.jpg", "the cat"), ("b.jpg", "it")]
    assert parsed.details == "fields image, caption1, caption2, caption3; not used: id"
    assert pairs(read(objects, ReadOptions(caption_column="caption2"))) == [("b.jpg", "the cat"), ("b.jpg", "it")]


@pytest.mark.parametrize("name", ["caption", "text", "description", "sentence"])
def test_a_title_or_comment_is_the_caption_only_without_another(read, name):
    assert pairs(read(f"image,title,comment,{name}\na.jpg,IMG 1,nice,a dog\n")) == [("a.jpg", "a dog")]
    assert pairs(read([{"image": "a.jpg", "title": "IMG 1", name: "a dog"}])) == [("a.jpg", "a dog")]
    assert pairs(read("image,title\na.jpg,a dog\n")) == [("a.jpg", "a dog")]


def test_quotes_are_undone(read):
    assert pairs(read('image,caption\na.jpg,"a ""big"" dog, running"\n')) == [("a.jpg", 'a "big" dog, running')]
    assert pairs(read('image, caption\na.jpg, "a dog, running"\n')) == [("a.jpg", "a dog, running")]


def test_cells_may_be_lists_or_have_several_lines(read):
    table = """image,caption\na.jpg,"['a dog', \"\"the dog's\"\"]"\nb.jpg,"[red] a cat"\n"""
    assert pairs(read(table)) == [("a.jpg", "a dog"), ("a.jpg", "the dog's"), ("b.jpg", "[red] a cat")]
    numpy = "['a dog runs'\n \"the dog's\"]".replace('"', '""')  # without commas
    assert pairs(read(f'image,caption\na.jpg,"{numpy}"\n')) == [("a.jpg", "a dog runs"), ("a.jpg", "the dog's")]
    text = "Two dogs.\n3, perhaps 4"
    assert pairs(read(f'image,caption\na.jpg,"{text}"\n')) == [("a.jpg", text)], "3 is no image"
    text = "a dog\n\n\nruns at 3.pm, fast"
    assert pairs(read(f'image,caption\na.jpg,"{text}"\n')) == [("a.jpg", text)]


@pytest.mark.parametrize("separator", [",", "\t", "|"])
def test_open_quotes_are_text(read, separator):
    table = f'"image"{separator}caption\na.jpg{separator}"a dog\nb.jpg{separator}a cat\nc.jpg{separator}"a cow"\n'
    parsed = read(table)
    assert pairs(parsed) == [("a.jpg", '"a dog'), ("b.jpg", "a cat"), ("c.jpg", '"a cow"')]
    assert parsed.details.endswith("; quotes are part of the captions, since they do not come in pairs")


@pytest.mark.parametrize(
    "table",
    [
        'image,caption\na.jpg,"a dog\nb.jpg,a cat"\nc.jpg,a cow\n',
        ',image,caption\n0,a.jpg,"a dog\n1,b.jpg,a cat\n2,c.jpg,"a cow"\n',
        'caption,image\n"a dog,a.jpg\na cat,b.jpg\na cow",c.jpg\n',
        'caption,image\n"a dog,img_0001\na cat,img_0002\na cow",img_0003\n',
        'image,caption,source\na.jpg,"a dog,X\nb.jpg,a cat",Y\nc.jpg,a cow,Z\n',
        'a.jpg,"a dog\nb.jpg,a cat"\nc.jpg,a cow\n',
        'image,caption\n1,"a dog\n2,a cat"\n3,a cow\n',
    ],
)
def test_an_open_quote_swallows_no_rows(read, table):
    parsed = read(table)
    assert [text.strip('"') for _, text in pairs(parsed)] == ["a dog", "a cat", "a cow"]
    assert "; quotes are part of the captions" in parsed.details


def test_a_third_column_needs_a_header(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text("a.jpg,a dog,Flickr\nb.jpg,a cat,Flickr\nc.jpg,a cow,Flickr\n")
    with pytest.raises(InputError, match=r"captions\.csv: expected table .* or a first row that names the 3 columns"):
        parse_annotations(path, ReadOptions())


def test_a_name_in_the_header_may_hold_the_separator(read):
    assert pairs(read('image,"note, more",caption\na.jpg,x,a dog\n')) == [("a.jpg", "a dog")]


def test_flickr30k_row_without_a_separator_is_repaired_and_named(read):
    table = "image_name| comment_number| comment\na.jpg| 3| A dog .\na.jpg| 4   A dog runs .\nb.jpg| 0\nc.jpg\n"
    parsed = read(table)
    assert pairs(parsed) == [("a.jpg", "A dog ."), ("a.jpg", "A dog runs .")]
    assert parsed.details.endswith("; not used: comment_number; the separator that a row of 'a.jpg' lacks was added")
    assert problems(parsed) == ["2 columns, expected 3", "1 columns, expected 3"]


def test_the_first_usual_name_of_a_column_counts(read):
    assert pairs(read("text, Caption ,image_name,IMAGE\na,b,c.jpg,d.jpg\n")) == [("d.jpg", "b")]


def test_columns_and_separator_can_be_named(read):
    table = "picture:words:image\na.jpg:a dog:no\n"
    assert pairs(read(table, ReadOptions("Picture", "words", ":"))) == [("a.jpg", "a dog")]
    with pytest.raises(InputError, match="not a known annotation format"):
        read(table, ReadOptions("photo", "words", ":"))


def test_parse_separator():
    assert [parse_separator(text) for text in ("tab", r"\t", "semicolon", ":")] == ["\t", "\t", ";", ":"]
    for text in ("", "ab", '"', "\n"):
        with pytest.raises(InputError, match="--separator: expected one character, or tab"):
            parse_separator(text)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a.jpg,a dog", ("a.jpg", "a dog")),
        ("a b.PNG;a dog, running", ("a b.PNG", "a dog, running")),
        ("ROCO_1\ta scan, of a\tbrain", ("ROCO_1", "a scan, of a\tbrain")),
    ],
)
def test_tables_without_a_header_begin_with_the_name_of_an_image(read, line, expected):
    assert pairs(read(f"{line}\n")) == [expected]


def test_separator_of_a_table_without_a_header_may_be_named(read):
    for separator, line in ((",", "a.jpg,a dog"), (":", "a.jpg:a dog, running: fast")):
        assert pairs(read(f"{line}\n", ReadOptions(separator=separator))) == [tuple(line.split(separator, 1))]


def test_mapping_may_begin_with_an_image_without_captions(read):
    assert pairs(read({"a.jpg": [], "b.jpg": ["a dog"]})) == [("a.jpg", ""), ("b.jpg", "a dog")]


def test_lines_of_a_name_and_a_space_begin_with_what_is_no_word(read, tmp_path):
    expected = [("1000268201_693b08cb0e", "a child"), ("b.jpg", "a dog, running")]
    assert pairs(read("1000268201_693b08cb0e a child\n\nb.jpg a dog, running\n")) == expected
    assert pairs(read("dog startseq a dog endseq\n\nstray\n")) == [("dog", "startseq a dog endseq"), ("stray", "")]
    for line in ("dog a dog runs", "3 dogs run", "img_1,a dog runs", "img_1"):
        with pytest.raises(InputError, match="not a known annotation format"):
            read(f"1000268201_693b08cb0e a child\n{line}\n")


# Folders.


def test_folder_of_text_files_names_images_without_one(tmp_path):
    for name in ("a.jpg", "b.jpg", "._a.jpg", "Thumbs.db", "val/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a.txt").write_text("a dog\n\nthe dog\n")
    (tmp_path / "val/c.caption").write_text("a cat")
    (tmp_path / "val/c.txt").write_text("the cat")
    (tmp_path / "notes.txt").write_text("not of an image")
    parsed = parse_annotations(tmp_path, ReadOptions())[1]
    assert [(row.image_path, row.caption, row.split) for row in parsed.rows if not row.problem] == [
        ("a.jpg", "a dog", ""),
        ("a.jpg", "the dog", ""),
        ("val/c.png", "a cat", "val"),
        ("val/c.png", "the cat", "val"),
    ]
    assert problems(parsed) == ["a text file without an image beside it", "an image without a .txt file beside it"]


def test_image_folder_has_splits_by_folder(tmp_path):
    _, path = write("ImageFolder", CAPTIONS, tmp_path)
    examples = {example.image_path: example.split for example in read_annotations(path)}
    assert examples == {
        "train/a.jpg": "train",
        "train/c d.jpg": "train",
        "validation/b.jpg": "val",
        "validation/e.jpg": "val",
    }
    (path / "train/metadata.jsonl").write_text("of two metadata files of a folder the table counts")
    assert len(read_annotations(path)) == 4
    (path / "validation").rename(path / "vall")
    with pytest.raises(InputError, match="expected train, val or test as the split, found 'vall'"):
        read_annotations(path)


def test_image_folder_keeps_the_notes_about_its_tables(tmp_path):
    (tmp_path / "metadata.csv").write_text('file_name,text\na.jpg,"a dog\nb.jpg,a cat\nc.jpg,"a cow"\n')
    assert "metadata.csv; " in (details := parse_annotations(tmp_path, ReadOptions())[1].details)
    assert "quotes are part of the captions" in details


# What is no format.


@pytest.mark.usefixtures("all_options")
def test_unknown_formats_are_refused_with_those_that_are_known(read, tmp_path):
    with pytest.raises(InputError) as error:
        read("picture,words\na.jpg,a dog\n")
    assert str(error.value) == (
        f"{tmp_path}/annotations: not a known annotation format; expected one of {', '.join(FORMATS)} (docs/data.md "
        "shows them), found 'picture,words\\na.jpg,a dog'; name other columns or fields by --image-column, "
        "--caption-column and --separator"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n", "empty; expected captions"),
        ("a dog\thttp://example.com/a.jpg\n", "not a known annotation format"),
        ("a.jpg", "not a known annotation format"),
        ("{", "expected JSON"),
        ("[1, 2]", "not a known annotation format"),
        ({"images": "../images", "cnn": "InceptionV3"}, "not a known annotation format"),
        ({"train": [{"id": "a", "findings": "normal", "image_path": ["a.png"]}]}, "not a known annotation format"),
        ([{"id": 5, "caption": "a dog"}], "not a known annotation format"),
        ({"annotations": [{"id": 1}], "images": 5}, "expected COCO captions JSON .*; it is wrong: Type"),
        ({"images": [{"sentences": [{"raw": "a dog"}]}]}, "expected Karpathy's JSON .*'filename'"),
    ],
)
def test_other_content_is_refused_in_one_line(read, content, message):
    with pytest.raises(InputError, match=message) as error:
        read(content)
    assert "\n" not in str(error.value)


def test_folder_without_captions_is_refused(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(InputError, match=r"a known annotation format; .*image folder with metadata.*, found a folder"):
        parse_annotations(tmp_path, ReadOptions())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.jpg,café\n".encode("cp1252"), r"text in UTF-8 \(.* position 9.*\); .* --encoding, such as windows-1252"),
        ("a.jpg,a dog\n".encode("utf-16-le"), r"text in UTF-8 \(it has NUL characters\); save it as UTF-8"),
        (b"\xff\xfea", "expected text in UTF-16"),
        (b"PK\x03\x04" + bytes(20), "unpack archives"),
    ],
    ids=["cp1252", "utf-16-le", "utf-16", "zip"],
)
@pytest.mark.usefixtures("all_options")
def test_other_encodings_and_binary_files_are_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        parse_annotations(tmp_path / "file", ReadOptions())
    assert "\n" not in str(error.value)


def test_encoding_can_be_named(tmp_path):
    (tmp_path / "file").write_bytes("image,caption\na.jpg,café\n".encode("cp1252"))
    rows = parse_annotations(tmp_path / "file", ReadOptions(encoding="windows-1252"))[1].rows
    assert rows[0].caption == "café"
    for name in ("klingon", "base64"):
        with pytest.raises(InputError, match=f"--encoding {name}: no such encoding"):
            parse_annotations(tmp_path / "file", ReadOptions(encoding=name))
    with pytest.raises(InputError, match=r"none: cannot be read \(No such file or directory\)"):
        parse_annotations(tmp_path / "none", ReadOptions())


def test_an_id_of_two_images_is_refused(tmp_path):
    """The captions of one would go to the other."""
    images = [{"id": 7, "file_name": name} for name in ("a.jpg", "b.jpg")]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": [{"image_id": 7, "caption": "a dog"}]}))
    with pytest.raises(InputError, match="two images have the id 7"):
        read_annotations(path)


@pytest.mark.parametrize(
    "text",
    [
        '{"a.jpg": "a dog", "b.jpg": "a cat", "a.jpg": "the dog"}',
        '[{"image": "b.jpg", "a.jpg": 1, "caption": "a cat", "a.jpg": 2}]',
        '{"image": "b.jpg", "caption": "a cat"}\n{"a.jpg": "a dog", "a.jpg": "the dog"}\n',
    ],
)
def test_a_key_that_is_twice_in_an_object_is_refused(read, tmp_path, text):
    with pytest.raises(InputError, match=r"annotations: the key 'a\.jpg' is twice in an object") as error:
        read(text)
    assert str(error.value).startswith(str(tmp_path))


def test_captions_of_several_lines_are_logged(tmp_path, capsys):
    path = tmp_path / "captions.csv"
    path.write_text('image,caption\na.jpg,"a dog\nand a cat, running"\nc.jpg,a horse\n')
    assert len(read_annotations(path)) == 2
    assert "1 captions run over several lines (is a quote left open?), the first: 'a dog" in capsys.readouterr().err
