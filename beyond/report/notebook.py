"""Shows a caption in a notebook, below its image: pointing at a word shows where the model attended.

from beyond.report.notebook import show

show(captioner.caption("photo.jpg"))
"""

import html

from IPython.display import HTML, display

from beyond.report.report import plain_figure, read_web
from captioning.base.cli import InputError
from captioning.images.reading import read_image
from captioning.output.captions import Caption

MAX_SIDE = 480  # pixels of the longer side of an image


def show(caption: Caption) -> None:
    """Shows a caption with its image; the text alone if the image is not known, or no longer there."""
    display(HTML(caption_html(caption)))


def caption_html(caption: Caption) -> str:
    """Returns HTML that needs nothing else; a notebook that is not trusted runs no script, and shows plain HTML."""
    try:
        image = None if caption.image is None else read_image(caption.image)
    except InputError:
        image = None
    if image is None:
        return f"<p>{html.escape(caption.text)}</p>"
    return (
        f"<style>{read_web('viewer.css')}</style>\n"
        f'<div class="caption-viewer-notebook">{plain_figure(image, caption.to_json(with_attention=True), MAX_SIDE)}'
        f"</div>\n<script>{read_web('viewer.js')}\ncaptionViewer.enhance(document);</script>\n"
    )
