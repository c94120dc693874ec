import numpy as np
import pytest
from pycocoevalcap.cider.cider_scorer import cook_test

from captioning.scores import metrics
from captioning.scores.java_scores import has_java
from captioning.scores.metrics import ReferenceScorer, distinct_ratio, score, score_all, tokenize

REFERENCES = [
    ["A dog runs on the grass.", "the brown dog is running"],
    ["A cat sleeps on a bed .", "a sleeping cat"],
    ["two men", "men"],
]
CAPTIONS = ["a dog runs on the grass", "a cat sleeps", "two men"]


def total(references, captions):
    return score(references, captions).total


def test_score_of_perfect_captions():
    scores = total(REFERENCES[:2], ["a dog runs on the grass", "A cat sleeps on a bed"])
    assert [scores[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == [100] * 4
    assert scores["ROUGE-L"] == 100 and scores["CIDEr"] > 100
    assert list(scores) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]


def test_score_bleu_matches_hand_computation():
    # 3 of 4 words match; of 3 pairs "a dog" and "dog runs"; the reference is 6 words long: exp(1 - 6 / 4).
    scores = total([["a dog runs on the grass"]], ["a dog runs fast"])
    brevity_penalty = np.exp(1 - 6 / 4)
    assert scores["BLEU-1"] == pytest.approx(100 * brevity_penalty * 3 / 4, abs=0.01)
    assert scores["BLEU-2"] == pytest.approx(100 * brevity_penalty * np.sqrt(3 / 4 * 2 / 3), abs=0.01)


@pytest.mark.parametrize("words", ["spaces", "characters"])
def test_reference_scorer_has_the_numbers_of_pycocoevalcap(words, rng):
    vocabulary = np.array(["a", "the", "dog", "man's", "runs", "red", "of", "."])

    def draw():
        return " ".join(rng.choice(vocabulary, rng.integers(0, 12)))

    references = [[draw() for _ in range(rng.integers(1, 6))] for _ in range(60)]
    scorer = ReferenceScorer(references, words)
    for _ in range(2):  # epochs
        captions = [rng.choice([*texts, draw()]) for texts in references]
        expected = score(references, captions, words)
        assert scorer.score(captions) == {name: expected.total[name] for name in ("BLEU-4", "CIDEr")}
        weighed = [scorer._weigh(cook_test(*tokenize({0: [text]}, words)[0])) for text in captions]
        found = [100 * float(metrics._cider(*pair)) for pair in zip(weighed, scorer._references, strict=True)]
        assert found == expected.by_image["CIDEr"], "the last digits differ"


def test_score_splits_both_sides_as_published_scores_do():
    # Of "the", "man", "'s" and "dog" three match; split at spaces it would be one of three.
    assert total([["The man's cat."]], ["the man's dog"])["BLEU-1"] == pytest.approx(75, abs=0.01)


def test_score_by_image():
    scores = score(REFERENCES, ["two dogs", "a cat sleeps on a bed", "men"])
    assert list(scores.by_image) == list(scores.total)
    assert all(len(values) == 3 for values in scores.by_image.values())
    for name in ("ROUGE-L", "CIDEr"):
        assert np.mean(scores.by_image[name]) == pytest.approx(scores.total[name], abs=0.01)
    assert scores.by_image["BLEU-4"] == pytest.approx([0, 100, 0], abs=0.1), "of each caption alone"
    assert scores.by_image["BLEU-1"][2] == pytest.approx(100, abs=0.1)


@pytest.mark.slow
@pytest.mark.skipif(not has_java(), reason="METEOR needs Java")
def test_score_with_java_includes_meteor():
    scores = score(REFERENCES, CAPTIONS, java_scores=["METEOR"])
    assert list(scores.total) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"]
    assert 30 < scores.total["METEOR"] <= 100 and len(scores.by_image["METEOR"]) == 3


def test_tokenize_splits_words_or_characters():
    assert tokenize({3: ["A man's 狗狗."]}, "spaces") == {3: ["a man 's 狗狗"]}
    assert tokenize({3: ["A man's 狗狗."]}, "characters") == {3: ["a man's 狗 狗"]}


def test_score_all_without_java_leaves_out_meteor(monkeypatch, capsys):
    monkeypatch.setattr(metrics, "has_java", lambda: False)
    assert score_all(REFERENCES, CAPTIONS, "spaces") == score(REFERENCES, CAPTIONS)
    (message,) = capsys.readouterr().err.splitlines()
    assert message == (
        "METEOR is left out: it needs Java (Debian, Ubuntu, Colab: apt-get install default-jre-headless)"
    )


def test_score_all_has_what_java_programs_return(monkeypatch, capsys):
    results = {"METEOR": (0.25, [0.1, 0.2, 0.45]), "SPICE": (0.5, [0.5, 0.5, 0.5])}
    monkeypatch.setattr(metrics, "has_java", lambda: True)
    monkeypatch.setattr(metrics, "compute_java_score", lambda name, gts, res: results.get(name))
    scores = score_all(REFERENCES, CAPTIONS, "spaces", with_spice=True)
    assert (scores.total["METEOR"], scores.total["SPICE"]) == (25, 50)
    assert scores.by_image["METEOR"] == pytest.approx([10, 20, 45]) and not capsys.readouterr().err
    results.clear()  # they fail
    assert score_all(REFERENCES, CAPTIONS, "spaces", with_spice=True) == score(REFERENCES, CAPTIONS)


def test_score_all_of_characters(monkeypatch, capsys):
    monkeypatch.setattr(metrics, "has_java", lambda: True)
    references, captions = [["一只狗在跑步"], ["两个女人"]], ["一只 狗在跑步。", "两个男人"]
    scores = score_all(references, captions, "characters")
    assert scores.total["BLEU-1"] == pytest.approx(90, abs=0.01), "9 of 10 characters"
    assert "METEOR" not in scores.total
    (message,) = capsys.readouterr().err.splitlines()
    assert message == "METEOR knows English words only: it is left out, and scores are of characters"


def test_distinct_ratio_of_collapsed_model():
    assert distinct_ratio(["a dog"] * 4) == 25.0
    assert distinct_ratio(["a dog", "a cat", "a dog"]) == 66.7


def test_copied_ratio_compares_words():
    train_captions = ["A dog runs.", "two cats"]
    assert metrics.copied_ratio(["a dog runs", "a dog", "two cats", "cats"], train_captions, "spaces") == 50
    assert metrics.copied_ratio(["两只猫"], ["两只 猫"], "characters") == 100


def test_mid_sentence_ratio_counts_captions_that_go_on():
    captions = ["a dog on a", "a dog runs in the .", "A man looks on", "two dogs run .", "a cat with"]
    assert metrics.mid_sentence_ratio(captions) == 60
    assert metrics.mid_sentence_ratio(["", "a dog"]) == 0
