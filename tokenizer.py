"""Turns words into ids and back: a vocabulary of the most frequent words of the training captions.

Tutorial section: "Preprocess and tokenize the captions".

    python tokenizer.py captions.txt                                              # print a file's vocabulary
    python tokenizer.py captions.txt --vocab-size 1000 --output vocabulary.json   # save a smaller one
    python tokenizer.py captions.txt --words characters                           # Chinese, Japanese, Thai, ...

It keeps the words that the tutorial's tf.keras.preprocessing.text.Tokenizer(num_words=5000, oov_token="<unk>")
keeps, without TensorFlow. The vocabulary is saved as JSON with every run, since ids mean nothing without it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from captioning.base.cli import InputError, int_at_least, make_parser, print_results, run_main
from captioning.base.files import check_output, read_json, write_json
from captioning.base.special_tokens import END_ID, PAD_ID, SPECIAL_TOKENS, START_ID, UNK_ID
from captioning.base.text import join_words, normalize_text, punctuation_to_spaces, split_characters
from captioning.config.options import add_options
from captioning.config.settings import DataConfig

FILTERS = '!"#$%&()*+.,-/:;=?@[\\]^_`{|}~'  # the tutorial's; the apostrophe stays, so "man's" is one word
_TO_SPACES = str.maketrans(dict.fromkeys(FILTERS, " "))


def split_words(caption: str, words: str = "spaces") -> list[str]:
    """Splits a caption into words, in lower case and without punctuation: `FILTERS`, and that of other scripts.

    Args:
        caption: the text, which is brought to one form first (`captioning.base.text.normalize_text`).
        words: what a word is. `spaces`: what stands between spaces; `characters`: the same, but of scripts without
            spaces every character.
    """
    # Plain ASCII has this form already, and most captions are that.
    if not (caption.isascii() and caption.isprintable()) or "&" in caption:
        # The small letter of the Turkish İ is an i with a second dot to Python, and would make a word of its own. I
        # becomes i in all languages, not ı: which language a caption has is not known, and most have no ı.
        caption = punctuation_to_spaces(normalize_text(caption)).lower().replace("i\u0307", "i")
    # As Keras's tokenizer does: lower case, a space for each sign of FILTERS, and what is then between spaces.
    parts = caption.lower().translate(_TO_SPACES).split()
    if words == "spaces":
        return parts
    return [character for part in parts for character in split_characters(part)]


class Tokenizer:
    """A vocabulary: `index_word[id]` is the word of an id, and `word_index[word]` the id of a word.

    The first four ids are the special tokens. They are not in `word_index`: a caption that contains "<end>" does not
    end there. `words` is what a word is, see `split_words`.
    """

    def __init__(self, index_word: Sequence[str], words: str = "spaces"):
        self.index_word = tuple(index_word)
        self.words = words
        self.word_index = {word: index for index, word in enumerate(self.index_word)}
        # <pad> fills short captions of a batch, <unk> stands for a rare word, <start> and <end> enclose a caption.
        # The tutorial writes the last two into the text; here only `encode` adds them, as ids.
        for token in SPECIAL_TOKENS:
            del self.word_index[token]

    @classmethod
    def fit(cls, captions: Iterable[str], vocab_size: int = 5000, words: str = "spaces") -> "Tokenizer":
        """Makes a vocabulary of the most frequent words; of equally frequent ones the first in the captions wins.

        Args:
            captions: the texts.
            vocab_size: the number of words to keep, the special tokens included, as Keras counts it.
            words: what a word is, see `split_words`.
        """
        counts = Counter(word for caption in captions for word in split_words(caption, words))
        for token in SPECIAL_TOKENS:
            counts.pop(token, None)
        # The model learns a vector and an output for each word, too little for one that occurs a few times in all.
        # So only the most frequent words are kept: 5,000, the tutorial's `top_k`, of many thousands in COCO.
        # most_common sorts stably, and a Counter keeps the order in which its keys came.
        most_common = counts.most_common(max(0, vocab_size - len(SPECIAL_TOKENS)))
        return cls(SPECIAL_TOKENS + tuple(word for word, _ in most_common), words)

    def __len__(self) -> int:
        """Returns the size of the vocabulary, the special tokens included."""
        return len(self.index_word)

    def encode(self, caption: str) -> list[int]:
        """Returns the ids of `<start>`, the caption's words and `<end>`; words not in the vocabulary are `<unk>`."""
        # "A dog runs" -> [2, 4, 57, 130, 3], which is <start>, "a", "dog", "runs", <end>. The more frequent a word,
        # the smaller its id. Captions of a batch are padded to one length later, in the input pipeline.
        word_ids = [self.word_index.get(word, UNK_ID) for word in split_words(caption, self.words)]
        return [START_ID, *word_ids, END_ID]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the words of ids up to `<end>`, without `<start>` and `<pad>`, as a text."""
        words = []
        for index in ids:
            if index == END_ID:  # what follows is padding, or what a model generates beyond its caption
                break
            if index not in (START_ID, PAD_ID):
                words.append(self.index_word[index])
        return self.join(words)

    def join(self, words: Iterable[str]) -> str:
        """Joins words to a text: with spaces, but not between characters that are written without."""
        return join_words(words) if self.words == "characters" else " ".join(words)

    def save(self, path: Path | str) -> None:
        """Writes the words as a JSON list, in the order of their ids."""
        write_json(path, list(self.index_word))

    @classmethod
    def load(cls, path: Path | str, words: str = "spaces") -> "Tokenizer":
        """Reads what `save` wrote; `words` is what a word was, see `split_words`: the file does not say it.

        Raises:
            InputError: the file is missing or is not a vocabulary.
        """
        index_word = read_json(path)
        is_list_of_str = isinstance(index_word, list) and all(isinstance(word, str) for word in index_word)
        if not is_list_of_str or tuple(index_word[:4]) != SPECIAL_TOKENS or len(set(index_word)) != len(index_word):
            raise InputError(
                f"{path}: not a vocabulary; expected a JSON list of distinct words that begins {SPECIAL_TOKENS}"
            )
        return cls(index_word, words)


def is_vocabulary(path: Path) -> bool:
    """Tells whether a file is a vocabulary."""
    try:
        Tokenizer.load(path)
    except InputError:
        return False
    return True


def main(argv: list[str] | None = None) -> None:
    """Prints the vocabulary of a text file, one word a line, most frequent first."""
    parser = make_parser(__doc__, "[option ...] captions.txt")
    parser.add_argument("captions", help="text file, one caption a line")
    parser.add_argument(
        "--vocab-size",
        type=int_at_least(5),
        metavar="N",
        default=5000,
        help="words to keep, the 4 special tokens included (default: %(default)s)",
    )
    add_options(parser, DataConfig, only=("words",))
    parser.add_argument("--output", metavar="FILE", help="save the vocabulary as JSON instead of printing it")
    args = parser.parse_args(argv)
    if args.output:
        check_output("--output", Path(args.output), is_vocabulary)
    # The vocabulary of a run is made by train.py in the same way, from the training captions alone: words that occur
    # only in the validation or test captions must stay unknown.
    try:
        captions = Path(args.captions).read_text(encoding="utf-8-sig").splitlines()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise InputError(f"{args.captions}: expected a text file in UTF-8, one caption a line ({error})") from None
    tokenizer = Tokenizer.fit(captions, args.vocab_size, args.words)
    if args.output:
        tokenizer.save(args.output)
    else:
        print_results(*tokenizer.index_word, sep="\n")


if __name__ == "__main__":
    run_main(main)
