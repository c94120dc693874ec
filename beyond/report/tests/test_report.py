"""The page of captions and the output of a notebook, as HTML; test_browser_report.py looks at them in a browser."""

import base64
import errno
import hashlib
import html.parser
import io
import json
import math
import re
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from beyond.report import report
from beyond.report.report import ReportWriter, notebook_html
from captioning.base.cli import InputError

HOSTILE = "</script><!-- <img src=x onerror=alert(1)> \" ' & \u2028 </figure>"
VOID = {"meta", "link", "img", "input"}


def make_result(caption="a red dog", **fields):
    words = [{"word": word, "probability": 0.5, "attention": [0.0156] * 64} for word in caption.split()]
    return {"caption": caption, "confidence": 0.6, "log_prob": -1.5, "finished": True, "words": words, **fields}


class Parser(html.parser.HTMLParser):
    """Parses HTML that has to be well-formed: every element is closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []  # (tag, attributes, list of texts)
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), "an attribute stands twice"
        self.elements.append((tag, dict(attributes), []))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.open[-1][2].append(data)

    def find(self, tag, **attributes):
        """Returns the attributes and the text of all such elements."""
        return [
            (found, "".join(texts))
            for name, found, texts in self.elements
            if name == tag and attributes.items() <= found.items()
        ]

    def texts(self, tag, **attributes):
        return [text for _, text in self.find(tag, **attributes)]


def write_report(path, *entries, title="Captions", **options):
    with ReportWriter(path, title, **options) as page:
        for entry in entries:
            page.add(**{"image": Image.new("RGB", (40, 30)), "name": "a.jpg", "result": make_result(), **entry})
    return Parser(path.read_text(encoding="utf-8"))


def open_data_uri(uri):
    kind, content = uri.split(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content, validate=True)))


# The page.


def test_report_has_images_captions_and_references(tmp_path):
    first = {"name": "one.jpg", "result": make_result("a dog"), "references": ["a dog runs", "my dog"]}
    second = {"name": "two.jpg", "result": make_result("a cat")}
    page = write_report(tmp_path / "new/report.html", first, second, title="My page", subtitle="run x, beam size 5")
    assert page.texts("title") == ["My page: run x, beam size 5"]
    assert page.texts("h1") == ["My page"] and "run x, beam size 5" in page.texts("p")
    assert page.texts("h2") == ["one.jpg", "two.jpg"]
    assert page.texts("figcaption") == ["a dog", "a cat"]
    assert [image["alt"] for image, _ in page.find("img")] == ["a dog", "a cat"]
    assert page.texts("h3") == ["people's captions"] and page.texts("li") == ["a dog runs", "my dog"]
    assert page.find("html")[0][0]["lang"] == "en" and len(page.find("main")) == len(page.find("header")) == 1
    assert page.find("div", role="search")


def test_report_has_no_white_space_between_images(tmp_path):
    """Chromium took 11 s to sort 5,000 images with line ends between them, and 0.2 s without."""
    write_report(tmp_path / "report.html", {}, {}, {"references": ["one"]})
    assert len(re.findall(r"</article>(?=<article)", (tmp_path / "report.html").read_text(encoding="utf-8"))) == 2


def test_report_without_subtitle_has_no_empty_line(tmp_path):
    page = write_report(tmp_path / "report.html")
    assert page.texts("title") == ["Captions"] and [text.strip() for text in page.texts("p")] == ["0 images"]


@pytest.mark.parametrize(("number", "expected"), [(0, "0 images"), (1, "1 image"), (3, "3 images")])
def test_report_counts_its_images(tmp_path, number, expected):
    page = write_report(tmp_path / "report.html", *[{}] * number)
    assert [text.strip() for text in page.texts("p")] == [expected] and len(page.find("article")) == number


def test_report_holds_the_result_for_its_script(tmp_path):
    result = make_result(alternatives=[make_result("a blue dog")])
    page = write_report(tmp_path / "report.html", {"result": result})
    (text,) = page.texts("script", type="application/json")
    assert json.loads(text) == result


def test_report_shows_scores_and_what_to_sort_by(tmp_path):
    result = make_result()
    page = write_report(tmp_path / "report.html", {"score": 45.678, "score_name": "CIDEr"}, {"score": 0.0}, {})
    articles = [attributes for attributes, _ in page.find("article")]
    assert [article.get("data-score") for article in articles] == ["45.678", "0.0", None]
    assert {article["data-confidence"] for article in articles} == {str(result["confidence"])}
    assert page.texts("span", **{"class": "score-name"}) == ["CIDEr", ""]
    assert " 45.7" in page.texts("p") and " 0.0" in page.texts("p")


def test_report_embeds_small_jpegs(tmp_path):
    wide = Image.new("RGB", (1000, 500), (200, 30, 30))
    page = write_report(tmp_path / "report.html", {"image": wide}, {"image": Image.new("LA", (40, 30))})
    first, second = (attributes for attributes, _ in page.find("img"))
    image = open_data_uri(first["src"])
    assert image.format == "JPEG" and image.size == (320, 160) == (int(first["width"]), int(first["height"]))
    np.testing.assert_allclose(np.asarray(image), np.broadcast_to((200, 30, 30), (160, 320, 3)), atol=3)
    assert open_data_uri(second["src"]).size == (40, 30), "never enlarged"
    assert wide.size == (1000, 500), "the caller's image stays as it is"
    small = write_report(tmp_path / "small.html", {"image": wide}, max_side=100)
    assert open_data_uri(small.find("img")[0][0]["src"]).size == (100, 50)


def test_report_shows_markup_as_text(tmp_path):
    result = make_result(HOSTILE, alternatives=[make_result(HOSTILE)])
    entry = {"name": HOSTILE, "result": result, "references": [HOSTILE], "score": 1.0, "score_name": HOSTILE}
    page = write_report(tmp_path / "report.html", entry, title=HOSTILE, subtitle=HOSTILE)
    for tag in ("h1", "h2", "figcaption", "li"):
        assert page.texts(tag) == [HOSTILE]
    assert HOSTILE in page.texts("p") and HOSTILE in page.texts("span")
    assert [image["alt"] for image, _ in page.find("img")] == [HOSTILE]
    (text,) = page.texts("script", type="application/json")
    assert json.loads(text) == result and "<" not in text


def test_report_shows_an_empty_caption(tmp_path):
    page = write_report(tmp_path / "report.html", {"result": make_result("")})
    assert page.texts("figcaption") == ["(no words)"] and page.find("img")[0][0]["alt"] == "(no words)"


def test_report_of_a_diverged_model_is_json_that_browsers_read(tmp_path):
    word = {"word": "a", "probability": math.nan, "attention": [math.inf] * 64}
    page = write_report(tmp_path / "report.html", {"result": make_result(words=[word], log_prob=-math.inf)})
    result = json.loads(page.texts("script", type="application/json")[0], parse_constant=pytest.fail)
    assert result["log_prob"] is None and result["words"] == [
        {"word": "a", "probability": None, "attention": [None] * 64}
    ]


def test_report_takes_names_that_are_not_unicode(tmp_path):
    name = b"caf\xe9.jpg".decode(errors="surrogateescape")
    page = write_report(tmp_path / "report.html", {"name": name, "references": [name]}, subtitle=name)
    assert page.texts("h2") == [r"caf\udce9.jpg"]


def test_report_allows_itself_to_load_nothing(tmp_path):
    page = write_report(tmp_path / "report.html", {})
    policy = page.find("meta", **{"http-equiv": "Content-Security-Policy"})[0][0]["content"]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        (text,) = (text for attributes, text in page.find(tag) if "type" not in attributes)
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    tags = [tag for tag, *_ in page.elements]
    assert tags.index("meta") < tags.index("style"), "the policy comes before what it allows"


@pytest.mark.parametrize("kind", ["page", "notebook"])
def test_html_has_no_reference_to_the_outside(tmp_path, kind):
    write_report(tmp_path / "report.html", {})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    text = text if kind == "page" else notebook_html(Image.new("L", (8, 8)), make_result())
    assert not re.search(r"https?:|//\w+\.\w|@import|url\(", text)
    for _, attributes, _ in Parser(text).elements:
        assert all(attributes.get(name, "data:").startswith("data:") for name in ("src", "href", "srcset", "action"))


# Writing.


def test_report_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with ReportWriter(str(path), "Captions") as page:
        page.add(Image.new("L", (8, 8)), "a.jpg", make_result())
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    assert list(tmp_path.iterdir()) == [path]


def test_report_writes_as_it_goes_in_constant_memory(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (320, 320, 3), np.uint8))
    with ReportWriter(tmp_path / "report.html", "Captions") as page:
        page.add(image, "a.jpg", make_result())
        tracemalloc.start()
        for number in range(30):
            page.add(image, f"{number}.jpg", make_result())
        remaining, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        (partial,) = tmp_path.iterdir()
        assert partial.stat().st_size > 30 * 50_000 > 10 * remaining


@pytest.mark.parametrize("error", [InputError, KeyboardInterrupt, ZeroDivisionError, BrokenPipeError])
def test_report_of_a_block_that_fails_has_what_was_added(tmp_path, error):
    path = tmp_path / "report.html"
    with pytest.raises(error), ReportWriter(path, "Captions") as page:
        page.add(Image.new("L", (8, 8)), "a.jpg", make_result())
        raise error
    page = Parser(path.read_text(encoding="utf-8"))
    assert page.texts("h2") == ["a.jpg"] and page.texts("p")[0].strip() == "1 image, stopped before the end"
    assert list(tmp_path.iterdir()) == [path]


def test_report_of_a_block_that_fails_at_once_leaves_the_old_one(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(InputError), ReportWriter(path, "Captions"):
        raise InputError("no image")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_report_leaves_out_an_entry_that_was_cut_off(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    with pytest.raises(KeyboardInterrupt), ReportWriter(path, "Captions") as page:
        page.add(Image.new("L", (8, 8)), "a.jpg", make_result())

        def write_half(content):
            page._file.write(content + b"more than the end of the page" * 10_000)
            raise KeyboardInterrupt

        monkeypatch.setattr(page, "_write", write_half)
        page.add(Image.new("L", (8, 8)), "b.jpg", make_result())
    text = path.read_text(encoding="utf-8")
    assert Parser(text).texts("h2") == ["a.jpg"] and text.endswith("</html>\n")


class FullDisk(io.BytesIO):
    """A file on a disk that has room for so many bytes."""

    room = 0

    def write(self, content):
        if self.tell() + len(content) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(content)


@pytest.mark.parametrize("interrupt", [False, True])
def test_report_on_a_full_disk_leaves_no_half_page(tmp_path, interrupt):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt if interrupt else OSError), ReportWriter(path, "Captions") as page:
        page.add(Image.new("L", (8, 8)), "a.jpg", make_result())
        page._file = FullDisk()
        if interrupt:
            raise KeyboardInterrupt
        page.add(Image.new("L", (8, 8)), "b.jpg", make_result())
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_report_that_cannot_be_ended_raises(tmp_path):
    path = tmp_path / "report.html"
    with pytest.raises(OSError, match="No space left"), ReportWriter(path, "Captions") as page:
        page.add(Image.new("L", (8, 8)), "a.jpg", make_result())
        page._file = FullDisk()
    assert not list(tmp_path.iterdir())


def test_report_refuses_a_folder_before_it_begins(tmp_path):
    with pytest.raises(InputError, match="expected a file for the page, found a folder"), ReportWriter(tmp_path, "a"):
        pytest.fail("the block ran")


# A notebook.


def test_notebook_html_is_well_formed_and_holds_all(tmp_path):
    result = make_result(alternatives=[make_result("a cat")])
    page = Parser(notebook_html(Image.new("RGB", (960, 480), "red"), result))
    assert page.texts("figcaption") == ["a red dog"] and json.loads(page.texts("script")[0]) == result
    image = open_data_uri(page.find("img")[0][0]["src"])
    assert image.size == (480, 240) and image.getpixel((9, 9))[0] > 240
    assert page.texts("script")[1].endswith("captionViewer.enhance(document);")


def test_notebook_html_styles_only_its_own():
    style = Parser(notebook_html(Image.new("L", (8, 8)), make_result())).texts("style")[0]
    style = re.sub(r"/\*.*?\*/", "", style, flags=re.DOTALL)
    for selectors in re.findall(r"([^{}]+)\{", style):
        if not selectors.strip().startswith("@media"):
            assert all(selector.strip().startswith(".caption-viewer") for selector in selectors.split(",")), selectors


def test_notebook_html_shows_markup_as_text():
    page = Parser(notebook_html(Image.new("L", (8, 8)), make_result(HOSTILE)))
    assert page.texts("figcaption") == [HOSTILE] and len(page.find("img")) == 1


# The files of web/.


@pytest.mark.parametrize("name", ["viewer.js", "report.js", "viewer.css", "report.css"])
def test_web_files_can_stand_in_a_page(name):
    text = (report.WEB / name).read_text(encoding="utf-8")
    assert not re.search(r"</|<!--|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", text)
    lines = text.splitlines()
    assert len(lines) <= 400 and max(map(len, lines)) <= 120
