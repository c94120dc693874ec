import numpy as np
import pytest

import demo
import evaluate
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


def test_a_collapsed_model_is_seen():
    captions = [Caption(("a", "dog"), (1.0, 1.0), np.zeros((2, 64)), ended) for ended in (True, True, True, False)]
    assert evaluate.summarise(captions) == {"distinct captions": 25.0, "never ended": 25.0}


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
