"""What captions score that know nothing of the image, and what a model's scores say beside them."""

import pytest

from captioning.scores import baselines, metrics
from captioning.scores.baselines import Baselines, compare_with_baselines, find_neighbours, most_typical


@pytest.mark.parametrize("words", ["spaces", "characters"])
def test_most_typical_is_the_caption_that_is_most_like_all(words):
    references = [["a dog runs", "the dog runs fast"], ["a dog sleeps"], ["a cat sits"]]
    captions = ["a hat", "a cat", "a dog runs", "zebras"]
    assert most_typical(captions, references, words) == "a dog runs"
    assert most_typical(["cat", "dog"], [["dog"], ["dog"], ["cat"]], words) == "dog", "no caption has two words"


def test_find_neighbours_takes_the_image_with_the_most_similar_features(dataset, cache):
    train, val = dataset.split("train"), dataset.split("val")
    found = find_neighbours(cache, val, train)
    for example, neighbour in zip(val, found, strict=True):
        same = [other for other in train if other.captions[0] == example.captions[0]]
        assert not same or neighbour in same
    cache.path(found[0].image_path).unlink()
    assert found[0] not in find_neighbours(cache, val, train), "one without features is left out"
    cache.path(val[0].image_path).unlink()
    assert find_neighbours(cache, val, train) == []


def test_compare_with_baselines_logs_what_needs_no_model(dataset, cache, monkeypatch, capsys):
    train, val = dataset.split("train"), dataset.split("val")
    assert compare_with_baselines(val, train, cache, "spaces", 0.0, 1) is None, "CIDEr needs more images"
    monkeypatch.setattr(metrics, "MIN_CIDER_IMAGES", 4)
    assert compare_with_baselines(val, [], cache, "spaces", 0.0, 1) is None, "there are no training images"
    found = compare_with_baselines(val, train, cache, "spaces", 1.0, 1)
    references = [list(example.captions) for example in val]
    constant = metrics.score(references, [found["constant"]] * 4).total["CIDEr"]
    nearest = [neighbour.captions[0] for neighbour in find_neighbours(cache, val, train)]
    assert found["constant_cider"] == constant
    assert found["nearest_cider"] == metrics.score(references, nearest).total["CIDEr"] > constant
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        f"CIDEr without a model: of {found['constant']!r} for all images {constant}, of the nearest training images "
        f"{found['nearest_cider']}"
    )
    assert lines[1].startswith("CIDEr 1.0, no more than one caption for all images: ")
    assert compare_with_baselines(val, train, None, "spaces", 1e3, 4)["nearest_cider"] is None
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("cider", "num_distinct", "verdict"),
    [
        (5.0, 80, "no more than one caption for all images"),
        (9.0, 9, "with 9 different captions, where people wrote 100"),
        (9.0, 80, "no more than captions that are copied from similar images"),
        (20.0, 80, None),
    ],
)
def test_verdict(cider, num_distinct, verdict):
    found = Baselines("a dog", 5.0, 10.0, 100).verdict(cider, num_distinct)
    assert found is None if verdict is None else f"CIDEr {cider:.1f}, {verdict}: " in found


def test_only_some_captions_and_images_are_compared(dataset, cache, monkeypatch):
    monkeypatch.setattr(baselines, "MAX_CAPTIONS", 1)
    monkeypatch.setattr(baselines, "MAX_NEIGHBOURS", 1)
    train, val = dataset.split("train"), dataset.split("val")
    found = baselines.find_baselines(val, train, cache, "spaces")
    assert found.constant == train[0].captions[0] and found.nearest_cider == pytest.approx(
        metrics.score([list(e.captions) for e in val], [train[0].captions[0]] * 4).total["CIDEr"]
    )
