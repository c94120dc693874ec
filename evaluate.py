"""Scores captions against what people wrote: BLEU-1 to 4, METEOR, ROUGE-L and CIDEr.

    python evaluate.py                                    # the newest run on its val split
    python evaluate.py --run runs/coco --split test --beam-size 5
    python evaluate.py --results captions.json --annotations captions_val2014.json

The captions are free-running: the model is given its own words, never the true ones. They are written into
the run folder as COCO results, captions_<split>.json, and their scores as metrics_<split>.json. The scores
are computed by pycocoevalcap, the COCO challenge's code. METEOR, and the tokenizer behind the published
scores, need Java.
"""

from common import (
    InputError,
    add_quiet,
    make_parser,
    quiet,
    read_json,
    run_command,
    say,
    write_json,
)  # before TensorFlow

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
import search
from tokenizer import Tokenizer, split_words

NEED_JAVA = (
    "METEOR and the PTB tokenizer of published scores need Java (Debian, Ubuntu, Colab: "
    "apt-get install default-jre-headless)"
)


class JavaError(Exception):
    """A Java program of pycocoevalcap failed."""


def has_java() -> bool:
    """Whether there is a Java that runs; macOS has a `java` that only says where to get one."""
    return bool(shutil.which("java")) and subprocess.run(["java", "-version"], capture_output=True).returncode == 0


def caption_examples(
    captioner: model.Captioner,
    words: Tokenizer,
    cache: features.FeatureCache,
    examples: list[data_utils.Example],
    batch_size: int = 64,  # captions followed at the same time
    beam_size: int = 1,
    length_penalty: float = search.LENGTH_PENALTY,
) -> list[search.Caption]:
    """Captions pictures from their cached features; see `search.caption_features`."""
    paths = [str(cache.path(example.image)) for example in examples]
    batches = tf.data.Dataset.from_tensor_slices(paths).batch(max(1, batch_size // beam_size))
    return [
        caption
        for batch in features.read_ahead(batches, cache.read)
        for caption in search.caption_features(captioner, words, batch, beam_size, length_penalty)
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
        raise JavaError(f"the PTB tokenizer failed ({error})") from None
    if {i: len(rows) for i, rows in found.items()} != {i: len(rows) for i, rows in texts.items()}:
        raise JavaError("the PTB tokenizer failed")
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
    except BaseException as error:
        program.lock.release()  # which a failure leaves locked, and which `__del__` would wait for, for ever
        with contextlib.suppress(OSError):  # so that `__del__` need not complain that the program is gone
            program.meteor_p.stdin.close()
        if not isinstance(error, (OSError, ValueError)):  # Ctrl-C
            raise
        folder = Path(meteor.__file__).parent
        space = f", as it does in a folder with a space in its path: {folder}" * (" " in str(folder))
        raise JavaError(f"METEOR's Java program failed{space or '; it needs 2 GB of memory'}") from None


def score(references: list[list[str]], captions: list[str], java: bool) -> dict[str, float]:
    """Scores captions, each against its references, with pycocoevalcap.

    Args:
        references: for each picture, what people wrote.
        captions: one for each picture.
        java: whether to use what needs Java, the PTB tokenizer and METEOR. Otherwise both sides are split as the
            vocabulary is, which is quick and the same on every machine, and METEOR is left out.

    Returns:
        Scores in percent by name: BLEU-1 to BLEU-4, METEOR, ROUGE-L, CIDEr. If METEOR's program fails, that is
        said, and METEOR left out.

    Raises:
        JavaError: see `tokenize`.
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
            try:
                scores["METEOR"] = meteor(gts, res)
            except JavaError as error:
                say(f"no METEOR: {error}; {NEED_JAVA}")
        scores["ROUGE-L"] = Rouge().compute_score(gts, res)[0]
        scores["CIDEr"] = Cider().compute_score(gts, res)[0]
    return {name: round(100 * float(value), 2) for name, value in scores.items()}


def score_anywhere(references: list[list[str]], captions: list[str]) -> tuple[dict[str, float], str]:
    """All scores that can be had here, saying which cannot; and the tokenizer's name, PTB or plain."""
    reason = "there is no Java"
    if has_java():
        try:
            return score(references, captions, java=True), "PTB"
        except JavaError as error:
            reason = str(error)
    say(f"no METEOR, and words split as the vocabulary's: {reason}; {NEED_JAVA}")
    return score(references, captions, java=False), "plain"


def distinct(texts: list[str]) -> float:
    """The share of captions that differ, in percent."""
    return round(100 * len(set(texts)) / len(texts), 1)


def never_ended(captions: list[search.Caption]) -> float:
    """The share of captions that never ended, in percent."""
    return round(100 * sum(not caption.ended for caption in captions) / len(captions), 1)


def read_results(path: Path) -> dict[str, str]:
    """The captions of a COCO results file by image id, as text.

    Raises:
        InputError: not such a file, or two captions of one picture.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("caption"), str) and type(row.get("image_id")) in (int, str)
        for row in rows
    ):
        raise InputError(f'{path}: not COCO results; expected a list of {{"image_id": ..., "caption": "..."}}')
    results: dict[str, str] = {}
    for row in rows:
        number, caption = str(row["image_id"]), " ".join(row["caption"].split())  # one line, as the tokenizer needs
        if number in results:
            raise InputError(f"{path}: expected one caption for each picture, found two of image_id {number}")
        try:
            caption.encode()
        except UnicodeEncodeError:  # JSON can write half of a character
            raise InputError(f"{path}: the caption of image_id {number} is not Unicode text: {caption!r}") from None
        results[number] = caption
    return results


def score_file(path: Path, examples: list[data_utils.Example]) -> dict[str, Any]:
    """Scores a COCO results file against these pictures' captions.

    Raises:
        InputError: see `read_results`; or a picture has no caption.
    """
    results = read_results(path)
    if missing := [example for example in examples if str(example.image_id) not in results]:
        raise InputError(
            f"{path}: no caption of {len(missing):,} of the {len(examples):,} pictures, the first with image_id "
            f"{missing[0].image_id} ({missing[0].image}); are they of this --split?"
        )
    if more := len(results) - len(examples):
        say(f"{path}: {more:,} captions of other pictures are left out")
    texts = [results[str(example.image_id)] for example in examples]
    scores, tokenizer = score_anywhere([list(example.captions) for example in examples], texts)
    return {"results": str(path), "tokenizer": tokenizer, "scores": scores, "distinct captions": distinct(texts)}


def score_run(
    captioning: inference.Captioning, examples: list[data_utils.Example]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Captions and scores pictures whose features are cached: the metrics, and the captions as COCO results.

    Raises:
        InputError: features are missing.
    """
    cache = features.cache_of(captioning.config["features"])
    if missing := cache.missing([example.image for example in examples]):
        raise InputError(
            f"{cache.folder}: no whole features of {len(missing):,} pictures (the first: {cache.path(missing[0])}); "
            "run features.py with the data options of the run"
        )
    settings: dict[str, Any] = {"beam_size": captioning.beam_size, "length_penalty": captioning.length_penalty}
    captions = caption_examples(captioning.captioner, captioning.words, cache, examples, **settings)
    texts = [caption.text for caption in captions]
    scores, tokenizer = score_anywhere([list(example.captions) for example in examples], texts)
    metrics = {"run": str(captioning.run)} | settings | {"tokenizer": tokenizer, "scores": scores}
    metrics |= {"distinct captions": distinct(texts), "never ended": never_ended(captions)}
    return metrics, [{"image_id": e.image_id, "caption": text} for e, text in zip(examples, texts, strict=True)]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of scoring; `args.named` says whether it names data."""
    parser = make_parser(__doc__)
    inference.add_arguments(parser)
    parser.add_argument(
        "--split",
        choices=(*data_utils.SPLITS, "all"),
        help="pictures to score (default: val; of data named below, all)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE.json",
        help="score these captions, COCO results made elsewhere, against the data of the run or those named below; "
        "writes FILE_metrics_<split>.json",
    )
    data_utils.add_arguments(parser, "data of --results (default: the run's)", preset=None)
    add_quiet(parser)
    args = parser.parse_args(argv)
    default = data_utils.DataOptions(dataset=None)
    args.named = data_utils.options_from(args) != default
    if args.named and not args.results:
        raise InputError("a run is scored on its own data; data can be named for --results FILE only")
    if args.named and args.run:
        raise InputError("expected --run, whose data are the references, or other data; found both")
    if args.named and not (args.dataset or args.annotations):
        raise InputError("expected --dataset or --annotations with the other data options")
    if args.results and (args.beam_size, args.length_penalty) != (1, search.LENGTH_PENALTY):
        raise InputError("--results holds captions already; --beam-size and --length-penalty are for a run")
    args.split = args.split or ("all" if args.named else "val")
    args.dataset = args.dataset or data_utils.DataOptions().dataset
    return args


def main(argv: list[str] | None = None) -> None:
    """Captions and scores a split of a run's data, or scores a results file."""
    args = parse(argv)
    pictures_of = lambda dataset: list(dataset.examples) if args.split == "all" else dataset.split(args.split)
    if args.results:
        if args.named:
            dataset = data_utils.load_dataset(data_utils.options_from(args), pictures=False)
        else:
            run = args.run or inference.newest_run()
            dataset = inference.dataset_of(inference.read_config(run), pictures=False)
        examples, results = pictures_of(dataset), None
        metrics = score_file(args.results, examples)
        metrics["references"] = args.annotations or (args.dataset if args.named else str(run))
        name, folder, suffix = args.results, args.results.parent, args.split
    else:
        captioning = inference.Captioning.load(args.run or inference.newest_run(), args.beam_size, args.length_penalty)
        examples = pictures_of(inference.dataset_of(captioning.config))
        metrics, results = score_run(captioning, examples)
        name = folder = captioning.run
        suffix = args.split + f"_beam{args.beam_size}" * (args.beam_size > 1)
    metrics |= {"split": args.split, "pictures": len(examples)}
    print(f"{name}, {args.split}: {len(examples):,} pictures")
    for key, value in {**metrics["scores"], **metrics}.items():
        if key in (*metrics["scores"], "distinct captions", "never ended"):
            print(f"{key:18} {value:6.1f}", flush=True)
    if results is None:
        write_json(folder / f"{args.results.stem}_metrics_{suffix}.json", metrics)
    else:
        write_json(folder / f"captions_{suffix}.json", results)
        write_json(folder / f"metrics_{suffix}.json", metrics)


if __name__ == "__main__":
    run_command(main)
