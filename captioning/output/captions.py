"""A generated caption: its words, where the model attended for each, and how probable it is."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from captioning.base.special_tokens import END_ID, PAD_ID
from captioning.decoder.decoding import DecodedBatch
from captioning.images.reading import ImageSource
from tokenizer import Tokenizer

SMALLEST_PROBABILITY = 1e-45  # the smallest float32 above 0; a probability that underflowed to 0 counts as this


class SimilarImage(NamedTuple):
    """A training image that is like the one that is captioned."""

    name: str
    cosine: float  # of the angle between their features
    captions: tuple[str, ...]  # that people wrote, of words of the vocabulary


@dataclasses.dataclass(frozen=True, repr=False)
class Caption:
    """A generated caption of T words, without <start> and <end>.

    Probabilities are the model's own, each given the words before it, even if the caption was drawn at random or may
    not repeat words.
    """

    text: str  # the words in one line, as the tokenizer joins them
    words: tuple[str, ...]
    probabilities: tuple[float, ...]  # of each word
    attention: np.ndarray  # (T, L), the attention weights of each word, which sum to 1
    end_probability: float | None = None  # of <end> after the last word; None if the caption was cut before it
    alternatives: tuple["Caption", ...] = ()  # the further captions of the image that were asked for, best first
    image: ImageSource | None = dataclasses.field(default=None, compare=False)  # what was captioned
    consensus: float | None = None  # with captions of similar images, in percent of CIDEr-D, where that chose
    similar_images: tuple[SimilarImage, ...] = ()  # the most similar of them

    def __repr__(self) -> str:
        """Returns what a notebook shows: the text, without the numbers."""
        return f"<Caption {self.text!r}, confidence {self.confidence:.2f}>"

    @property
    def finished(self) -> bool:
        """Whether the model predicted <end>; otherwise the caption is cut."""
        return self.end_probability is not None

    @property
    def log_prob(self) -> float:
        """The natural logarithm of the caption's probability: the sum over its words, and <end> if it has one."""
        return sum(math.log(max(p, SMALLEST_PROBABILITY)) for p in self._token_probabilities)

    @property
    def confidence(self) -> float:
        """The geometric mean of the words' probabilities, <end> included: it can be compared between lengths."""
        return math.exp(self.log_prob / max(1, len(self._token_probabilities)))

    @property
    def _token_probabilities(self) -> tuple[float, ...]:
        return self.probabilities if self.end_probability is None else (*self.probabilities, self.end_probability)

    def to_json(self, with_attention: bool = False) -> dict[str, Any]:
        """Returns the caption as an object for JSON, with its alternatives in a list if there are any.

        With attention each word has its weights, a list of L numbers, row after row.
        """
        words: list[dict[str, Any]] = [
            {"word": word, "probability": round(probability, 4)}
            for word, probability in zip(self.words, self.probabilities, strict=True)
        ]
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
        if self.consensus is not None:
            result["consensus"] = round(self.consensus, 1)
        if self.similar_images:
            result["similar_images"] = [
                {"image": image.name, "cosine": round(image.cosine, 4), "captions": list(image.captions)}
                for image in self.similar_images
            ]
        if self.alternatives:
            result["alternatives"] = [caption.to_json(with_attention) for caption in self.alternatives]
        return result


def to_captions(decoded: DecodedBatch, tokenizer: Tokenizer, num_captions: int = 1) -> list[Caption]:
    """Converts the ids that decoding returned to words, up to <end>; returns a caption of each image.

    Args:
        decoded: `num_captions` rows for each image, best first. A row that begins with <pad> holds no caption.
        tokenizer: the vocabulary.
        num_captions: more than 1 makes the others the `alternatives` of the first.
    """
    tokens = decoded.tokens.numpy()  # (R, T)
    probabilities = decoded.probabilities.numpy()  # (R, T)
    attention = decoded.attention.numpy()  # (R, T, L)
    captions = []
    for start in range(0, len(tokens), num_captions):
        first, *others = (
            _to_caption(tokens[row], probabilities[row], attention[row], tokenizer)
            for row in range(start, start + num_captions)
            if tokens[row, 0] != PAD_ID
        )
        captions.append(dataclasses.replace(first, alternatives=tuple(others)))
    return captions


def _to_caption(ids: np.ndarray, probabilities: np.ndarray, attention: np.ndarray, tokenizer: Tokenizer) -> Caption:
    """Converts the ids (T,) of a caption, their probabilities (T,) and their attention weights (T, L)."""
    ends = np.flatnonzero(ids == END_ID)
    length = ends[0] if len(ends) else len(ids)
    words = tuple(tokenizer.index_word[i] for i in ids[:length])
    return Caption(
        text=tokenizer.join(words),
        words=words,
        probabilities=tuple(probabilities[:length].tolist()),
        attention=attention[:length].copy(),  # a view would keep that of the whole batch in memory
        end_probability=float(probabilities[length]) if len(ends) else None,
    )
