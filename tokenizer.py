"""Words to ids and back: the most frequent words of the training captions.

    python tokenizer.py captions.txt                      # the vocabulary of a file with one caption a line
    python tokenizer.py captions.txt --size 1000 --output vocabulary.json

It chooses the words that the tutorial's `tf.keras.preprocessing.text.Tokenizer(num_words=5000,
oov_token="<unk>")` chooses, without TensorFlow, and is saved as JSON, since ids mean nothing without it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from common import InputError, at_least, make_parser, read_json, run_command, write_json

PAD, UNK, START, END = range(4)
SPECIAL = ("<pad>", "<unk>", "<start>", "<end>")
FILTERS = '!"#$%&()*+.,-/:;=?@[\\]^_`{|}~'  # the tutorial's; the apostrophe stays: "man's" is one word
_TO_SPACES = str.maketrans(dict.fromkeys(FILTERS, " "))


def split_words(caption: str) -> list[str]:
    """A caption in lower case, without the filtered characters, as words."""
    return caption.lower().translate(_TO_SPACES).split()


class Tokenizer:
    """A vocabulary: `words[id]` is the word of an id; the first four are <pad>, <unk>, <start> and <end>."""

    def __init__(self, words: Sequence[str]):
        self.words = tuple(words)
        self.ids = {word: index for index, word in enumerate(self.words)}
        for word in SPECIAL:  # a caption that says "<end>" does not end there
            del self.ids[word]

    @classmethod
    def fit(cls, captions: Iterable[str], size: int = 5000) -> "Tokenizer":
        """Keeps the most frequent words, the first seen of equals; `size` counts the special ones, as Keras does."""
        counts = Counter(word for caption in captions for word in split_words(caption))
        for word in SPECIAL:
            counts.pop(word, None)
        # most_common sorts stably, and a Counter remembers who came first.
        return cls(SPECIAL + tuple(word for word, _ in counts.most_common(max(0, size - len(SPECIAL)))))

    def __len__(self) -> int:
        """The size of the vocabulary, the special words included."""
        return len(self.words)

    def encode(self, caption: str, max_length: int | None = None) -> list[int]:
        """`<start>`, the caption's words (`<unk>` where not in the vocabulary), `<end>`.

        A longer caption is cut to `max_length` tokens and then has no `<end>`: it does not end there.
        """
        ids = [START, *(self.ids.get(word, UNK) for word in split_words(caption)), END]
        return ids[:max_length]

    def decode(self, ids: Iterable[int]) -> str:
        """The words of ids up to `<end>`, without `<start>` and `<pad>`."""
        words = []
        for index in ids:
            if index == END:
                break
            if index not in (START, PAD):
                words.append(self.words[index])
        return " ".join(words)

    def save(self, path: Path | str) -> None:
        """Writes the words as JSON, in the order of their ids."""
        write_json(path, list(self.words))

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Reads what `save` wrote.

        Raises:
            InputError: the file is missing or is not a vocabulary.
        """
        words = read_json(path)
        is_words = isinstance(words, list) and all(isinstance(word, str) for word in words)
        if not is_words or tuple(words[:4]) != SPECIAL or len(set(words)) != len(words):
            raise InputError(f"{path}: not a vocabulary; expected a JSON list of distinct words that begins {SPECIAL}")
        return cls(words)


def main(argv: list[str] | None = None) -> None:
    """Prints the vocabulary of a text file, one word a line, most frequent first."""
    parser = make_parser(__doc__, "[option ...] captions.txt")
    parser.add_argument("captions", help="text file, one caption a line")
    parser.add_argument(
        "--size",
        type=at_least(5),
        metavar="N",
        default=5000,
        help="words to keep, 4 special ones included (default: 5000)",
    )
    parser.add_argument("--output", metavar="FILE", help="save the vocabulary as JSON instead of printing it")
    args = parser.parse_args(argv)
    try:
        captions = Path(args.captions).read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise InputError(f"{args.captions}: expected a text file in UTF-8, one caption a line ({error})") from None
    tokenizer = Tokenizer.fit(captions, args.size)
    if args.output:
        tokenizer.save(args.output)
    else:
        print("\n".join(tokenizer.words))


if __name__ == "__main__":
    run_command(main)
