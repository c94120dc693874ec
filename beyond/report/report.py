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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from PIL import Image

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


# One caption.


def plain_figure(image: Image.Image, result: dict[str, Any], max_side: int) -> str:
    """Returns the HTML of an image above its caption, with the data that web/viewer.js needs for its figure.

    Args:
        image: any image that Pillow can open.
        result: the caption with its attention, as `captioning.output.captions.Caption.to_json` returns it.
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


# Many captions.


@contextlib.contextmanager
def open_report(path: Path, title: str, subtitle: str, score_name: str = "") -> Iterator["ReportWriter"]:
    """Opens a page, and writes it as captions come: the memory does not grow with their number.

        with open_report(Path("report.html"), "Captions", "run coco, beam size 5") as report:
            report.write(CaptionedImage("photo.jpg", image, caption))

    The file appears at the end of the block, and not at all if the block fails.

    Args:
        path: the file.
        title: the heading of the page.
        subtitle: what made the captions.
        score_name: the name of the captions' scores, if they have any.
    """
    with atomic_write(path, "wb") as file:
        report = ReportWriter(file, score_name)
        report.write_html(_page_head(title, subtitle))
        yield report
        report.write_html(f"\n</main>\n<script>{read_web('viewer.js', 'report.js')}</script>\n</body>\n</html>\n")


def _page_head(title: str, subtitle: str) -> str:
    """Returns the page up to the first image."""
    title, subtitle = html.escape(title), html.escape(subtitle)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: {subtitle}</title>
<link rel="icon" href="data:,">
<style>{read_web("viewer.css", "report.css")}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p>{subtitle}</p>
</header>
<div id="tools" role="search" hidden>
<input type="search" id="search" placeholder="Search" aria-label="Search captions and names" autocomplete="off">
<select id="order" aria-label="Order"><option value="">original order</option></select>
<output id="count" for="search" aria-live="polite"></output>
</div>
<main>
"""


class ReportWriter:
    """Writes images with their captions into an open page, see `open_report`."""

    shows_images = True

    def __init__(self, file: IO[bytes], score_name: str = ""):
        self.file = file
        self.score_name = score_name

    def write(self, result: CaptionedImage, plot: Path | None = None, score: float | None = None) -> None:
        """Writes an image with its caption.

        Args:
            result: the image, its caption, and people's captions if there are any.
            plot: not used: the page shows the attention itself.
            score: the score of the caption; the page can be sorted by it.

        Raises:
            OSError: the disk is full.
        """
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
            shown_score = f'<p><span class="score-name">{html.escape(self.score_name)}</span> {score:.1f}</p>'
        if references:
            items = "".join(f'<li dir="auto">{html.escape(text)}</li>\n' for text in references)
            people = f'<section class="people"><h3>people\'s captions</h3>\n<ul>\n{items}</ul></section>\n'
        # No white space between the articles: with it Chromium takes seconds to sort thousands.
        self.write_html(
            f'<article {attributes}>\n<div class="about"><h2 dir="auto">{html.escape(name)}</h2>{shown_score}</div>\n'
            f"{plain_figure(image, result, MAX_SIDE)}{people}</article>"
        )

    def write_html(self, text: str) -> None:
        """Writes a part of the page."""
        # The name of a file need not be Unicode; Python's escape of such a character is also JSON's.
        self.file.write(text.encode(errors="backslashreplace"))
