import random

import pytest

from common import InputError
from tokenizer import END, PAD, SPECIAL, START, UNK, Tokenizer


def many_captions(count=2000):
    """Captions with a long tail of rare words, equal counts, capitals, digits and all of the tutorial's punctuation."""
    dice = random.Random(7)
    names = [f"{a}{b}{c}" for a in "bdfgklmprst" for b in "aeiou" for c in ("n", "s", "ld", "'s", "-x", "ing")]
    weights = [1 / (rank + 1) for rank in range(len(names))]
    ends = [".", " .", "!", "?", ' "', ";", " (two)", " & co", ", 3 of them", " A", ""]
    return [
        " ".join(dice.choices(names, weights, k=dice.randint(1, 14))).capitalize() + dice.choice(ends)
        for _ in range(count)
    ]


@pytest.mark.parametrize("size", [20, 200, 5000])
def test_chooses_the_words_that_keras_chooses(size):
    import tensorflow as tf

    captions = many_captions()
    filters = '!"#$%&()*+.,-/:;=?@[\\]^_`{|}~ '  # as the tutorial gives them
    keras = tf.keras.preprocessing.text.Tokenizer(num_words=size, oov_token="<unk>", filters=filters)
    keras.fit_on_texts(f"<start> {caption} <end>" for caption in captions)
    expected = {word for word, index in keras.word_index.items() if index < size} | {"<pad>"}
    ours = Tokenizer.fit(captions, size)
    assert set(ours.words) == expected, "the tutorial would have kept other words"
    if size == 200:  # the words of a caption, and what of it is unknown, agree as well
        for caption in captions[:50]:
            theirs = keras.sequences_to_texts(keras.texts_to_sequences([f"<start> {caption} <end>"]))[0].split()
            assert [ours.words[i] for i in ours.encode(caption)] == theirs


def test_special_words_have_fixed_ids():
    assert (PAD, UNK, START, END) == (0, 1, 2, 3)
    assert Tokenizer.fit(["a dog"]).words == (*SPECIAL, "a", "dog")


def test_encode_and_decode():
    words = Tokenizer.fit(["A dog, a dog!", "a man's cat"])
    ids = words.encode("A  man's zebra.")
    assert ids == [START, words.ids["a"], words.ids["man's"], UNK, END]
    assert words.decode([*ids, words.ids["dog"], PAD]) == "a man's <unk>", "decoding must stop at <end>"


def test_a_caption_cannot_say_end():
    words = Tokenizer.fit(["the <end> is <start> near <pad>"])
    assert END not in words.encode("the <end> is near")[1:-1]


def test_a_cut_caption_does_not_end():
    words = Tokenizer.fit(["a b c d"])
    assert words.encode("a b c d", max_length=4) == [START, *(words.ids[w] for w in "abc")]


def test_save_and_load(tmp_path):
    words = Tokenizer.fit(["ein Äpfel 🍎 dog"])
    words.save(tmp_path / "v.json")
    assert Tokenizer.load(tmp_path / "v.json").words == words.words


@pytest.mark.parametrize(
    "content", ["{}", "[1, 2]", '["a", "b"]', '["<pad>", "<unk>", "<start>", "<end>", "a", "a"]', "[", ""]
)
def test_damaged_vocabulary_is_refused(tmp_path, content):
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(InputError, match=r"v\.json"):
        Tokenizer.load(tmp_path / "v.json")
