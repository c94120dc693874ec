import contextlib
import dataclasses
import errno
import json

import numpy as np
import pytest

import data_utils
import evaluate
import features
from beyond.consensus import __main__ as command
from beyond.consensus import chooser
from beyond.consensus import index as index_module
from beyond.consensus.chooser import ConsensusChooser, make_chooser
from beyond.consensus.index import INDEX_FILE, Index, Whitening, mean_features, normalize
from captioning.base.cli import InputError
from captioning.base.files import write_json
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import CONSENSUS_BEAM, DecodeConfig
from captioning.data.annotations import Example
from captioning.data.datasets import UserFiles, find_source
from captioning.images.feature_cache import FeatureCache
from captioning.images.image_records import ImageRecords
from captioning.output.captions import Caption
from inference import Captioner
from tokenizer import Tokenizer

CONSENSUS = DecodeConfig(choose="consensus", max_words=4)
IMAGES = {
    "sea.jpg": ("a boat at sea", "there is a white boat"),
    "town.jpg": ("a street in a town",),
    "beach.jpg": ("a dog on a beach", "a boat and a dog"),
}
TOKENIZER = Tokenizer.fit(caption for captions in IMAGES.values() for caption in captions)


@pytest.fixture
def index():
    """Of three images, whose vectors are the axes, without whitening."""
    examples = [Example(name, captions, number, "train") for number, (name, captions) in enumerate(IMAGES.items())]
    axes = np.eye(3, dtype=np.float32)
    index = Index.build(examples, axes, TOKENIZER, {"data": "abc"})
    return dataclasses.replace(index, whitening=Whitening(np.zeros(3, np.float32), axes), vectors=axes)


def make_caption(text, finished=True, alternatives=()):
    words = tuple(text.split())
    shares = np.full((len(words), 64), 1 / 64, np.float32)
    return Caption(text, words, (0.5,) * len(words), shares, 0.5 if finished else None, tuple(alternatives))


# The index.


def test_index_finds_the_nearest_images_and_their_captions(index):
    numbers, cosines = index.nearest(np.array([[0.6, 0.0, 0.8], [0.0, 1.0, 0.0]], np.float32), 2)
    assert numbers[0].tolist() == [2, 0] and numbers[1, 0] == 1
    np.testing.assert_allclose(cosines, [[0.8, 0.6], [1, 0]], rtol=1e-6)
    for number, captions in enumerate(IMAGES.values()):
        assert tuple(TOKENIZER.decode(ids) for ids in index.captions(number)) == captions
    assert index.nearest(np.eye(3, dtype=np.float32), 9)[0].shape == (3, 3), "there are no more"


def test_index_is_read_as_it_was_written(index, tmp_path):
    index.save(tmp_path / "index.npz")
    read = Index.load(tmp_path / "index.npz")
    assert (read.names, read.source) == (index.names, index.source)
    for name in ("vectors", "words", "caption_starts", "image_starts"):
        np.testing.assert_array_equal(getattr(read, name), getattr(index, name))
    for ours, theirs in zip(read.frequencies, index.frequencies, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "damage",
    [
        {"image_starts": np.array([0, 2, 3])},
        {"image_starts": np.array([0, 2, 3, 99])},
        {"caption_starts": np.array([0, 9, 4, 8, 13, 22])},
        {"vectors": np.array([object()] * 3)},
        {"vectors": np.zeros((3, 3), np.int64)},
        {"projection": np.zeros((3, 4))},
        {"vectors": np.full((3, 3), np.nan)},
        {"codes": np.array([5, 4], np.uint64), "counts": np.array([2, 2])},
        {"words": np.full(22, -1)},
        {"about": np.frombuffer(b"[" * 100_000, np.uint8)},
        {"codes": np.zeros(0, np.uint64)},
        {"about": np.frombuffer(b'{"format": 2, "names": [], "source": {}}', np.uint8)},
    ],
)
def test_index_that_is_damaged_is_refused(index, tmp_path, damage):
    path = tmp_path / "index.npz"
    index.save(path)
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | damage)
    with pytest.raises(InputError, match=r"index\.npz: damaged, or not an index"):
        Index.load(path)


def test_index_that_is_compressed_is_refused(index, tmp_path):
    index.save(tmp_path / "index.npz")
    with np.load(tmp_path / "index.npz") as file:
        np.savez_compressed(tmp_path / "index.npz", **file)
    with pytest.raises(InputError, match="found compressed ones"):
        Index.load(tmp_path / "index.npz")


def test_index_with_bytes_missing_or_changed_is_refused_or_read(index, tmp_path):
    path = tmp_path / "index.npz"
    index.save(path)
    content = path.read_bytes()
    for start in range(0, len(content), 61):
        path.write_bytes(content[:start] + content[start + 40 :])
        with pytest.raises(InputError, match=r"index\.npz: damaged, or not an index"):
            Index.load(path)
        path.write_bytes(content[:start] + b"\xff" + content[start + 1 :])
        with contextlib.suppress(InputError):  # which a byte that nothing depends on does not raise
            Index.load(path)


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"text", b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False}"]
)
def test_file_that_is_no_index_is_refused(tmp_path, content):
    (tmp_path / "index.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"index\.npz: damaged, or not an index"):
        Index.load(tmp_path / "index.npz")


@pytest.mark.slow
def test_index_with_words_that_the_vocabulary_lacks_is_refused(loaded):
    make_chooser(loaded)
    index = Index.load(loaded.run / INDEX_FILE)
    dataclasses.replace(index, words=index.words + 99).save(loaded.run / INDEX_FILE)
    with pytest.raises(InputError, match="words that the vocabulary does not have"):
        make_chooser(loaded)


def test_mean_features_are_those_of_float32(rng):
    image_features = tf.constant(rng.random((2, 64, 8)), tf.float16)
    np.testing.assert_allclose(mean_features(image_features), image_features.numpy().astype(float).mean(axis=1), 1e-5)


def test_whitening_makes_all_directions_equal(rng):
    means = rng.random((400, 6), np.float32) @ rng.random((6, 6), np.float32)
    means[:, 5] = 1  # a channel that tells nothing
    whitening = Whitening.fit(means)
    whitened = (normalize(means) - whitening.center) @ whitening.projection
    assert whitened.shape[1] == 6
    np.testing.assert_allclose(np.cov(whitened.T)[1:, 1:], np.eye(5), atol=0.01)
    np.testing.assert_allclose(np.linalg.norm(whitening.apply(means), axis=1), 1, rtol=1e-5)
    assert Whitening.fit(means[:16]).projection.shape == (6, 2), "of few images fewer numbers"


# The choice.


def choose(index, monkeypatch, *candidates, features=(1.0, 0.0, 0.1), neighbours=1):
    monkeypatch.setattr(chooser, "NUM_NEIGHBOURS", neighbours)
    first, *others = candidates
    captions = [dataclasses.replace(first, alternatives=tuple(others))]
    (chosen,) = ConsensusChooser(index, TOKENIZER).choose(captions, tf.constant([[features]]))
    return chosen


def test_chooser_ranks_by_the_captions_of_the_nearest_image(index, monkeypatch):
    candidates = [make_caption(text) for text in ("a dog on a beach", "a street", "a boat at sea")]
    chosen = choose(index, monkeypatch, *candidates)
    texts = [chosen.text, *(each.text for each in chosen.alternatives)]
    assert texts == ["a boat at sea", "a dog on a beach", "a street"]
    assert chosen.consensus > 10 * chosen.alternatives[0].consensus >= 0
    (similar,) = chosen.similar_images
    assert (similar.name, similar.captions) == ("sea.jpg", IMAGES["sea.jpg"]) and similar.cosine > 0.99
    assert choose(index, monkeypatch, *candidates, features=(0.1, 0.0, 1.0)).text == "a dog on a beach"


def test_nearer_images_count_more(index, monkeypatch):
    np.testing.assert_allclose(chooser.weigh_images(np.array([0.9, 0.8, 0.7])), np.exp([0, -1, -2]))
    np.testing.assert_allclose(chooser.weigh_images(np.array([0.5, 0.5])), 1)
    # Two captions of the second image speak for the dog, one of the first for the street.
    candidates = [make_caption("a dog on a beach"), make_caption("a street in a town")]
    chosen = choose(index, monkeypatch, *candidates, features=(0.0, 1.0, 0.9), neighbours=2)
    assert chosen.text == "a street in a town"


def test_chooser_ranks_captions_that_were_cut_last(index, monkeypatch):
    cut = make_caption("a boat at sea", finished=False)
    assert choose(index, monkeypatch, cut, make_caption("a street")).text == "a street"


def test_chooser_keeps_the_order_of_equal_candidates(index, monkeypatch):
    chosen = choose(index, monkeypatch, make_caption("in town"), make_caption(""), make_caption("street"))
    assert [chosen.text, *(each.text for each in chosen.alternatives)] == ["in town", "", "street"]


# With a run.


@pytest.fixture
def loaded(run, saved_dataset, cache, monkeypatch):
    """The captioner of the untrained small run, whose dataset has images and features.

    Of the features only the channels that tell colours and nouns apart are compared: whitening 2,048 takes a second.
    """
    for module in (chooser, index_module):
        monkeypatch.setattr(module, "mean_features", lambda features: mean_features(features[:, :, ::50]))
    write_json(cache.folder / "features.json", cache.manifest)
    monkeypatch.setattr(evaluate, "check_features", lambda *_: None)
    monkeypatch.setattr(chooser, "find_source", lambda *_, **__: UserFiles)
    monkeypatch.setattr(UserFiles, "find_missing_annotations", lambda: [])
    return Captioner.load(run)


def test_index_of_a_run_is_made_once(loaded, dataset, capsys):
    assert loaded.with_decoding(CONSENSUS).chooser is loaded.with_decoding(CONSENSUS).chooser
    assert capsys.readouterr().err.count("16 images, 32 captions") == 1
    index = Index.load(loaded.run / INDEX_FILE)
    assert index.names == [example.image_path for example in dataset.split("train")]
    assert np.linalg.norm(index.vectors, axis=1) == pytest.approx(1, abs=1e-3)
    make_chooser(loaded)
    err = capsys.readouterr().err
    assert "index" not in err and "only 16 training images" in err, "it is read; so few images are named"


@pytest.mark.slow
def test_index_that_cannot_be_written_serves_this_time(loaded, monkeypatch, capsys):
    def save(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Index, "save", save)
    assert len(make_chooser(loaded).index.names) == 16
    assert "cannot be written (Permission denied): the index will be made again" in capsys.readouterr().err


@pytest.mark.slow
def test_index_of_other_data_is_made_again(loaded, index, capsys):
    index.save(loaded.run / INDEX_FILE)
    assert len(make_chooser(loaded).index.names) == 16
    assert "it is made again" in capsys.readouterr().err


def test_index_is_not_made_from_features_of_images_that_have_changed(loaded, monkeypatch):
    def check_features(cache, image_dir, examples):
        raise InputError(f"{len(examples)} images have changed")

    monkeypatch.setattr(evaluate, "check_features", check_features)
    with pytest.raises(InputError, match=r"^16 images have changed"):
        make_chooser(loaded)


@pytest.mark.slow
def test_index_of_images_that_were_replaced_is_made_again(loaded, dataset, cache, capsys):
    name = dataset.split("train")[3].image_path
    records = ImageRecords(cache.folder, dataset.image_dir)
    for checksum in (1234, 5678):  # as features.py adds them, the second after the image was replaced
        records.note(name)
        records.add(name, checksum)
        make_chooser(loaded)
    assert "it is made again" in capsys.readouterr().err
    records.path.unlink()
    make_chooser(loaded)
    assert "it is made again" not in capsys.readouterr().err, "on a machine without the features or their records"


@pytest.mark.slow
def test_index_is_made_from_the_images_where_there_are_no_features(loaded, monkeypatch):
    from_cache = make_chooser(loaded).index

    def extract(pixels, training=False):
        return tf.ones((tf.shape(pixels)[0], 64, 2048))

    monkeypatch.setattr(features, "build_feature_extractor", lambda *_: extract)
    monkeypatch.setattr(evaluate, "open_features", lambda *_: None)
    command.main(["--run", str(loaded.run)])
    index = Index.load(loaded.run / INDEX_FILE)
    assert index.names == from_cache.names
    np.testing.assert_allclose(index.whitening.center, 41**-0.5, rtol=1e-3)


@pytest.mark.slow
def test_run_without_its_data_downloads_none_and_says_where_the_index_is_made(loaded, monkeypatch, tmp_path):
    monkeypatch.setattr(data_utils, "load_dataset", None)
    monkeypatch.setattr(chooser, "find_source", find_source)
    captioner = Captioner.load(loaded.run, CONSENSUS, locations={"data_dir": str(tmp_path / "moved")})
    with pytest.raises(InputError, match=r"2014\.zip is not in .*moved/coco\); make the index with `python -m "):
        _ = captioner.chooser


@pytest.mark.slow
def test_index_of_a_run_that_was_moved_is_made_where_its_data_are(loaded, dataset, cache, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(data_utils, "load_run_dataset", lambda *_, **options: given.append(options) or dataset)
    moved = cache.folder.rename(tmp_path / "moved")
    captioner = Captioner.load(loaded.run, CONSENSUS, locations={"images": "photos", "features_dir": str(moved)})
    assert len(captioner.chooser.index.names) == 16
    assert given == [{"with_images": False, "locations": {"data_dir": None, "images": "photos"}}]
    name = dataset.split("train")[3].image_path
    FeatureCache(moved, cache.manifest).write(name, np.full(cache.shape, np.nan))
    (loaded.run / INDEX_FILE).unlink()
    with pytest.raises(InputError, match=rf"the features of {name} are not all numbers, and of 0 more; `features\.py"):
        make_chooser(captioner)


@pytest.mark.slow
def test_captions_of_a_run_are_chosen_from_its_beam(loaded, dataset, cache):
    examples = dataset.split("val")
    captioner = loaded.with_decoding(dataclasses.replace(CONSENSUS, captions=2))
    chosen = evaluate.caption_examples(captioner, dataset.image_dir, examples, cache)
    wide = dataclasses.replace(captioner.decode_config, choose="probability", captions=CONSENSUS_BEAM)
    beams = evaluate.caption_examples(loaded.with_decoding(wide), dataset.image_dir, examples, cache)
    for caption, beam in zip(chosen, beams, strict=True):
        texts = {each.text: each for each in (beam, *beam.alternatives)}
        assert caption.text in texts and len(caption.alternatives) == 1
        values = [(each.finished, each.consensus) for each in (caption, *caption.alternatives)]
        assert values == sorted(values, reverse=True)
        values = json.loads(json.dumps(caption.to_json()))
        assert len(values["similar_images"]) == 5 and values["consensus"] == round(caption.consensus, 1)
        assert "similar_images" not in values["alternatives"][0]
    captioner.extract_features = lambda _: cache.read(tf.constant([str(cache.path(examples[0].image_path))]))
    (caption,) = captioner.caption_pixels(np.zeros((1, 8, 8, 3), np.uint8))
    assert caption.text == chosen[0].text and len(caption.alternatives) == 1, "as inference.py and the server do"


def test_evaluate_refuses_to_choose_by_the_reference_captions():
    with pytest.raises(InputError, match="expected val or test"):
        evaluate.parse(["--choose", "consensus", "--split", "all"])


def test_consensus_is_not_for_random_words():
    with pytest.raises(InputError, match="omit --sample"):
        DecodeConfig(choose="consensus", sample=True)
