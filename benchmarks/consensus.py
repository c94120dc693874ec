"""Measures what `--choose consensus` takes with all of COCO's training images: 82,783 of them, and 414,000 captions.

    python -m benchmarks.consensus
    python -m benchmarks.consensus --images 6000 --captions 30000          # Flickr8k's size

The features are random, and the captions are made of random words, as frequent as Zipf's law has it. Candidates are
captions of the index. The last line is JSON.
"""

import functools
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.memory import make_annotations
from benchmarks.timing import add_counts, items_per_second
from beyond.consensus.chooser import NUM_NEIGHBOURS, ConsensusChooser
from beyond.consensus.index import Index
from captioning.base.cli import make_parser, run_main
from captioning.config.settings import CONSENSUS_BEAM
from captioning.data.annotations import Example
from captioning.output.captions import Caption
from tokenizer import Tokenizer

CHANNELS = 2048
BATCH_SIZES = (1, 32)  # images that are captioned together
ROUNDS = 5


def make_index(num_images: int, num_captions: int) -> tuple[Index, Tokenizer]:
    """Makes the index of random vectors and captions."""
    rng = np.random.default_rng(0)
    annotations = make_annotations([f"{i:012}.jpg" for i in range(num_images)], num_captions, rng)
    captions: list[list[str]] = [[] for _ in range(num_images)]
    for annotation in annotations["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    examples = [Example(f"{i:012}.jpg", tuple(texts), i, "train") for i, texts in enumerate(captions)]
    tokenizer = Tokenizer.fit(text for texts in captions for text in texts)
    return Index.build(examples, rng.random((num_images, CHANNELS), np.float32), tokenizer, {}), tokenizer


def draw_candidates(index: Index, tokenizer: Tokenizer, count: int) -> list[Caption]:
    """Makes as many captions of an image as a beam has, of words of the index; `count` images."""
    rng = np.random.default_rng(1)
    captions = []
    for _ in range(count):
        texts = [tokenizer.decode(index.captions(i)[0]) for i in rng.integers(0, len(index.names), CONSENSUS_BEAM)]
        words = [tuple(word for word in text.split() if word != "<unk>") for text in texts]
        first, *others = (Caption(" ".join(w), w, (1.0,) * len(w), np.zeros((len(w), 64)), 1.0) for w in words)
        captions.append(Caption(first.text, first.words, first.probabilities, first.attention, 1.0, tuple(others)))
    return captions


def median_milliseconds(run: Callable[[], object]) -> float:
    """Calls a function several times, and returns the median of its time."""
    return round(1000 * statistics.median(1 / items_per_second(run, 1) for _ in range(ROUNDS)), 1)


def measure(folder: Path, num_images: int, num_captions: int) -> dict[str, float]:
    """Builds, writes, reads and uses an index."""
    path = folder / "consensus.npz"
    made, tokenizer = make_index(num_images, num_captions)
    made.save(path)
    del made
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start = time.perf_counter()
    index = Index.load(path)
    result = {
        "peak_gib_to_build": round(peak, 2),
        "seconds_to_load": round(time.perf_counter() - start, 2),
        "megabytes": round(path.stat().st_size / 1e6),
    }
    arrays = (index.vectors, index.words, index.caption_starts, index.image_starts, *index.frequencies[1:])
    result["megabytes_in_memory"] = round(sum(array.nbytes for array in arrays) / 1e6)
    chooser, rng = ConsensusChooser(index, tokenizer), np.random.default_rng(2)
    for batch_size in BATCH_SIZES:
        candidates = draw_candidates(index, tokenizer, batch_size)
        features = rng.random((batch_size, 64, CHANNELS), np.float32)
        search = functools.partial(index.nearest, features.mean(axis=1), NUM_NEIGHBOURS)
        result[f"milliseconds_of_search_batch_{batch_size}"] = median_milliseconds(search)
        choose = functools.partial(chooser.choose, candidates, features)
        result[f"milliseconds_batch_{batch_size}"] = median_milliseconds(choose)
    return result


def main(argv: list[str] | None = None) -> None:
    """Measures an index of the size of the command line."""
    parser = make_parser(__doc__)
    add_counts(parser, {"images": (82_783, "make so many images"), "captions": (414_000, "make so many captions")})
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args.images, args.captions)
    print(json.dumps({"images": args.images, "captions": args.captions, **result}))


if __name__ == "__main__":
    run_main(main)
