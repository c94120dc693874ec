import json

import numpy as np
import pytest

import demo
import evaluate
from common import InputError
from data_utils import Example
from inference import Caption

REFERENCES = [
    ["A dog runs on the grass.", "the brown dog is running"],
    ["A cat sleeps on a bed .", "a sleeping cat"],
    ["two men", "men"],
]


def test_a_perfect_caption_scores_full_marks():
    scores = evaluate.score(REFERENCES[:2], ["a dog runs on the grass", "A cat sleeps on a bed"], java=False)
    assert [scores[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == [100] * 4
    assert scores["ROUGE-L"] == 100 and scores["CIDEr"] > 100
    assert "METEOR" not in scores


def test_bleu_by_hand():
    # 3 of 4 words match; of 3 pairs "a dog" and "dog runs"; the reference is 6 words long: exp(1 - 6 / 4).
    scores = evaluate.score([["a dog runs on the grass"]], ["a dog runs fast"], java=False)
    brevity = np.exp(1 - 6 / 4)
    assert scores["BLEU-1"] == pytest.approx(100 * brevity * 3 / 4, abs=0.01)
    assert scores["BLEU-2"] == pytest.approx(100 * brevity * np.sqrt(3 / 4 * 2 / 3), abs=0.01)


def test_wrong_captions_score_less():
    right = evaluate.score(REFERENCES, ["a dog runs on the grass", "a cat sleeps", "two men"], java=False)
    wrong = evaluate.score(REFERENCES, ["two men", "a dog runs on the grass", "a cat sleeps"], java=False)
    assert all(wrong[name] < right[name] for name in right)


@pytest.mark.skipif(not evaluate.has_java(), reason="METEOR needs Java")
def test_meteor_with_java():
    scores = evaluate.score(REFERENCES, ["a dog runs on the grass", "a cat sleeps", "two men"], java=True)
    assert 30 < scores["METEOR"] <= 100


@pytest.mark.skipif(not evaluate.has_java(), reason="METEOR needs Java")
def test_meteor_that_cannot_run_is_said_and_hangs_nothing(monkeypatch, tmp_path):
    from pycocoevalcap.meteor import meteor

    monkeypatch.setattr(meteor, "METEOR_JAR", str(tmp_path / "none.jar"))
    with pytest.raises(evaluate.JavaError, match="METEOR's Java program failed"):
        evaluate.meteor({0: ["a dog"]}, {0: ["a dog"]})
    (tmp_path / "a b").mkdir()
    monkeypatch.setattr(meteor, "__file__", str(tmp_path / "a b/meteor.py"))
    with pytest.raises(evaluate.JavaError, match="a folder with a space in its path"):
        evaluate.meteor({0: ["a dog"]}, {0: ["a dog"]})


@pytest.mark.parametrize("broken", [False, True])
def test_without_java_the_other_scores_and_what_to_do(monkeypatch, capsys, broken):
    def stopped(*_):
        raise evaluate.JavaError("METEOR stopped")

    tokenize = evaluate.tokenize
    monkeypatch.setattr(evaluate, "has_java", lambda: broken)
    monkeypatch.setattr(evaluate, "meteor", stopped)
    monkeypatch.setattr(evaluate, "tokenize", lambda texts, java: tokenize(texts, java=False))
    scores, tokenizer = evaluate.score_anywhere(REFERENCES, ["a dog runs", "a cat sleeps", "two men"])
    assert tokenizer == ("PTB" if broken else "plain") and "METEOR" not in scores and len(scores) == 6
    said = capsys.readouterr().err.splitlines()[-1]
    assert "apt-get install default-jre-headless" in said and ("METEOR stopped" in said) == broken


# Results made elsewhere.

EXAMPLES = [Example(f"{i}.jpg", tuple(captions), 100 + i, "val") for i, captions in enumerate(REFERENCES)]
RESULTS = [
    {"image_id": 102, "caption": "two men"},
    {"image_id": 100, "caption": "a dog runs on the grass"},
    {"image_id": 101, "caption": "a cat sleeps"},
]


def test_results_are_scored_by_their_ids(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "has_java", lambda: False)
    path = tmp_path / "results.json"
    others = [
        {"image_id": "102", "caption": "two\r\nmen"},
        *RESULTS[1:],
        {"image_id": 7, "caption": "of another split"},
    ]
    path.write_text(json.dumps(others))
    metrics = evaluate.score_file(path, EXAMPLES)
    expected = evaluate.score(REFERENCES, ["a dog runs on the grass", "a cat sleeps", "two men"], java=False)
    assert metrics["scores"] == expected and metrics["distinct captions"] == 100
    assert "1 captions of other pictures are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (RESULTS[:2], "no caption of 1 of the 3 pictures, the first with image_id 101"),
        ([*RESULTS, RESULTS[0]], "found two of image_id 102"),
        ([{"image_id": 100, "caption": "half a \ud800"}], "caption of image_id 100 is not Unicode text"),
        ({"annotations": RESULTS}, "not COCO results"),
        ([{"image_id": 1}], "not COCO results"),
        ([{"image_id": [1], "caption": "a dog"}], "not COCO results"),
    ],
)
def test_bad_results(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        evaluate.score_file(path, EXAMPLES)


def test_a_collapsed_model_is_seen():
    captions = [Caption(("a", "dog"), (1.0, 1.0), np.zeros((2, 64)), ended) for ended in (True, True, True, False)]
    assert evaluate.distinct([caption.text for caption in captions]) == 25.0
    assert evaluate.never_ended(captions) == 25.0


def test_noun_attention_by_hand():
    attention = np.zeros((3, 64))
    attention[2, 0] = 0.75  # the location in the upper left corner
    attention[2, 63] = 0.25
    drawn = [
        {"colour": "red", "noun": "circle", "box": [0, 0, 299 / 8, 299 / 16]},  # the upper half of that location
        {"colour": "blue", "noun": "circle", "box": [0, 0, 299, 299]},
    ]
    caption = Caption(("a", "red", "circle"), (1.0,) * 3, attention, True)
    assert demo.noun_attention(caption, drawn) == [(pytest.approx(0.75 / 2), pytest.approx(0.5 / 64))]
    other = Caption(("a", "green", "circle"), (1.0,) * 3, attention, True)
    assert demo.noun_attention(other, drawn) == [], "a shape that is not there has no box"
