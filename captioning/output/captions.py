"""A generated caption: its words, where the model attended for each, and how probable it is."""

import dataclasses
import html
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from beyond.report.report import notebook_html
from captioning.base.cli import InputError
from captioning.base.special_tokens import END_ID, PAD_ID
from captioning.decoder.decoding import DecodedBatch
from captioning.images.reading import ImageSource, read_image
from captioning.output.plots import thumbnail

SMALLEST_PROBABILITY = 1e-45  # of float32 above 0, which a probability that is too small for it counts as


class Vocabulary(Protocol):
    """What is needed of a tokenizer."""

    @property
    def index_word(self) -> Sequence[str]:
        """The word of each id."""

    def join(self, words: Iterable[str]) -> str:
        """Joins words to a text."""


@dataclasses.dataclass(frozen=True)
class Caption:
    """A generated caption of T words, without <start> and <end>.

    Probabilities are the model's own, each given the words before it, also if the caption was drawn at random or may
    not repeat words. A notebook shows the caption below its image, and where the model attended for each word.
    """

    text: str  # the words in one line, as the tokenizer joins them
    words: tuple[str, ...]
    probabilities: tuple[float, ...]  # of each word
    attention: np.ndarray  # (T, L), the attention weights of each word, which sum to 1
    end_probability: float | None = None  # of <end> after the last word; None if the caption was cut before it
    alternatives: tuple["Caption", ...] = ()  # the further captions of the image that were asked for, best first
    image: ImageSource | None = dataclasses.field(default=None, repr=False, compare=False)  # what was captioned
    gates: tuple[float, ...] | None = None  # of each word, the gate of its context vector; None if the decoder has none

    @property
    def finished(self) -> bool:
        """Whether the model predicted <end>; otherwise the caption is cut."""
        return self.end_probability is not None

    @property
    def log_prob(self) -> float:
        """The natural logarithm of the caption's probability: the sum over its words, and <end> if it has one."""
        return sum(math.log(max(p, SMALLEST_PROBABILITY)) for p in self._token_probabilities)

    @property
    def mean_log_prob(self) -> float:
        """`log_prob` divided by the number of words, <end> included: it can be compared between lengths."""
        return self.log_prob / max(1, len(self._token_probabilities))

    @property
    def confidence(self) -> float:
        """exp(`mean_log_prob`): the geometric mean of the words' probabilities, from 0 to 1."""
        return math.exp(self.mean_log_prob)

    @property
    def _token_probabilities(self) -> tuple[float, ...]:
        return self.probabilities if self.end_probability is None else (*self.probabilities, self.end_probability)

    def to_json(self, with_attention: bool = False) -> dict[str, Any]:
        """Returns the caption as an object for JSON.

        Args:
            with_attention: whether each word has its attention weights, a list of L numbers, row after row.

        Returns:
            The fields `caption`, `confidence`, `log_prob`, `finished` and `words`, a list with the `word` and the
            `probability` of each, its `gate` if the decoder has one, and its `attention`; and `alternatives`, a list of
            such objects, if there are any.
        """
        words: list[dict[str, Any]] = [
            {"word": word, "probability": round(probability, 4)}
            for word, probability in zip(self.words, self.probabilities, strict=True)
        ]
        for word, gate in zip(words, self.gates or (), strict=False):
            word["gate"] = round(gate, 4)
        if with_attention:
            for word, weights in zip(words, self.attention, strict=True):
                word["attention"] = [round(weight, 4) for weight in weights.tolist()]
        result = {
            "caption": self.text,
            "confidence": round(self.confidence, 4),
            "log_prob": round(self.log_prob, 3),
            "finished": self.finished,
            "words": words,
        }
        if self.alternatives:
            result["alternatives"] = [caption.to_json(with_attention) for caption in self.alternatives]
        return result

    def _repr_html_(self) -> str:
        """Returns what a notebook shows: the text alone if the image is not known, or is gone."""
        try:
            image = None if self.image is None else thumbnail(read_image(self.image))
        except InputError:
            image = None
        if image is None:
            return f"<p>{html.escape(self.text)}</p>"
        return notebook_html(image, self.to_json(with_attention=True))


def to_captions(decoded: DecodedBatch, vocabulary: Vocabulary, num_captions: int = 1) -> list[Caption]:
    """Converts the ids that decoding returned to words, up to <end>.

    Args:
        decoded: `num_captions` rows for each image, best first. A row that begins with <pad> holds no caption.
        vocabulary: the tokenizer.
        num_captions: more than 1 makes the others the `alternatives` of the first.

    Returns:
        A caption of each image.
    """
    captions: list[Caption | None] = []
    gates = None if decoded.gates is None else decoded.gates.numpy()  # (R, T)
    for row, (ids, probabilities, attention) in enumerate(zip(*(x.numpy() for x in decoded[:3]), strict=True)):
        ends = np.flatnonzero(ids == END_ID)
        length = ends[0] if len(ends) else len(ids)
        words = tuple(vocabulary.index_word[i] for i in ids[:length])
        end_probability = float(probabilities[length]) if len(ends) else None
        caption = Caption(
            vocabulary.join(words),
            words,
            tuple(probabilities[:length].tolist()),
            attention[:length],
            end_probability,
            gates=None if gates is None else tuple(gates[row, :length].tolist()),
        )
        captions.append(None if ids[0] == PAD_ID else caption)
    groups = (captions[start : start + num_captions] for start in range(0, len(captions), num_captions))
    return [_merge_alternatives([caption for caption in group if caption]) for group in groups]


def _merge_alternatives(captions: list[Caption]) -> Caption:
    """Returns the first caption with the others as its alternatives."""
    return dataclasses.replace(captions[0], alternatives=tuple(captions[1:]))
