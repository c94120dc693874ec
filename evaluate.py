"""Scores captions against what people wrote: BLEU-1 to 4, METEOR, ROUGE-L and CIDEr.

    python evaluate.py                                    # the newest run on its val split
    python evaluate.py --run runs/coco --split test --beam-size 5
    python evaluate.py --results captions.json --annotations captions_val2014.json --split all

The captions are free-running: the model is given its own words, never the true ones. They are written into
the run folder as COCO results, captions_<split>.json, and their scores as metrics_<split>.json. The scores
are computed by pycocoevalcap, the COCO challenge's code. METEOR, and the tokenizer behind the published
scores, need Java.
"""

from common import InputError, quiet, read_json, run_command, say, write_json  # before TensorFlow

import argparse
import contextlib
import io
import shutil
import subprocess
from pathlib import Path
from typing import Any

import features
import tensorflow as tf

import data_utils
import inference
import model
from tokenizer import Tokenizer, split_words

WITHOUT_JAVA = (
    "METEOR is left out and words are split as the vocabulary's, since METEOR and the PTB tokenizer of published "
    "scores need Java (Debian, Ubuntu, Colab: apt-get install default-jre-headless)"
)


class JavaError(Exception):
    """pycocoevalcap's Java programs cannot run here."""


def has_java() -> bool:
    """Whether there is a Java that runs; macOS has a `java` that only says where to get one."""
    return bool(shutil.which("java")) and subprocess.run(["java", "-version"], capture_output=True).returncode == 0


def caption_examples(
    captioner: model.Captioner,
    words: Tokenizer,
    cache: features.FeatureCache,
    examples: list[data_utils.Example],
    batch_size: int = 64,
    beam_size: int = 1,
    length_penalty: float = inference.LENGTH_PENALTY,
) -> list[inference.Caption]:
    """Captions pictures from their cached features; see `inference.caption_features`."""
    paths = [str(cache.path(example.image)) for example in examples]
    batches = (
        tf.data.Dataset.from_tensor_slices(paths)
        .map(cache.read, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(batch_size)
        .prefetch(tf.data.AUTOTUNE)
    )
    return [
        caption
        for batch in batches
        for caption in inference.caption_features(captioner, words, batch, beam_size, length_penalty)
    ]


def tokenize(texts: dict[int, list[str]], java: bool) -> dict[int, list[str]]:
    """Splits the captions of every picture into words, and joins those with spaces, for pycocoevalcap.

    Raises:
        JavaError: the PTB tokenizer failed.
    """
    if not java:
        return {i: [" ".join(split_words(text)) for text in rows] for i, rows in texts.items()}
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    try:
        with quiet():
            found = PTBTokenizer().tokenize({i: [{"caption": text} for text in rows] for i, rows in texts.items()})
    except OSError as error:  # it writes beside its own code
        raise JavaError(str(error)) from None
    if {i: len(rows) for i, rows in found.items()} != {i: len(rows) for i, rows in texts.items()}:
        raise JavaError("the PTB tokenizer stopped")
    return found


def meteor(references: dict[int, list[str]], captions: dict[int, list[str]]) -> float:
    """METEOR of captions split by `tokenize`.

    Raises:
        JavaError: its Java program failed.
    """
    from pycocoevalcap.meteor import meteor

    program = meteor.Meteor()
    try:
        return program.compute_score(references, captions)[0]
    except (OSError, ValueError):
        program.lock.release()  # left locked by a failure, and locked again, for ever, when the object is deleted
        folder = Path(meteor.__file__).parent
        space = f", which cannot run in a folder with a space in its path: {folder}" * (" " in str(folder))
        raise JavaError("METEOR stopped" + (space or "; it needs 2 GB of memory")) from None


def score(references: list[list[str]], captions: list[str], java: bool) -> dict[str, float]:
    """Scores captions, each against its references, with pycocoevalcap.

    Args:
        references: for each picture, what people wrote.
        captions: one for each picture.
        java: whether to use what needs Java, the PTB tokenizer and METEOR. Otherwise both sides are split as the
            vocabulary is, which is quick and the same on every machine, and METEOR is left out.

    Returns:
        Scores in percent by name: BLEU-1 to BLEU-4, METEOR, ROUGE-L, CIDEr.

    Raises:
        JavaError: see `tokenize` and `meteor`.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    gts = tokenize(dict(enumerate(references)), java)
    res = tokenize({i: [text] for i, text in enumerate(captions)}, java)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocoevalcap prints its counts
        bleu = Bleu(4).compute_score(gts, res, verbose=0)[0]
        scores = {f"BLEU-{n}": value for n, value in enumerate(bleu, 1)}
        if java:
            scores["METEOR"] = meteor(gts, res)
        scores["ROUGE-L"] = Rouge().compute_score(gts, res)[0]
        scores["CIDEr"] = Cider().compute_score(gts, res)[0]
    return {name: round(100 * float(value), 2) for name, value in scores.items()}


def score_anywhere(references: list[list[str]], captions: list[str]) -> tuple[dict[str, float], str]:
    """`score` with Java where it runs, else without it, saying so; and the name of the tokenizer, PTB or plain."""
    reason = "there is none"
    if has_java():
        try:
            return score(references, captions, java=True), "PTB"
        except JavaError as error:
            reason = str(error)
    say(f"{WITHOUT_JAVA}: {reason}")
    return score(references, captions, java=False), "plain"


def distinct(texts: list[str]) -> float:
    """The share of captions that differ, in percent."""
    return round(100 * len(set(texts)) / len(texts), 1)


def never_ended(captions: list[inference.Caption]) -> float:
    """The share of captions that never ended, in percent."""
    return round(100 * sum(not caption.ended for caption in captions) / len(captions), 1)


def read_results(path: Path) -> dict[int | str, str]:
    """The captions of a COCO results file by image id.

    Raises:
        InputError: not such a file, or two captions of one picture.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("caption"), str) and type(row.get("image_id")) in (int, str)
        for row in rows
    ):
        raise InputError(f'{path}: not COCO results; expected a list of {{"image_id": ..., "caption": "..."}}')
    results = {}
    for row in rows:
        if row["image_id"] in results:
            raise InputError(f"{path}: expected one caption for each picture, found two of image_id {row['image_id']}")
        results[row["image_id"]] = row["caption"]
    return results


def pictures_of(dataset: data_utils.Dataset, split: str) -> list[data_utils.Example]:
    """The pictures of a split, or all of them."""
    return list(dataset.examples) if split == "all" else dataset.split(split)


def score_file(path: Path, examples: list[data_utils.Example]) -> dict[str, Any]:
    """Scores a COCO results file against these pictures' captions.

    Raises:
        InputError: see `read_results`; or a picture has no caption.
    """
    results = read_results(path)
    if missing := [example for example in examples if example.image_id not in results]:
        raise InputError(
            f"{path}: no caption of {len(missing):,} of the {len(examples):,} pictures, the first with image_id "
            f"{missing[0].image_id} ({missing[0].image}); are they of this --split?"
        )
    if more := len(results) - len(examples):
        say(f"{path}: {more:,} captions of other pictures are left out")
    texts = [results[example.image_id] for example in examples]
    scores, tokenizer = score_anywhere([list(example.captions) for example in examples], texts)
    return {"results": str(path), "tokenizer": tokenizer, "scores": scores, "distinct captions": distinct(texts)}


def score_run(
    captioning: inference.Captioning, examples: list[data_utils.Example], split: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Captions and scores pictures whose features are cached: the metrics, and the captions as COCO results.

    Raises:
        InputError: features are missing.
    """
    cache = features.cache_of(captioning.config["features"])
    if missing := cache.missing([example.image for example in examples]):
        raise InputError(
            f"{cache.folder}: no features of {len(missing):,} pictures (the first: {missing[0]}); run features.py "
            "with the data options of the run"
        )
    search = {"beam_size": captioning.beam_size, "length_penalty": captioning.length_penalty}
    captions = caption_examples(captioning.captioner, captioning.words, cache, examples, **search)
    texts = [caption.text for caption in captions]
    scores, tokenizer = score_anywhere([list(example.captions) for example in examples], texts)
    metrics = {"run": str(captioning.run), "split": split} | search | {"tokenizer": tokenizer, "scores": scores}
    metrics |= {"distinct captions": distinct(texts), "never ended": never_ended(captions)}
    return metrics, [{"image_id": e.image_id, "caption": text} for e, text in zip(examples, texts, strict=True)]


def main(argv: list[str] | None = None) -> None:
    """Captions and scores a split of a run's data, or scores a results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inference.add_arguments(parser)
    parser.add_argument(
        "--split", choices=(*data_utils.SPLITS, "all"), default="val", help="pictures to score (default: %(default)s)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="score these captions, COCO results made elsewhere, against the data of the run or those named below; "
        "writes <FILE>_metrics.json",
    )
    data_utils.add_arguments(parser)
    parser.set_defaults(dataset=None)
    args = parser.parse_args(argv)
    named = args.dataset or args.annotations
    if named and not args.results:
        raise InputError("a run is scored on its own data; --dataset and --annotations go with --results FILE")
    if named:
        args.dataset = args.dataset or data_utils.DataOptions().dataset
        dataset = data_utils.load_dataset(data_utils.options_from(args), pictures=False)
    else:
        run = args.run or inference.newest_run()
        if args.results:
            dataset = inference.dataset_of(inference.read_config(run))
        else:
            captioning = inference.Captioning.load(run, args.beam_size, args.length_penalty)
            dataset = inference.dataset_of(captioning.config)
    examples = pictures_of(dataset, args.split)
    if args.results:
        metrics = score_file(args.results, examples)
        write_json(args.results.with_name(f"{args.results.stem}_metrics.json"), metrics)
        name = str(args.results)
    else:
        metrics, results = score_run(captioning, examples, args.split)
        suffix = args.split + f"_beam{args.beam_size}" * (args.beam_size > 1)
        write_json(captioning.run / f"captions_{suffix}.json", results)
        write_json(captioning.run / f"metrics_{suffix}.json", metrics)
        name = f"{captioning.run}, {args.split}"
    print(f"{name}: {len(examples):,} pictures")
    for key, value in {**metrics["scores"], **metrics}.items():
        if key in (*metrics["scores"], "distinct captions", "never ended"):
            print(f"{key:18} {value:6.1f}")


if __name__ == "__main__":
    run_command(main)
