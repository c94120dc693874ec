"""Writes captions in every format of annotations, each as people have it."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

# The captions of an image, by its name; with all that separates and quotes.
Captions = dict[str, list[str]]


def rows_of(captions: Captions) -> list[tuple[str, str]]:
    """Returns the name and the caption of every row."""
    return [(name, text) for name, texts in captions.items() for text in texts]


def write_table(captions: Captions, separator: str, header: tuple[str, ...]) -> str:
    """Writes a table as Python's csv, pandas and Excel do; columns that are not of images or captions hold numbers."""
    file = io.StringIO()
    writer = csv.writer(file, delimiter=separator, lineterminator="\n")
    writer.writerow(header)
    for number, (name, text) in enumerate(rows_of(captions)):
        values = dict.fromkeys(header, str(number))
        values |= {column: name for column in header if column.lower() in ("image", "file_name", "filepath")}
        values |= {column: text for column in header if column.lower() in ("caption", "text", "title")}
        writer.writerow(values.values())
    return file.getvalue()


def coco(captions: Captions) -> dict:
    """Returns COCO's captions JSON."""
    ids = {name: 10 * number for number, name in enumerate(captions)}
    return {
        "images": [{"id": image_id, "file_name": name} for name, image_id in ids.items()],
        "annotations": [
            {"id": number, "image_id": ids[name], "caption": text}
            for number, (name, text) in enumerate(rows_of(captions))
        ],
    }


def karpathy(captions: Captions) -> dict:
    """Returns Karpathy's JSON; every third image is for validation."""
    return {
        "images": [
            {
                "filename": name,
                "split": "val" if number % 3 == 0 else "train",
                "sentences": [{"raw": text, "tokens": text.split()} for text in texts],
            }
            for number, (name, texts) in enumerate(captions.items())
        ]
    }


def textcaps(captions: Captions) -> dict:
    """Returns TextCaps, whose names have no ending."""
    return {
        "data": [
            {"image_id": Path(name).stem, "image_name": name, "set_name": "train", "caption_str": text}
            for name, text in rows_of(captions)
        ]
    }


def objects(captions: Captions, image: str, caption: str) -> list[dict]:
    """Returns an object for every caption."""
    return [{image: name, caption: text, "id": number} for number, (name, text) in enumerate(rows_of(captions))]


def to_text(make: Callable[[Captions], str], encoding: str = "utf-8") -> Callable[[Captions, Path], None]:
    """Returns a writer of text."""
    return lambda captions, path: path.write_bytes(make(captions).encode(encoding)) and None


def to_json(make: Callable[[Captions], object], encoding: str = "utf-8") -> Callable[[Captions, Path], None]:
    """Returns a writer of JSON."""
    return to_text(lambda captions: json.dumps(make(captions), ensure_ascii=False), encoding)


def write_metadata(captions: Captions, folder: Path) -> None:
    """Writes Hugging Face's ImageFolder with a folder for each split, one as CSV and one as JSON Lines."""
    for number, split in enumerate(("train", "validation")):
        part = {name: texts for i, (name, texts) in enumerate(captions.items()) if i % 2 == number}
        (folder / split).mkdir(parents=True)
        if number:
            lines = "\n".join(json.dumps(row) for row in objects(part, "file_name", "text"))
            (folder / split / "metadata.jsonl").write_text(lines, encoding="utf-8")
        else:
            table = write_table(part, ",", ("file_name", "text"))
            (folder / split / "metadata.csv").write_text(table, encoding="utf-8")


def write_caption_files(captions: Captions, folder: Path) -> None:
    """Writes a folder of images, which are empty files, with a text file beside each."""
    folder.mkdir()
    for name, texts in captions.items():
        (folder / name).touch()
        (folder / name).with_suffix(".txt").write_text("\n".join(texts) + "\n", encoding="utf-8")


OBJECTS = "JSON objects, in a list or one a line"

# The name of the format that it is to be read as, and a writer, by a description.
WRITERS: dict[str, tuple[str, Callable[[Captions, Path], None]]] = {
    "COCO": ("COCO captions JSON", to_json(coco)),
    "COCO in UTF-16": ("COCO captions JSON", to_json(coco, "utf-16")),
    "Karpathy": ("Karpathy's JSON", to_json(karpathy)),
    "TextCaps": (OBJECTS, to_json(textcaps)),
    "metadata.jsonl": (OBJECTS, to_text(lambda c: "\n".join(map(json.dumps, objects(c, "file_name", "text"))))),
    "BLIP": (OBJECTS, to_json(lambda c: objects(c, "image", "caption"))),
    "AI Challenger": (
        OBJECTS,
        to_json(lambda c: [{"url": "", "image_id": name, "caption": texts} for name, texts in c.items()]),
    ),
    "mapping": (
        "JSON mapping of names to captions",
        to_json(lambda c: {name: texts[0] if len(texts) == 1 else texts for name, texts in c.items()}),
    ),
    "Flickr8k.token.txt": (
        "lines of name#0<TAB>caption",
        to_text(lambda c: "".join(f"{n}#{i}\t{text}\n" for n, texts in c.items() for i, text in enumerate(texts))),
    ),
    "Flickr8k-CN": (
        "lines of name#0<TAB>caption",
        to_text(lambda c: "".join(f"{n}#zhc#{i} {text}\n" for n, texts in c.items() for i, text in enumerate(texts))),
    ),
    "descriptions.txt": (
        "lines of a name, a space and a caption",
        to_text(lambda c: "".join(f"{name} startseq {text} endseq\n" for name, text in rows_of(c))),
    ),
    "CSV of Excel": (
        "table with a header",
        to_text(lambda c: write_table(c, ";", ("Image", "Caption")).replace("\n", "\r\n"), "utf-8-sig"),
    ),
    "TSV in UTF-16": ("table with a header", to_text(lambda c: write_table(c, "\t", ("filepath", "title")), "utf-16")),
    "CSV": ("table with a header", to_text(lambda c: write_table(c, ",", ("", "text", "date", "file_name")))),
    "results.csv": (
        "table with a header",
        to_text(
            lambda c: (
                "image_name| comment_number| comment\n"
                + "".join(f"{n}| {i}| {text}\n" for n, texts in c.items() for i, text in enumerate(texts))
            )
        ),
    ),
    "rows": ("table without a header", to_text(lambda c: "".join(f"{name}\t{text}\n" for name, text in rows_of(c)))),
    "ImageFolder": ("image folder with metadata", write_metadata),
    "text files": ("folder of images with .txt files", write_caption_files),
}
