"""The vocabulary, against Keras's tokenizer and by hand."""

import random

import pytest

import tokenizer as tokenizer_script
from captioning.base.cli import InputError
from tokenizer import END_ID, PAD_ID, SPECIAL_TOKENS, START_ID, UNK_ID, Tokenizer, split_words


@pytest.fixture(scope="module")
def long_tail_captions():
    """Captions with a long tail of rare words, equal counts, capitals, digits and all of the tutorial's punctuation."""
    word_rng = random.Random(7)
    words = [f"{a}{b}{c}" for a in "bdfgklmprst" for b in "aeiou" for c in ("n", "s", "ld", "'s", "-x", "ing")]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    ends = [".", " .", "!", "?", ' "', ";", " (two)", " & co", ", 3 of them", " A", ""]
    captions = []
    for _ in range(2000):
        text = " ".join(word_rng.choices(words, weights, k=word_rng.randint(1, 14))).capitalize()
        captions.append(text + word_rng.choice(ends))
    return captions


@pytest.mark.parametrize("vocab_size", [20, 200, 5000])
def test_fit_keeps_the_words_that_keras_keeps(long_tail_captions, vocab_size):
    import tensorflow as tf

    filters = '!"#$%&()*+.,-/:;=?@[\\]^_`{|}~ '  # as the tutorial gives them
    keras = tf.keras.preprocessing.text.Tokenizer(num_words=vocab_size, oov_token="<unk>", filters=filters)
    keras.fit_on_texts(f"<start> {caption} <end>" for caption in long_tail_captions)
    expected = {word for word, index in keras.word_index.items() if index < vocab_size} | {"<pad>"}
    tokenizer = Tokenizer.fit(long_tail_captions, vocab_size)
    assert set(tokenizer.index_word) == expected, "the tutorial would have kept other words"
    if vocab_size == 200:  # the words of a caption, and which of them are unknown, agree as well
        for caption in long_tail_captions[:50]:
            sequences = keras.texts_to_sequences([f"<start> {caption} <end>"])
            expected_words = keras.sequences_to_texts(sequences)[0].split()
            assert [tokenizer.index_word[index] for index in tokenizer.encode(caption)] == expected_words


def test_fit_counts_the_special_tokens():
    assert (PAD_ID, UNK_ID, START_ID, END_ID) == (0, 1, 2, 3)
    tokenizer = Tokenizer.fit(["c b b a a"], vocab_size=6)
    assert len(tokenizer) == 6
    assert tokenizer.index_word == (*SPECIAL_TOKENS, "b", "a"), "of equals the first one stays"


def test_split_words_filters_punctuation():
    assert split_words('  A "man\'s" dog, <running>-fast!') == ["a", "man's", "dog", "<running>", "fast"]


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        (
            "A man\u2019s dog \u2014 don&#39;t &amp; a \u201cstop\u201d\u2026",
            ["a", "man's", "dog", "don't", "a", "stop"],
        ),
        (
            "\u201eEin Hund\u201c l\u00e4uft \u00bfque? \u300c\u72d7\u300d\u3002\u732b",
            ["ein", "hund", "läuft", "que", "狗", "猫"],
        ),
        ("the dog\u200b runs \u00b7 5\u20ac \U0001f34e", ["the", "dog", "runs", "5€", "🍎"]),
        ("STRASSE Stra\u00dfe", ["strasse", "straße"]),
        ("\u0130ki KOŞUYOR I\u0307ki ISTANBUL", ["iki", "koşuyor", "iki", "istanbul"]),
        ("می\u200cرود و\u200c", ["می\u200cرود", "و"]),
        ("A\u0007 d\u0000og\u001b \u007fru\u0081ns", ["a", "dog", "runs"]),
        ("plain\u0007 d\u0000og\u001b\u007f\u001fruns\tfast", ["plain", "dog", "runs", "fast"]),
    ],
)
def test_split_words_of_typographic_text(caption, words):
    assert split_words(caption) == words
    assert split_words(" ".join(words)) == words


def test_split_words_of_characters():
    assert split_words("一只狗。iPhone手机", "characters") == ["一", "只", "狗", "iphone", "手", "机"]
    assert split_words("一只狗。iPhone手机") == ["一只狗", "iphone手机"]
    assert split_words("A man's dog", "characters") == ["a", "man's", "dog"]


def test_encode_and_decode():
    tokenizer = Tokenizer.fit(["A dog, a dog!", "a man's cat"])
    word_index = tokenizer.word_index
    ids = tokenizer.encode("A  man's zebra.")
    assert ids == [START_ID, word_index["a"], word_index["man's"], UNK_ID, END_ID]
    assert tokenizer.decode([*ids, word_index["dog"], PAD_ID]) == "a man's <unk>", "decoding must stop at <end>"


def test_encode_treats_special_tokens_in_a_caption_as_unknown():
    tokenizer = Tokenizer.fit(["the <end> is <start> near <pad>"])
    assert END_ID not in tokenizer.encode("the <end> is near")[1:-1]
    assert not set(SPECIAL_TOKENS) & tokenizer.word_index.keys()


def test_tokenizer_of_characters():
    tokenizer = Tokenizer.fit(["一只狗", "一只 iPhone"], words="characters")
    assert tokenizer.index_word == (*SPECIAL_TOKENS, "一", "只", "狗", "iphone")
    ids = tokenizer.encode("狗一只。Iphone猫")
    assert ids == [START_ID, 6, 4, 5, 7, UNK_ID, END_ID]
    assert tokenizer.decode(ids) == "狗一只 iphone <unk>"
    assert Tokenizer(tokenizer.index_word).decode(ids) == "狗 一 只 iphone <unk>", "words of a segmented text"


def test_save_and_load(tmp_path):
    tokenizer = Tokenizer.fit(["ein Äpfel 🍎 dog"])
    tokenizer.save(tmp_path / "v.json")
    loaded = Tokenizer.load(tmp_path / "v.json")
    assert (loaded.index_word, loaded.words) == (tokenizer.index_word, "spaces")
    assert Tokenizer.load(tmp_path / "v.json", "characters").decode([START_ID, 4]) == "ein"
    assert Tokenizer.load(tmp_path / "v.json", "characters").words == "characters"


@pytest.mark.parametrize(
    "content", ["{}", "[1, 2]", '["a", "b"]', '["<pad>", "<unk>", "<start>", "<end>", "a", "a"]', "["]
)
def test_load_refuses_damaged_vocabularies(tmp_path, content):
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(InputError, match=r"v\.json"):
        Tokenizer.load(tmp_path / "v.json")


def test_main_replaces_only_a_vocabulary(tmp_path):
    captions, path = tmp_path / "captions.txt", tmp_path / "vocabulary.json"
    captions.write_text("a dog")
    tokenizer_script.main([str(captions), "--output", str(path)])
    tokenizer_script.main([str(captions), "--output", str(path)])
    with pytest.raises(InputError, match=r"--output \S+captions\.txt: expected a new file, or an earlier one"):
        tokenizer_script.main([str(captions), "--output", str(captions)])
    assert captions.read_text() == "a dog"


def test_main_prints_or_saves_the_vocabulary(tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("a dog\na cat\na dog\n")
    arguments = [str(tmp_path / "captions.txt"), "--vocab-size", "6"]
    tokenizer_script.main(arguments)
    assert capsys.readouterr().out.split() == [*SPECIAL_TOKENS, "a", "dog"]
    tokenizer_script.main([*arguments, "--output", str(tmp_path / "v.json")])
    assert capsys.readouterr().out == ""
    assert Tokenizer.load(tmp_path / "v.json").index_word == (*SPECIAL_TOKENS, "a", "dog")
    (tmp_path / "captions.txt").write_bytes("\ufeff一只狗\n".encode())
    tokenizer_script.main([str(tmp_path / "captions.txt"), "--words", "characters"])
    assert capsys.readouterr().out.split() == [*SPECIAL_TOKENS, "一", "只", "狗"]
    with pytest.raises(InputError, match=r"none\.txt: expected a text file"):
        tokenizer_script.main([str(tmp_path / "none.txt")])
