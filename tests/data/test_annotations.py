"""From rows of any format to examples: what is left out, how it is logged, and the one form of captions and names."""

import pytest

from captioning.base.cli import InputError
from captioning.data.annotations import Example, read_annotations, rename_images


@pytest.fixture
def read(tmp_path):
    """Reads annotations from a CSV file with some lines below its header."""

    def read(*lines, header="image,caption"):
        path = tmp_path / "captions.csv"
        path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
        return read_annotations(path)

    return read


def test_examples_are_in_the_order_of_the_file_and_numbered(read):
    assert read("b.jpg,a cat", "a.jpg,a dog", "b.jpg,the cat") == [
        Example("b.jpg", ("a cat", "the cat"), 0),
        Example("a.jpg", ("a dog",), 1),
    ]


def test_splits_have_usual_names(read, capsys):
    header = "image,split,caption"
    assert [e.split for e in read("a.jpg,train,x", "b.jpg,Validation,y", header=header)] == ["train", "val"]
    assert [e.split for e in read("a.jpg,,x", "b.jpg,test,y", header=header)] == ["", "test"]
    capsys.readouterr()
    assert [e.split for e in read("a.jpg,1,x", "b.jpg,2,y", header=header)] == ["", ""]
    assert "captions.csv: the split '1' is ignored; expected train, val or test" in capsys.readouterr().err
    with pytest.raises(
        InputError, match=r"captions\.csv: expected train, val or test as the split, found 'vall' in 2 of 4 rows"
    ):
        read("a.jpg,train,x", "b.jpg,vall,y", "c.jpg,,y", "b.jpg,vall,z", header=header)
    assert [e.split for e in read("a.jpg,val,x", "a.jpg,train,y", header=header)] == ["val"]
    assert "1 images have rows of two splits, and are in the first one, such as 'a.jpg'" in capsys.readouterr().err


def test_captions_and_names_are_brought_to_one_form(read):
    [example] = read(".\\photos\\a.jpg,“A man\u2019s dog”  &amp; a cat…", "photos/a.jpg,the\u200b dog")
    assert example == Example("photos/a.jpg", ('"A man\'s dog" & a cat...', "the dog"), 0)


def test_marks_around_captions_are_taken_off(read, capsys):
    [example] = read("a.jpg,<start> a dog <end>", "a.jpg,&lt;start&gt; the dog &lt;end&gt;", "a.jpg,<start> <end>")
    assert example.captions == ("a dog", "the dog")
    logged = capsys.readouterr().err
    assert "captions.csv: marks around 3 captions are taken off: <start> and <end>" in logged
    assert "a caption without a word" in logged


def test_what_is_left_out_is_named_and_counted(read, tmp_path, capsys):
    lines = [f"{i}.jpg,?!" for i in range(5)]
    assert len(read("a.jpg,a dog", "b.jpg", *lines, ",nothing", "c.jpg,___", "a\u001b.jpg,x")) == 1
    path = tmp_path / "captions.csv"
    assert capsys.readouterr().err.splitlines() == [
        f"skipped {path}: 1 columns, expected 2: 'b.jpg' ''",
        *(f"skipped {path}: a caption without a word: '{i}.jpg' '?!'" for i in range(3)),
        f"skipped {path}: 3 more (a caption without a word)",
        f"skipped {path}: an image without a name: '' 'nothing'",
        f"skipped {path}: a name with control characters: 'a\\x1b.jpg' 'x'",
        f"{path}: table with a header (columns image, caption, separated by comma): 1 captions of 1 images",
    ]


def test_half_characters_and_wrong_types_are_left_out(tmp_path, capsys):
    path = tmp_path / "captions.json"
    path.write_text(
        '[{"image": "a.jpg", "caption": ["a dog", null, 5, "half \\ud800"]}, {"image": 7, "caption": "x"},'
        '{"image": {}, "caption": "y"}]'
    )
    assert read_annotations(path) == [Example("a.jpg", ("a dog",), 0), Example("7", ("x",), 1)]
    reasons = [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()[:-1]]
    assert reasons == [*["an image or a caption that is not text"] * 3, "a name or a caption that is not Unicode text"]


def test_karpathys_ids_and_splits_that_are_missing(tmp_path, capsys):
    path = tmp_path / "captions.json"
    path.write_text(
        '{"images": [{"filename": "a.jpg", "split": "train", "cocoid": 0.5, "sentences": [{"raw": "a dog"}]},'
        '{"filename": "b.jpg", "split": null, "sentences": [{"raw": "a cat"}]},'
        '{"filename": "d.jpg", "split": "test", "cocoid": 4, "sentences": [{"raw": "a cow"}]}]}'
    )
    assert read_annotations(path) == [Example("b.jpg", ("a cat",), 0), Example("d.jpg", ("a cow",), 4, "test")]
    logged = capsys.readouterr().err
    assert "neither a whole number nor text, 0.5" in logged and "None" not in logged


@pytest.mark.parametrize("line", ["a.jpg, .", ",a dog", "a.jpg"])
def test_annotations_without_a_usable_caption_are_refused(read, line):
    with pytest.raises(InputError, match=r"no usable caption in 1 rows \(table with a header\); the first: "):
        read(line)


def test_rename_images_makes_one_of_two():
    examples = [
        Example("A.jpg", ("a dog",), 0, "val"),
        Example("a.jpg", ("the dog",), 1, "train"),
        Example("b", ("x",), 2),
    ]
    assert rename_images(examples, str.lower) == [
        Example("a.jpg", ("a dog", "the dog"), 0, "val"),
        Example("b", ("x",), 2),
    ]
