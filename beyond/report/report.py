"""An HTML page of images with their captions, and where the model attended for each word.

The page is one file that loads nothing else: its images are data URIs. Its captions and images are plain HTML, which
can be read and searched without JavaScript; web/viewer.js turns them into figures that show the attention, in the page
(with web/report.js) and in a notebook.
"""

import base64
import contextlib
import html
import io
import json
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from PIL import Image

from captioning.base.cli import log
from captioning.base.files import atomic_write
from captioning.images.reading import to_rgb
from captioning.output.results import CaptionedImage

WEB = Path(__file__).parent / "web"
MAX_SIDE = 320  # pixels of the longer side of an image in a page, which may have thousands
JPEG_QUALITY = 80
NO_WORDS = "(no words)"  # shown for an empty caption, as in plots


def read_web(*names: str) -> str:
    """Returns the content of files of web/, one after the other."""
    return "\n".join((WEB / name).read_text(encoding="utf-8") for name in names)


def plain_figure(image: Image.Image, result: dict[str, Any], max_side: int) -> str:
    """Returns the HTML of an image above its caption, with the data that web/viewer.js needs for its figure.

    Args:
        image: any image that Pillow can open.
        result: the caption, as `Caption.to_json(with_attention=True)` returns it.
        max_side: the largest width and height of the image, in pixels.
    """
    image = to_rgb(image)  # a copy
    image.thumbnail((max_side, max_side))
    jpeg = io.BytesIO()
    image.save(jpeg, "jpeg", quality=JPEG_QUALITY)
    uri = f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
    caption = html.escape(result["caption"] or NO_WORDS)
    return (
        f'<figure class="caption-viewer-plain"><img src="{uri}" alt="{caption}" width="{image.width}" '
        f'height="{image.height}">\n<figcaption dir="auto">{caption}</figcaption>\n'
        f'<script type="application/json">{_script_json(result)}</script></figure>\n'
    )


def _script_json(result: dict[str, Any]) -> str:
    """Returns JSON for a <script>, which "</script>" or "<!--" in a caption would end or break."""
    finite = json.loads(json.dumps(result), parse_constant=lambda _: None)  # JSON in a browser has no NaN
    return json.dumps(finite, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def is_report(path: Path) -> bool:
    """Tells whether `open_report` wrote a file."""
    with open(path, "rb") as file:
        return b"<title>Captions: " in file.read(500)


@contextlib.contextmanager
def open_report(path: Path, subtitle: str) -> Iterator["ReportWriter"]:
    """Opens a page, and writes it as captions come: the memory does not grow with their number. Logs where it is.

        with open_report(Path("report.html"), "run coco, beam size 5") as report:
            report.write(CaptionedImage("photo.jpg", image, caption))

    The file appears at the end of the block, and not at all if the block fails, or has written no image.
    """
    head, foot = read_web("report.html").split("$entries")
    styles, scripts = read_web("viewer.css", "report.css"), read_web("viewer.js", "report.js")
    try:
        with atomic_write(path, "wb") as file:
            report = ReportWriter(file)
            report.write_html(string.Template(head).substitute(subtitle=html.escape(subtitle), styles=styles))
            yield report
            if not report.num_images:  # as when a table that is resumed has them all
                raise _EmptyReportError
            report.write_html(string.Template(foot).substitute(scripts=scripts))
        log(f"page: {path}")
    except _EmptyReportError:
        log(f"page: {path} is not written, since no image was captioned")


class _EmptyReportError(Exception):
    """A page has no image."""


class ReportWriter:
    """Writes images with their captions into an open page, see `open_report`."""

    shows_images = True

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.num_images = 0

    def write(self, result: CaptionedImage, plot: Path | None = None, score: float | None = None) -> None:
        """Writes an image with its caption and, if it has one, its CIDEr; `plot` is not used."""
        caption = result.caption.to_json(with_attention=True)
        if result.image is not None:
            self.add(result.image, result.name, caption, result.references or (), score)

    def add(
        self,
        image: Image.Image,
        name: str,
        result: dict[str, Any],
        references: Sequence[str] = (),
        score: float | None = None,
    ) -> None:
        """Writes an image with a caption in the form of `Caption.to_json(with_attention=True)`; see `write`."""
        attributes, shown_score, people = f'data-confidence="{result["confidence"]}"', "", ""
        if score is not None:
            attributes += f' data-score="{score}"'
            shown_score = f"<p>CIDEr {score:.1f}</p>"
        if references:
            items = "".join(f'<li dir="auto">{html.escape(text)}</li>\n' for text in references)
            people = f'<section class="people"><h3>people\'s captions</h3>\n<ul>\n{items}</ul></section>\n'
        self.num_images += 1
        # No white space between the articles: with it Chromium takes seconds to sort thousands.
        self.write_html(
            f'<article {attributes}>\n<div class="about"><h2 dir="auto">{html.escape(name)}</h2>{shown_score}</div>\n'
            f"{plain_figure(image, result, MAX_SIDE)}{people}</article>"
        )

    def write_html(self, text: str) -> None:
        """Writes a part of the page."""
        # The name of a file need not be Unicode; Python's escape of such a character is also JSON's.
        self.file.write(text.encode(errors="backslashreplace"))
