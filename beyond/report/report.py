"""A page to look at: images with their captions, and where the model attended for each word.

The page is one file that loads nothing: images are data URIs, and its Content-Security-Policy allows nothing else. Its
captions and images are plain HTML, which can be read and searched without JavaScript; web/viewer.js makes figures of
them that show the attention, in the page (with web/report.js) and in the output of a notebook.
"""

import base64
import hashlib
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from PIL import Image

from captioning.base.cli import InputError
from captioning.base.files import atomic_write
from captioning.images.reading import to_rgb

WEB = Path(__file__).parent / "web"
NOTEBOOK_SIDE_PX = 480  # the longer side of an image in a notebook
REPORT_SIDE_PX = 320  # and in a page, which may have thousands
JPEG_QUALITY = 80
NO_WORDS = "(no words)"  # in place of an empty caption, as in plots
COUNT_BYTES = 60  # the room in the page for the number of its images, which is known last


# One caption.


def _read_web(*names: str) -> str:
    """Returns files of web/, one after the other."""
    return "\n".join((WEB / name).read_text(encoding="utf-8") for name in names)


def _data_uri(image: Image.Image, max_side: int) -> tuple[str, int, int]:
    """Returns an image as a JPEG in a data URI, with its width and height."""
    image = to_rgb(image)  # a copy
    image.thumbnail((max_side, max_side))
    file = io.BytesIO()
    image.save(file, "jpeg", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}", image.width, image.height


def _to_json(result: dict[str, Any]) -> str:
    """Returns JSON that can stand in a <script>, which "</script>" or "<!--" in a caption would end or confuse."""
    finite = json.loads(json.dumps(result), parse_constant=lambda _: None)  # a browser does not know NaN
    return json.dumps(finite, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _plain_figure(image: Image.Image, result: dict[str, Any], max_side: int) -> str:
    """Returns an image above its caption, with what web/viewer.js needs to make its figure of them."""
    uri, width, height = _data_uri(image, max_side)
    caption = html.escape(result["caption"] or NO_WORDS)
    return (
        f'<figure class="caption-viewer-plain"><img src="{uri}" alt="{caption}" width="{width}" height="{height}">\n'
        f'<figcaption dir="auto">{caption}</figcaption>\n'
        f'<script type="application/json">{_to_json(result)}</script></figure>\n'
    )


def notebook_html(image: Image.Image, result: dict[str, Any]) -> str:
    """Returns what a notebook shows of a caption: HTML that needs nothing else, and may stand in many cells.

    A notebook that is not trusted runs no script, and shows the image with its caption.

    Args:
        image: any image that Pillow can open; it is shown with at most `NOTEBOOK_SIDE_PX`.
        result: the caption with its attention, as `captioning.output.captions.Caption.to_json` returns it.
    """
    return (
        f"<style>{_read_web('viewer.css')}</style>\n"
        f'<div class="caption-viewer-notebook">{_plain_figure(image, result, NOTEBOOK_SIDE_PX)}</div>\n'
        f"<script>{_read_web('viewer.js')}\ncaptionViewer.enhance(document);</script>\n"
    )


# Many captions.


def _hash_source(text: str) -> str:
    """Returns the source of a Content-Security-Policy that allows this script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _page_parts(title: str, subtitle: str) -> tuple[str, str, str]:
    """Returns the page up to the number of its images, from there to the first entry, and from the last one on."""
    style, script = _read_web("viewer.css", "report.css"), _read_web("viewer.js", "report.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash_source(style)}; script-src {_hash_source(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    title, subtitle = html.escape(title), html.escape(subtitle)
    head = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{": ".join(filter(None, (title, subtitle)))}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{f"<p>{subtitle}</p>" if subtitle else ""}
<p>"""
    tools = """</p>
</header>
<div id="tools" role="search" hidden>
<input type="search" id="search" placeholder="Search" aria-label="Search captions and names" \
aria-keyshortcuts="/" autocomplete="off">
<select id="order" aria-label="Order"><option value="">original order</option></select>
<output id="found" for="search" aria-live="polite"></output>
</div>
<main>
"""
    return head, tools, f"\n</main>\n<script>{script}</script>\n</body>\n</html>\n"


def _format_entry(
    figure: str, name: str, confidence: float, references: Sequence[str], score: float | None, score_name: str
) -> str:
    """Returns the HTML of an image: its name and score, the figure, and people's captions."""
    fields, shown_score, people = f'data-confidence="{confidence}"', "", ""
    if score is not None:
        fields += f' data-score="{score}"'
        shown_score = f'<p><span class="score-name">{html.escape(score_name)}</span> {score:.1f}</p>'
    if references:
        items = "".join(f'<li dir="auto">{html.escape(text)}</li>\n' for text in references)
        people = f'<section class="people"><h3>people\'s captions</h3>\n<ul>\n{items}</ul></section>\n'
    return (  # no white space lies between the entries: Chromium would take seconds to sort thousands
        f'<article {fields}>\n<div class="about"><h2 dir="auto">{html.escape(name)}</h2>{shown_score}</div>\n'
        f"{figure}{people}</article>"
    )


class ReportWriter:
    """Writes a page of images with their captions, as they come: the memory does not grow with their number.

        with ReportWriter("report.html", "Captions", "run coco, beam size 5") as report:
            report.add(image, "photo.jpg", caption.to_json(with_attention=True))

    The file appears at the end of the block. A block that fails, or is stopped by Ctrl-C, leaves a page of the images
    that were added before, which says so; or none, if there were none, or if the page itself could not be written.

    Args:
        path: the file.
        title: the heading of the page.
        subtitle: what made the captions.
        max_side: pixels of the longer side of an image.
    """

    def __init__(self, path: Path | str, title: str, subtitle: str = "", max_side: int = REPORT_SIDE_PX):
        self.path, self.max_side = Path(path), max_side
        self.num_images = 0
        self._parts = [part.encode(errors="backslashreplace") for part in _page_parts(title, subtitle)]
        self._context = atomic_write(path, "wb")
        self._file: IO[bytes]
        self._end = 0  # of the last entry that was written as a whole, in bytes

    def __enter__(self) -> "ReportWriter":
        """Opens the file.

        Raises:
            InputError: the path is that of a folder.
        """
        if self.path.is_dir():
            raise InputError(f"{self.path}: expected a file for the page, found a folder; add the name of a file")
        self._file = self._context.__enter__()
        head, tools, _ = self._parts
        self._write(head + b" " * COUNT_BYTES + tools)
        return self

    def add(
        self,
        image: Image.Image,
        name: str,
        result: dict[str, Any],
        references: Sequence[str] = (),
        score: float | None = None,
        score_name: str = "",
    ) -> None:
        """Writes an image with its caption.

        Args:
            image: any image that Pillow can open; the page has a small copy.
            name: its path or address.
            result: the caption with its attention, as `captioning.output.captions.Caption.to_json` returns it.
            references: people's captions.
            score: that of the caption; the page can be sorted by it.
            score_name: what the score is.

        Raises:
            OSError: the page cannot be written, because the disk is full.
        """
        figure = _plain_figure(image, result, self.max_side)
        entry = _format_entry(figure, name, result["confidence"], references, score, score_name)
        # The name of a file need not be Unicode; Python's escape of such a character is also that of JSON.
        self._write(entry.encode(errors="backslashreplace"))
        self.num_images += 1

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._end += len(content)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends the page, and gives the file its name."""
        if error and not self.num_images:
            self._context.__exit__(kind, error, traceback)
            return
        try:
            self._finish(", stopped before the end" if error else "")
        except OSError as failure:
            self._context.__exit__(type(failure), failure, failure.__traceback__)
            if error is None:
                raise
            return
        self._context.__exit__(None, None, None)

    def _finish(self, note: str) -> None:
        """Writes the end of the page, and the number of images at its beginning."""
        self._file.seek(self._end)
        self._file.truncate()  # an entry that Ctrl-C cut off
        head, _, end = self._parts
        self._file.write(end)
        self._file.seek(len(head))
        noun = "image" if self.num_images == 1 else "images"
        self._file.write(f"{self.num_images:,} {noun}{note}".encode().ljust(COUNT_BYTES))
        self._file.flush()
