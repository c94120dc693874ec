"""The page of captions, the output of a notebook, and the command; test_browser.py looks at them in a browser."""

import base64
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
from PIL import Image
from report_pages import HOSTILE, make_caption, make_result, write_page

import evaluate
from beyond.report import __main__ as command
from beyond.report.notebook import caption_html
from beyond.report.report import open_report
from captioning.base.cli import InputError
from captioning.config.settings import DecodeConfig
from captioning.output import results
from captioning.scores import metrics
from inference import Captioner

VOID = {"meta", "link", "img", "input"}


class Parser(html.parser.HTMLParser):
    """Parses HTML that has to be well-formed: every element is closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []  # (tag, attributes, list of texts)
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.open[-1][2].append(data)

    def texts(self, tag, **attributes):
        """Returns the texts of all elements with these attributes."""
        return [
            "".join(texts)
            for name, found, texts in self.elements
            if (name, attributes.items() <= found.items()) == (tag, True)
        ]

    def values(self, tag, attribute):
        """Returns an attribute of all elements."""
        return [found.get(attribute) for name, found, _ in self.elements if name == tag]

    def results(self):
        """Returns the captions that the scripts of the page read."""
        return [json.loads(text, parse_constant=pytest.fail) for text in self.texts("script", type="application/json")]


def parse_page(path):
    return Parser(path.read_text(encoding="utf-8"))


def make_page(folder, *entries, **options):
    write_page(folder / "report.html", *entries, **options)
    return parse_page(folder / "report.html")


def open_data_uri(uri):
    kind, content = uri.split(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content, validate=True)))


# The page.


def test_report_has_images_captions_references_and_scores(tmp_path):
    results = make_result("a dog"), make_result("a cat", alternatives=[make_result("two cats")])
    first = {"name": "one.jpg", "result": results[0], "references": ["a dog runs", "my dog"], "score": 45.678}
    page = make_page(tmp_path, first, {"name": "two.jpg", "result": results[1]}, subtitle="run x, beam size 5")
    assert page.texts("title") == ["Captions: run x, beam size 5"] and "run x, beam size 5" in page.texts("p")
    assert page.texts("h2") == ["one.jpg", "two.jpg"]
    assert page.texts("figcaption") == page.values("img", "alt") == ["a dog", "a cat"]
    assert page.texts("h3") == ["people's captions"] and page.texts("li") == ["a dog runs", "my dog"]
    assert page.values("article", "data-score") == ["45.678", None] and "CIDEr 45.7" in page.texts("p")
    assert page.values("article", "data-confidence") == ["0.42", "0.42"]
    assert page.results() == list(results)


def test_report_embeds_small_jpegs(tmp_path):
    wide = Image.new("RGB", (1000, 500), (200, 30, 30))
    page = make_page(tmp_path, {"image": wide}, {"image": Image.new("LA", (40, 30))})
    first, second = map(open_data_uri, page.values("img", "src"))
    assert (first.format, first.size, second.size) == ("JPEG", (320, 160), (40, 30)), "never enlarged"
    assert page.values("img", "width") == ["320", "40"] and page.values("img", "height") == ["160", "30"]
    np.testing.assert_allclose(np.asarray(first), np.broadcast_to((200, 30, 30), (160, 320, 3)), atol=3)
    assert wide.size == (1000, 500), "the caller's image stays as it is"


def test_report_shows_markup_as_text(tmp_path):
    result = make_result(HOSTILE, alternatives=[make_result(HOSTILE)])
    entry = {"name": HOSTILE, "result": result, "references": [HOSTILE], "score": 1.0}
    page = make_page(tmp_path, entry, subtitle=HOSTILE)
    for tag in ("h2", "figcaption", "li"):
        assert page.texts(tag) == [HOSTILE]
    assert HOSTILE in page.texts("p") and page.values("img", "alt") == [HOSTILE]
    assert page.results() == [result] and "<" not in page.texts("script", type="application/json")[0]


def test_report_shows_odd_captions_and_names(tmp_path):
    words = [{"word": "a", "probability": math.nan, "attention": [math.inf]}]
    diverged = make_result() | {"words": words, "log_prob": -math.inf}
    name = b"caf\xe9.jpg".decode(errors="surrogateescape")  # not Unicode
    page = make_page(tmp_path, {"result": make_result("")}, {"result": diverged, "name": name})
    assert page.texts("figcaption")[0] == page.values("img", "alt")[0] == "(no words)"
    assert page.texts("h2")[1] == r"caf\udce9.jpg"
    assert page.results()[1]["words"] == [{"word": "a", "probability": None, "attention": [None]}]


def test_report_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), open_report(path, "") as page:
        page.add(Image.new("L", (8, 8)), "a.jpg", make_result())
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_page(path, {})
    assert path.read_text(encoding="utf-8").endswith("</html>\n") and list(tmp_path.iterdir()) == [path]


# A notebook.


def test_notebook_shows_the_image_that_was_captioned(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (960, 320), "red").save(path)
    caption = make_caption(image=path, alternatives=(make_caption("a cat"),))
    page = Parser(caption_html(caption))
    (uri,) = page.values("img", "src")
    assert open_data_uri(uri).size == (480, 160) and open_data_uri(uri).getpixel((9, 9))[0] > 240
    assert page.results() == [caption.to_json(with_attention=True)]
    for selectors in re.findall(r"([^{}]+)\{", re.sub(r"/\*.*?\*/", "", page.texts("style")[0], flags=re.DOTALL)):
        is_own = all(selector.strip().startswith(".caption-viewer") for selector in selectors.split(","))
        assert is_own or selectors.strip().startswith("@media"), f"{selectors} styles the rest of the notebook"


def test_notebook_shows_the_text_alone_without_an_image(tmp_path):
    assert caption_html(make_caption("a <dog>")) == "<p>a &lt;dog&gt;</p>"
    assert caption_html(make_caption(image=tmp_path / "gone.png")) == "<p>a dog</p>"


# The command.


@pytest.fixture
def captioner(small_model, tokenizer, run_config, cache, tmp_path, monkeypatch):
    """A captioner without a CNN, which every command loads; its captions are short."""
    captioner = Captioner(small_model, tokenizer, run_config, tmp_path, DecodeConfig(max_words=3))
    captioner.extractor = lambda pixels, training: np.zeros((len(pixels), 64, 2048), np.float32)
    monkeypatch.setattr(Captioner, "load", lambda *_, **__: captioner)
    return captioner


def test_main_writes_a_page_of_images(captioner, tmp_path, capsys):
    for number in range(3):
        Image.new("L", (9, 9), number).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_text("not an image")
    page = tmp_path / "report.html"
    arguments = [str(tmp_path / "0.png"), str(tmp_path / "1.png"), "--html", str(page), "--json", "--from"]
    (tmp_path / "list.txt").write_text(str(tmp_path / "2.png"))
    with pytest.raises(InputError, match="1 of 3 images could not be captioned"):
        command.main([*arguments, str(tmp_path / "list.txt")])
    assert [name.rpartition("/")[2] for name in parse_page(page).texts("h2")] == ["0.png", "2.png"]
    assert f"run {tmp_path.name}; greedy search" in parse_page(page).texts("p")
    assert len(capsys.readouterr().out.splitlines()) == 2, "and JSON"


def test_page_stays_where_no_image_is_new(captioner, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(results, "file_sha256", lambda _: "1234")
    monkeypatch.setattr(results, "best_checkpoint", lambda _: "none")
    Image.new("L", (9, 9)).save(tmp_path / "0.png")
    page, table = tmp_path / "report.html", tmp_path / "table.csv"
    for said in (f"page: {page}\n", f"page: {page} is not written, since no image was captioned\n"):
        command.main([str(tmp_path / "0.png"), "--html", str(page), "--csv", str(table), "--no-plots"])
        assert said in capsys.readouterr().err
        assert len(parse_page(page).texts("h2")) == 1


def test_main_writes_a_page_of_a_split_with_the_worst_caption_first(
    captioner, saved_dataset, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evaluate.data_utils, "load_run_dataset", lambda config, locations: saved_dataset)
    monkeypatch.setattr(evaluate, "open_features", lambda *_: None)
    monkeypatch.setattr(evaluate, "caption_examples", lambda *_: [make_caption(text) for text in texts])
    monkeypatch.setattr(metrics, "has_java", lambda: False)
    examples = saved_dataset.split("val")
    texts = [examples[0].captions[0], "wrong", *(" ".join(each.captions[0].split()[:2]) for each in examples[2:])]
    (saved_dataset.image_dir / examples[2].image_path).unlink()
    command.main(["--split", "val", "--html", str(tmp_path / "report.html")])
    page = parse_page(tmp_path / "report.html")
    scores = [float(score) for score in page.values("article", "data-score")]
    assert scores == sorted(scores) and len(scores) == 3
    assert f"{examples[2].image_path}: no such image" in capsys.readouterr().err
    assert page.texts("p")[0].startswith(f"run {tmp_path.name}, val images, greedy search: BLEU-4 ")
    assert (page.texts("h2")[0], page.texts("h2")[-1]) == (examples[1].image_path, examples[0].image_path)
    assert page.texts("li")[:2] == list(examples[1].captions)
    assert json.loads((tmp_path / "metrics_val.json").read_text())["images"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--html", "."], "--html .: expected a file, found a folder"),
        (["--html", __file__], "expected a new file, or an earlier one of its kind"),
        (["--html", "a.html", "--split", "val", "--results", "r.json"], "--results has no attention"),
        (["--html", "a.html", "none.jpg"], "none.jpg: no such image"),
    ],
)
def test_main_refuses_what_cannot_be_shown(arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        command.main(arguments)
