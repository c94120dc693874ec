import importlib.util

import numpy as np
import pytest

from captioning import metrics
from captioning.metrics import JavaError, distinct_ratio, has_java, has_pycocoevalcap, score, score_with_fallback
from tokenizer import split_words

REFERENCES = [
    ["A dog runs on the grass.", "the brown dog is running"],
    ["A cat sleeps on a bed .", "a sleeping cat"],
    ["two men", "men"],
]
CAPTIONS = ["a dog runs on the grass", "a cat sleeps", "two men"]

needs_java = pytest.mark.skipif(not has_java(), reason="METEOR needs Java")


def plain_score(references, captions):
    return score(references, captions, java=False, split_words=split_words)


def test_score_of_perfect_captions():
    scores = plain_score(REFERENCES[:2], ["a dog runs on the grass", "A cat sleeps on a bed"])
    assert [scores[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == [100] * 4
    assert scores["ROUGE-L"] == 100 and scores["CIDEr"] > 100
    assert "METEOR" not in scores


def test_score_bleu_matches_hand_computation():
    # 3 of 4 words match; of 3 pairs "a dog" and "dog runs"; the reference is 6 words long: exp(1 - 6 / 4).
    scores = plain_score([["a dog runs on the grass"]], ["a dog runs fast"])
    brevity_penalty = np.exp(1 - 6 / 4)
    assert scores["BLEU-1"] == pytest.approx(100 * brevity_penalty * 3 / 4, abs=0.01)
    assert scores["BLEU-2"] == pytest.approx(100 * brevity_penalty * np.sqrt(3 / 4 * 2 / 3), abs=0.01)


def test_score_of_wrong_captions_is_lower():
    right = plain_score(REFERENCES, CAPTIONS)
    wrong = plain_score(REFERENCES, ["two men", "a dog runs on the grass", "a cat sleeps"])
    assert all(wrong[name] < right[name] for name in right)


def test_score_splits_both_sides_with_the_given_function():
    def split_letters(text):
        return list(text)

    scores = score([["abcd"]], ["abcx"], java=False, split_words=split_letters)
    assert scores["BLEU-1"] == pytest.approx(75, abs=0.01)


@pytest.mark.slow
@needs_java
def test_score_with_java_includes_meteor():
    scores = score(REFERENCES, CAPTIONS, java=True, split_words=split_words)
    assert 30 < scores["METEOR"] <= 100


@needs_java
def test_meteor_that_cannot_run_raises_and_does_not_hang(monkeypatch, tmp_path):
    from pycocoevalcap.meteor import meteor

    monkeypatch.setattr(meteor, "METEOR_JAR", str(tmp_path / "none.jar"))
    with pytest.raises(JavaError, match="METEOR's Java program failed; it needs 2 GB of memory"):
        metrics.meteor({0: ["a dog"]}, {0: ["a dog"]})
    (tmp_path / "a b").mkdir()
    monkeypatch.setattr(meteor, "__file__", str(tmp_path / "a b/meteor.py"))
    with pytest.raises(JavaError, match="a folder with a space in its path"):
        metrics.meteor({0: ["a dog"]}, {0: ["a dog"]})


def test_tokenize_without_java_uses_the_given_function():
    assert metrics.tokenize({7: ["A dog.", "two  men"]}, False, split_words) == {7: ["a dog", "two men"]}


@needs_java
def test_tokenize_with_java_raises_if_captions_are_lost(monkeypatch):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    monkeypatch.setattr(PTBTokenizer, "tokenize", lambda self, rows: {0: ["a dog"]})
    assert metrics.tokenize({0: ["a dog"]}, True, split_words) == {0: ["a dog"]}
    with pytest.raises(JavaError, match="the PTB tokenizer failed"):
        metrics.tokenize({0: ["a dog", "a cat"]}, True, split_words)


@pytest.mark.parametrize("has_broken_java", [False, True])
def test_score_with_fallback_logs_what_is_missing(monkeypatch, capsys, has_broken_java):
    def fail(*_):
        raise JavaError("METEOR stopped")

    tokenize = metrics.tokenize
    monkeypatch.setattr(metrics, "has_java", lambda: has_broken_java)
    monkeypatch.setattr(metrics, "meteor", fail)
    monkeypatch.setattr(metrics, "tokenize", lambda texts, java, split: tokenize(texts, False, split))
    scores, tokenizer_name = score_with_fallback(
        REFERENCES, ["a dog runs", "a cat sleeps", "two men"], split_words, "spaces"
    )
    assert tokenizer_name == ("PTB" if has_broken_java else "plain") and "METEOR" not in scores and len(scores) == 6
    message = capsys.readouterr().err.splitlines()[-1]
    assert "apt-get install default-jre-headless" in message and ("METEOR stopped" in message) == has_broken_java


def test_score_with_fallback_uses_plain_tokenizer_if_ptb_fails(monkeypatch, capsys):
    def fail_with_java(references, captions, java, split_words):
        if java:
            raise JavaError("the PTB tokenizer failed")
        return {"BLEU-1": 50.0}

    monkeypatch.setattr(metrics, "has_java", lambda: True)
    monkeypatch.setattr(metrics, "score", fail_with_java)
    assert score_with_fallback(REFERENCES, CAPTIONS, split_words, "spaces") == ({"BLEU-1": 50.0}, "plain")
    assert "the PTB tokenizer failed" in capsys.readouterr().err


def test_score_with_fallback_of_characters(monkeypatch, capsys):
    monkeypatch.setattr(metrics, "has_java", lambda: True)
    references, captions = [["一只狗在跑步"], ["两个女人"]], ["一只 狗在跑步。", "两个男人"]
    scores, tokenizer_name = score_with_fallback(references, captions, split_words, "characters")
    assert scores["BLEU-1"] == pytest.approx(90, abs=0.01), "9 of 10 characters"
    assert tokenizer_name == "characters" and "METEOR" not in scores
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("METEOR and the PTB tokenizer know English words only") and "characters" in message


@pytest.mark.parametrize(("returncode", "expected"), [(0, True), (1, False)])
def test_has_java_runs_it(monkeypatch, returncode, expected):
    monkeypatch.setattr(metrics.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(metrics.subprocess, "run", lambda *_, **__: type("Done", (), {"returncode": returncode}))
    assert has_java() is expected
    monkeypatch.setattr(metrics.shutil, "which", lambda name: None)
    assert has_java() is False


def test_has_pycocoevalcap(monkeypatch):
    assert has_pycocoevalcap() is (importlib.util.find_spec("pycocoevalcap") is not None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert has_pycocoevalcap() is False


def test_distinct_ratio_of_collapsed_model():
    assert distinct_ratio(["a dog"] * 4) == 25.0
    assert distinct_ratio(["a dog", "a cat", "a dog"]) == 66.7


def test_mid_sentence_ratio_counts_captions_that_go_on():
    captions = ["a dog on a", "a dog runs in the .", "A man looks on", "two dogs run .", "a cat with"]
    assert metrics.mid_sentence_ratio(captions) == 60
    assert metrics.mid_sentence_ratio(["", "a dog"]) == 0
