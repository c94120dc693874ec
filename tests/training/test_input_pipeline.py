import contextlib
import threading

import numpy as np
import pytest

from captioning.base.quiet_tensorflow import tf
from captioning.data.annotations import Example
from captioning.decoder.fused_decoder import order_words
from captioning.training import input_pipeline
from captioning.training.input_pipeline import (
    EncodedCaptions,
    FixedShapes,
    choose_shapes,
    copy_ahead,
    describe_captions,
    describe_cut,
    encode_captions,
    make_dataset,
    make_epoch_batches,
)
from tokenizer import Tokenizer

COLOURS = ("red", "green", "blue")
NOUNS = ("dog", "cat", "bird", "horse")


def make_captions(num_captions):
    """Captions of 5 to 49 tokens, five of each image."""
    image_index = np.arange(num_captions, dtype=np.int32) // 5
    lengths = np.random.default_rng(0).integers(5, 50, num_captions)
    paths = np.array([f"{i}.npy" for i in range(image_index[-1] + 1)])
    return EncodedCaptions(paths, image_index, np.zeros((num_captions, 50)), lengths, lengths)


@pytest.fixture
def captions(dataset, tokenizer, cache):
    return encode_captions(dataset.split("train"), tokenizer.encode, cache.path)


def count_images(captions, batches):
    """Returns how many images are read in an epoch."""
    return sum(len(set(captions.image_index[batch])) for batch in batches)


def test_encode_captions_gives_each_its_image(dataset, tokenizer, cache, captions):
    examples = dataset.split("train")
    assert len(captions.feature_paths) == len(examples)
    assert captions.tokens.shape == (2 * len(examples), captions.lengths.max())
    texts = [caption for example in examples for caption in example.captions]
    for tokens, length, image, text in zip(captions.tokens, captions.lengths, captions.image_index, texts, strict=True):
        assert tokens[:length].tolist() == tokenizer.encode(text) and not tokens[length:].any()
        assert text in examples[image].captions
        assert captions.feature_paths[image] == str(cache.path(examples[image].image_path))


def test_encode_captions_cuts_long_captions(dataset, tokenizer, cache):
    full = encode_captions(dataset.split("train"), tokenizer.encode, cache.path)
    captions = encode_captions(dataset.split("train"), tokenizer.encode, cache.path, max_length=4)
    np.testing.assert_array_equal(captions.tokens, full.tokens[:, :4])
    np.testing.assert_array_equal(captions.lengths, np.minimum(full.lengths, 4))
    np.testing.assert_array_equal(captions.full_lengths, full.lengths)
    assert [array.dtype for array in captions[1:]] == [np.int32] * 4
    assert describe_cut(full) is None


def test_describe_cut_says_what_cannot_be_learned():
    def encode(max_length, *lengths):
        examples = [Example("a.jpg", tuple("a" * length for length in lengths), 0)]
        return encode_captions(examples, lambda text: [4] * len(text), str, max_length)

    assert describe_cut(encode(5, 5, 3)) is None
    assert describe_cut(encode(5, 5, 3, *[6] * 1203, 9)) == (
        "1,204 of 1,206 captions have more than 5 tokens (--max-length) and are cut: a cut caption does not teach "
        "<end>; the longest has 9 tokens"
    )
    assert describe_cut(encode(3, 4, 7)) == (
        "2 of 2 captions have more than 3 tokens (--max-length) and are cut: none teaches <end>, so that no caption of "
        "the model will end; raise --max-length; the longest has 7 tokens"
    )


def test_describe_captions_says_what_share_of_the_words_is_unknown(captions):
    assert describe_captions(captions, 12).endswith("12 words (0.0 % of those in the captions are unknown)")
    examples = [Example("a.jpg", ("a red dog", "a"), 0)]
    tokenizer = Tokenizer.fit(["a a red"], vocab_size=6)
    encoded = encode_captions(examples, tokenizer.encode, str)
    expected = "2 captions of 1 images, 6 words (25.0 % of those in the captions are unknown)"
    assert describe_captions(encoded, 6) == expected


# The batches of an epoch.


def test_make_epoch_batches_keeps_images_together():
    captions = make_captions(1003)
    batches = make_epoch_batches(captions, 16, seed=0, epoch=0)
    assert sorted(np.concatenate(batches)) == list(range(1003)), "every caption once"
    assert [len(batch) for batch in batches] == [16] * 62 + [11]
    assert count_images(captions, batches) <= 201 + 62, "only a batch's first and last image may be cut"
    mean_longest = np.mean([captions.lengths[batch].max() for batch in batches])
    shuffled = captions.lengths[np.random.default_rng(1).permutation(1003)]
    assert mean_longest < np.mean([shuffled[i : i + 16].max() for i in range(0, 1003, 16)]) - 1


def test_make_epoch_batches_can_shuffle_captions_one_by_one():
    captions = make_captions(1003)
    batches = make_epoch_batches(captions, 16, seed=0, epoch=0, group_by_image=False)
    assert sorted(np.concatenate(batches)) == list(range(1003))
    num_padded = sum(len(batch) * captions.lengths[batch].max() for batch in batches)
    assert num_padded < 1.15 * captions.lengths.sum(), "captions of similar length share a batch"
    assert count_images(captions, batches) > 700, "captions of an image are spread over batches"


def test_make_epoch_batches_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        return np.concatenate(make_epoch_batches(make_captions(200), 16, seed, epoch)).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 1)


def test_make_epoch_batches_merges_a_last_batch_that_is_too_small():
    assert [len(batch) for batch in make_epoch_batches(make_captions(3), 16, 0, 0)] == [3]
    merged = make_epoch_batches(make_captions(33), 16, 0, 0, min_last_batch=2)
    assert [len(batch) for batch in merged] == [16, 17], "one caption cannot be shared by two devices"
    assert sorted(np.concatenate(merged)) == list(range(33))


# The dataset.


def test_make_dataset_pairs_captions_with_their_features(captions, dataset, tokenizer, cache):
    texts = []
    for batch in make_dataset(captions, make_epoch_batches(captions, 5, 0, 0), cache.read):
        assert batch.features.shape[1:] == (64, 2048) and batch.features.dtype == tf.float16
        assert len(batch.features) == len(set(batch.image_index.numpy())), "each image is read once"
        assert batch.tokens.shape[1] == max(np.count_nonzero(batch.tokens, axis=1)), "padded to the longest, no more"
        for actual, expected in zip(batch.order, order_words(batch.tokens.numpy()), strict=True):
            np.testing.assert_array_equal(actual, expected)
        for features, tokens in zip(batch.features.numpy()[batch.image_index], batch.tokens.numpy(), strict=True):
            colour = COLOURS[int(features[10, :300:100].argmax())]
            noun = NOUNS[int(features[20, 1000:1400:100].argmax())]
            text = tokenizer.decode(tokens)
            assert f"{colour} {noun}" in text, "a caption was paired with another image's features"
            texts.append(text)
    assert sorted(texts) == sorted(caption for example in dataset.split("train") for caption in example.captions)


def test_choose_shapes_pads_little():
    captions = make_captions(1003)
    batches = make_epoch_batches(captions, 16, 0, 0, group_by_image=False)
    shapes = choose_shapes(captions, batches)
    assert len(shapes.lengths) == 3 and shapes.lengths[-1] == captions.lengths.max()
    longest = np.array([captions.lengths[rows].max() for rows in batches])
    padded = shapes.lengths[np.searchsorted(shapes.lengths, longest)]
    assert longest.sum() <= padded.sum() < 1.3 * longest.sum()
    assert (shapes.num_captions, shapes.num_images) == (16, 16)
    grouped = choose_shapes(captions, make_epoch_batches(captions, 16, 0, 0))
    assert grouped.num_images == 6, "5 for captions of 5 images, cut at both ends, and a margin"
    few = captions._replace(lengths=np.full(1003, 7))
    assert choose_shapes(few, batches).lengths.tolist() == [7]


@pytest.mark.parametrize("num_images", [5, 2])
def test_make_dataset_pads_to_few_shapes(captions, cache, num_images):
    batches = make_epoch_batches(captions, 5, 0, 0)
    fixed = FixedShapes(5, num_images, np.array([4, 11, 12]))
    shapes = set()
    for plain, padded in zip(
        make_dataset(captions, batches, cache.read), make_dataset(captions, batches, cache.read, fixed), strict=True
    ):
        num_captions, length = plain.tokens.shape
        np.testing.assert_array_equal(padded.tokens[:num_captions, :length], plain.tokens)
        np.testing.assert_array_equal(padded.image_index[:num_captions], plain.image_index)
        np.testing.assert_array_equal(padded.features[: len(plain.features)], plain.features)
        np.testing.assert_array_equal(padded.images[: len(plain.features)], plain.images)
        assert np.count_nonzero(padded.tokens) == np.count_nonzero(plain.tokens)
        assert padded.order is None, "its shapes would be others in each batch"
        shapes.add(tuple(tuple(part.shape) for part in padded[:4]))
    assert len(batches[-1]) < 5
    assert shapes == {((count, 64, 2048), (5,), (5, 11), (count,)) for count in (num_images, 5)}


def test_make_dataset_without_features_tells_the_images(captions, cache):
    batches = make_epoch_batches(captions, 5, 0, 0)
    for batch, rows in zip(make_dataset(captions, batches, None), batches, strict=True):
        assert batch.features is None
        np.testing.assert_array_equal(batch.images.numpy()[batch.image_index], captions.image_index[rows])


def test_copy_ahead_puts_the_next_features_on_the_gpu_in_a_thread(captions, cache, monkeypatch):
    dataset = make_dataset(captions, make_epoch_batches(captions, 5, 0, 0), cache.read)
    expected, names, threads, second_copy = list(dataset), [], set(), threading.Event()

    def device(name):
        names.append(name)
        threads.add(threading.current_thread())
        if len(names) == 2:
            second_copy.set()
        return contextlib.nullcontext()

    monkeypatch.setattr(input_pipeline, "has_gpu", lambda: True)
    monkeypatch.setattr(tf, "device", device)
    batches = copy_ahead(dataset, tf.distribute.get_strategy())
    first = next(batches)
    assert second_copy.wait(10), "the next batch is copied while this one is used"
    for actual, batch in zip([first, *batches], expected, strict=True):
        for tensor, other in zip(tf.nest.flatten(actual), tf.nest.flatten(batch), strict=True):
            np.testing.assert_array_equal(tensor, other)
    assert names == ["GPU:0"] * len(expected)
    assert threading.main_thread() not in threads, "a copy waits for what the GPU does"
