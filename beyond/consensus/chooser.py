"""`--choose consensus`: of the captions of a beam search, the one that agrees best with those of similar images."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

import data_utils
import evaluate
from beyond.consensus.agreement import cider_d
from beyond.consensus.index import INDEX_FILE, Index, build_index, is_current, mean_features, pad, save_index
from captioning.base.cli import InputError, log
from captioning.base.quiet_tensorflow import tf
from captioning.data.datasets import find_source
from captioning.output.captions import Caption, SimilarImage
from inference import Captioner
from tokenizer import Tokenizer

NUM_NEIGHBOURS = 60  # images, as in Mao et al. 2015
# The captions of the last of them count exp(-2) times as much as those of the first. README.md has what was tried.
SHARPNESS = 2.0
FEW_IMAGES = 500  # of which the nearest ones are not alike
NUM_SHOWN = 5  # images that explain a choice


def weigh_images(cosines: np.ndarray) -> np.ndarray:
    """Returns how much the captions of similar images count, from their cosines, the largest first; both (N,).

    The fall is measured by the range of the cosines, which is another for every CNN.
    """
    distances = cosines[0] - cosines
    return np.exp(-SHARPNESS * distances / max(distances[-1], 1e-9))


class ConsensusChooser:
    """Ranks the candidates of each image by their agreement with the captions of the nearest training images."""

    def __init__(self, index: Index, tokenizer: Tokenizer):
        self.index = index
        self.tokenizer = tokenizer

    def choose(self, captions: Sequence[Caption], features: tf.Tensor) -> list[Caption]:
        """Ranks the candidates of B images.

        Args:
            captions: the best candidate of each image, with the others as its alternatives.
            features: (B, L, C), of the images.
        """
        numbers, cosines = self.index.nearest(mean_features(features), NUM_NEIGHBOURS)
        return [self._rank(*one) for one in zip(captions, numbers, cosines, strict=True)]

    def _rank(self, caption: Caption, numbers: np.ndarray, cosines: np.ndarray) -> Caption:
        candidates = [dataclasses.replace(caption, alternatives=()), *caption.alternatives]
        tokens = [np.array([self.tokenizer.word_index[word] for word in each.words], np.int32) for each in candidates]
        by_image = list(map(self.index.captions, numbers))
        references = [ids for captions in by_image for ids in captions]
        agreement = cider_d(pad(tokens), pad(references), self.index.frequencies)  # (K, R)
        weights = np.repeat(weigh_images(cosines), list(map(len, by_image)))  # (R,)
        values = agreement @ weights / weights.sum()  # (K,)
        # A caption that was cut comes after those that have ended; of equal ones the more probable is first.
        order = np.lexsort((-values, [not each.finished for each in candidates]))
        first, *others = (dataclasses.replace(candidates[k], consensus=100 * float(values[k])) for k in order)
        similar = tuple(map(self._describe, numbers[:NUM_SHOWN], cosines))
        return dataclasses.replace(first, alternatives=tuple(others), similar_images=similar)

    def _describe(self, number: int, cosine: float) -> SimilarImage:
        captions = tuple(self.tokenizer.decode(ids) for ids in self.index.captions(number))
        return SimilarImage(self.index.names[number], float(cosine), captions)


def _build(captioner: Captioner, features_dir: str | None = None, **locations: Any) -> Index:
    """Builds the index of a run, without downloading anything."""
    config = captioner.config
    data = dataclasses.replace(config.data, **locations)
    # Named in any case, since without a location an error would advise to name some here.
    locations = {"data_dir": data.data_dir} | locations
    try:
        if missing := find_source(data, with_images=False).find_missing_annotations():
            raise InputError(f"{missing[0].name} is not in {missing[0].folder}")
        dataset = data_utils.load_run_dataset(config, with_images=False, locations=locations)
    except InputError as error:
        command = f"python -m beyond.consensus --run {captioner.run}"
        hint = f"make the index with `{command}`, which takes where they are now (--annotations, --images, ...)"
        raise InputError(f"--choose consensus needs the training images and captions ({error}); {hint}") from None
    return build_index(captioner, dataset, evaluate.open_features(captioner, features_dir))


def make_chooser(captioner: Captioner) -> ConsensusChooser:
    """Makes the chooser of a run, and its index where there is none yet, or one of other data.

    Raises:
        InputError: there is none, and what it is made from is not here.
    """
    path = captioner.run / INDEX_FILE
    index = Index.load(path) if path.exists() else None
    if index and not is_current(index, captioner.config, captioner.locations.get("features_dir")):
        log(f"{path}: made from other images or captions, or for other weights: it is made again")
        index = None
    if index is None:
        index = _build(captioner, **captioner.locations)
        try:
            save_index(index, path)
        except OSError as error:
            log(f"{path} cannot be written ({error.strerror}): the index will be made again")
    if index.words.max(initial=0) >= len(captioner.tokenizer):
        raise InputError(f"{path}: has words that the vocabulary does not have; delete it")
    if len(index.names) < FEW_IMAGES:
        log(f"--choose consensus: only {len(index.names):,} training images, of which hardly one is like a new image")
    return ConsensusChooser(index, captioner.tokenizer)
