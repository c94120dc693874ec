"""Scores generated captions against reference captions: BLEU-1 to 4, METEOR, ROUGE-L, CIDEr and SPICE.

Tutorial section: none. The tutorial compares single captions by eye.

    python evaluate.py                                    # the latest run on its val split
    python evaluate.py --run runs/coco --split test --beam-size 5
    python evaluate.py --per-image scores.csv             # a table of all images, the worst captions first
    python evaluate.py --boxes instances_train2014.json   # also where the attention lies, see docs/attention.md
    python evaluate.py --results captions.json --annotations captions_val2014.json

The captions are generated without the reference captions. They are written into the run folder as COCO results,
captions_<split>.json, and their scores as metrics_<split>.json. Scoring needs pycocoevalcap, the code of the COCO
challenge; captions are split into words as for published scores. METEOR and SPICE need Java.
"""

import argparse
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import data_utils
import inference
from captioning.base.cli import (
    InputError,
    add_quiet_option,
    first_line,
    log,
    log_once,
    make_parser,
    print_results,
    progress_bar,
    run_main,
)
from captioning.base.devices import has_gpu
from captioning.base.files import check_output, write_json
from captioning.base.quiet_tensorflow import tf
from captioning.config.options import add_options
from captioning.config.settings import DATA_PATHS, DataConfig, DecodeConfig, FeatureConfig
from captioning.data.annotations import SPLITS, Example
from captioning.decoder.decoding import StepModel, can_be_compiled
from captioning.images.feature_cache import FeatureCache, FeatureSource, open_run_cache, read_batches
from captioning.images.image_records import ImageRecords
from captioning.images.reading import set_max_megapixels
from captioning.runs.run_folder import open_run, read_config
from captioning.scores.attention_boxes import COLUMNS, measure_captions, read_boxes
from captioning.scores.baselines import compare_with_baselines
from captioning.scores.coco_results import read_results, result_ids
from captioning.scores.java_scores import check_spice
from captioning.scores.metrics import (
    TOKENIZERS,
    Scores,
    copied_ratio,
    distinct_ratio,
    has_pycocoevalcap,
    mid_sentence_ratio,
    score_all,
)
from captioning.scores.score_table import check_table_path, write_score_table
from tokenizer import Tokenizer

# What the scores measure, all in percent:
#   BLEU-n    which share of the sequences of up to n words are also in a reference; captions that are too short lose
#   METEOR    which words match, stems and synonyms included, and whether they come in the same order
#   ROUGE-L   the longest subsequence of words that a caption and a reference have in common
#   CIDEr     sequences of up to 4 words, weighted by how rare they are in the references: "a" counts little. It is
#             not limited to 100, and depends on the other images. The best checkpoint is chosen by it.
#   SPICE     the objects, attributes and relations that a parser finds in the sentences
# A model may score well and still repeat a few safe sentences, copy them from the training captions, or stop in the
# middle of one. These ratios show it.
RATIOS = ("distinct captions", "copied captions", "end in mid-sentence", "unfinished captions")
GPU_BATCH_SIZE = 256
# From so many images on XLA compiles the search on a GPU, which takes some 2 to 6 s on an H200, as for training. There
# 1,000 images take 0.6 to 0.7 s without it in batches of 64, by greedy search or with a beam of 5, and perhaps 0.2 s in
# these: 20,000 take 4 to 14 s, of which XLA has to save those seconds. It was not measured for searches on a GPU.
XLA_MIN_IMAGES = 20_000
NO_DATA = DataConfig(dataset=None)  # the data options if none is given


class Evaluation(NamedTuple):
    """The captions of some images of a run's dataset, and their scores."""

    examples: list[Example]  # the images, with the reference captions
    image_dir: Path  # the folder of the images
    captions: list[inference.Caption]  # of each image
    metrics: dict[str, Any]  # the content of metrics_<split>.json
    by_image: dict[str, list[float]]  # the scores of each image, in percent, by their name


# Captions of a split.


def widen(batch_size: int) -> int:
    """Returns the size of a batch for this device: on a GPU a step of 256 captions takes hardly longer than of 64."""
    return max(batch_size, GPU_BATCH_SIZE) if has_gpu() else batch_size


def generate_captions(  # noqa: PLR0913 - all that the captions depend on
    model: StepModel,
    tokenizer: Tokenizer,
    cache: FeatureSource,
    examples: list[Example],
    batch_size: int = 64,
    config: DecodeConfig = inference.GREEDY,
    chooser: inference.Chooser | None = None,
) -> list[inference.Caption]:
    """Captions images from their cached features.

    Args:
        model: the caption model.
        tokenizer: its vocabulary.
        cache: holds the features of all images.
        examples: the images.
        batch_size: captions that are decoded at the same time; those of a beam count each. On a GPU they are more, but
            not of images: the memory of the CNN in front grows with them.
        config: how captions are searched for.
        chooser: what chooses among them, if not their probability.
    """
    with_xla = False
    if isinstance(cache, FeatureCache):
        batch_size = widen(batch_size)
        with_xla = can_be_compiled(config) and has_gpu() and len(examples) >= XLA_MIN_IMAGES
    names = [example.image_path for example in examples]
    # The decoder follows several captions of each image: batches get smaller, so that its memory does not grow.
    num_rows = config.captions if config.sample else config.num_beams
    num_images = max(1, batch_size // num_rows)
    if with_xla:  # for one shape: the last image fills the last batch
        names += names[-1:] * (-len(names) % num_images)
    decode = functools.partial(inference.decode_captions, model, tokenizer, config=config, chooser=chooser)
    captions: list[inference.Caption] = []
    # Several threads read the next batches while the decoder works on this one.
    for image_features in read_batches(cache, names, num_images):
        try:
            captions += decode(image_features, with_xla=with_xla)  # (B, L, C)
        except tf.errors.OpError as error:
            if not with_xla:
                raise
            log_once(f"XLA cannot run the search ({first_line(error)}): captioning goes on without")
            with_xla = False
            captions += decode(image_features)
    return captions[: len(examples)]


def open_features(captioner: inference.Captioner, features_dir: str | None = None) -> FeatureCache | None:
    """Opens the cached features of a run's dataset: those in `features_dir`, by default those of its training.

    Returns None if there are none: of a run that came from another machine, or whose CNN was trained with the decoder.

    Raises:
        InputError: `features_dir` does not hold them.
    """
    manifest = captioner.config.features
    folder = Path(features_dir or manifest["folder"])
    if features_dir:
        return open_run_cache(manifest | {"folder": features_dir})
    if folder.exists():
        try:
            return open_run_cache(manifest)
        except InputError as error:  # those of weights that a CNN had in its training, say
            log(str(error))
    log(f"no cached features of this run in {folder}: computing them from the images")
    return None


def caption_examples(
    captioner: inference.Captioner, image_dir: Path, examples: list[Example], cache: FeatureCache | None
) -> list[inference.Caption]:
    """Captions images of a run's dataset from their cached features, or from the images themselves if it is None.

    The features must be complete and up to date, and all images readable; otherwise it raises InputError.
    """
    if cache:
        check_features(cache, image_dir, examples)
        model, tokenizer, config = captioner.model, captioner.tokenizer, captioner.decode_config
        return generate_captions(model, tokenizer, cache, examples, config=config, chooser=captioner.chooser)
    paths = [str(image_dir / example.image_path) for example in examples]
    captions = []
    with progress_bar(total=len(paths), unit="image", desc="captions") as progress:
        for result in inference.caption_stream(captioner, paths, with_copies=False):
            # Scores of fewer images could not be compared with those of other runs.
            if isinstance(result, InputError):
                raise result
            captions.append(result.caption)
            progress.update()
    return captions


def check_features(cache: FeatureCache, image_dir: Path, examples: list[Example]) -> None:
    """Checks that a cache has the features of images as they are now; raises InputError if not."""
    image_paths = [example.image_path for example in examples]
    hint = "run features.py with the data options of the run"
    if missing := cache.missing(image_paths):
        raise InputError(
            f"{cache.folder}: the features of {len(missing):,} images are missing or incomplete (the first: "
            f"{cache.path(missing[0])}); {hint}"
        )
    # The features of an image that was replaced would give the captions of the old one.
    records = ImageRecords(cache.folder, image_dir)
    if changed := records.find_changed(image_paths):
        raise InputError(
            f"{cache.folder}: {len(changed):,} images have changed since their features were computed (the first: "
            f"{image_dir / changed[0]}); {hint}"
        )


# Scores.


def score_texts(
    examples: Sequence[Example], texts: list[str], words: str, with_spice: bool = False
) -> tuple[dict[str, Any], Scores]:
    """Scores the captions of images against their reference captions.

    Args:
        examples: the images.
        texts: the caption of each.
        words: what a word is, see `tokenizer.split_words`.
        with_spice: whether to compute SPICE, which takes Java and minutes.

    Returns:
        What metrics_<split>.json has of the scores; and all scores.
    """
    # A caption may agree with any of the captions that people wrote for its image.
    references = [list(example.captions) for example in examples]
    scores = score_all(references, texts, words, with_spice)
    metrics = {
        "tokenizer": TOKENIZERS[words],
        "scores": scores.total,
        "distinct captions": distinct_ratio(texts),
        "end in mid-sentence": mid_sentence_ratio(texts),
    }
    return metrics, scores


# The command.


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; `args.other_data` are the data of --results, or None for the data of the run."""
    parser = make_parser(__doc__)
    inference.add_model_options(parser)
    add = parser.add_argument
    add("--split", choices=(*SPLITS, "all"), help="images to score (default: val; of data given below, all)")
    results_help = (
        "score these captions, COCO results or a table made elsewhere, against the data of the run or those given "
        "below; writes FILE_metrics_<split>.json"
    )
    add("--results", type=Path, metavar="FILE", help=results_help)
    table_help = "write a table of the images with their captions, scores and references, the worst first"
    add("--per-image", type=Path, metavar="FILE.csv", help=table_help)
    boxes_help = "measure how much of the attention lies in boxes: COCO's instances JSON, or a CSV with the columns "
    add("--boxes", type=Path, metavar="FILE", help=boxes_help + ", ".join(COLUMNS))
    spice_help = "compute SPICE too: needs Java 8 to 15; the first time downloads Stanford CoreNLP"
    add("--spice", action="store_true", help=spice_help)
    group = parser.add_argument_group("features of the run, if they were moved, or its images without them")
    add_options(group, FeatureConfig, only=("features_dir", "max_megapixels"))
    title = "data of --results (default: the run's); or where the data of the run are, if they were moved"
    data_utils.add_data_options(parser, title, dataset=None)
    add_quiet_option(parser)
    args = parser.parse_args(argv)
    set_max_megapixels(args.max_megapixels)
    args.other_data = other_data_from_args(args)
    args.split = args.split or ("all" if args.other_data else "val")
    # What is missing is found out now, not after hours of captioning.
    if args.results and args.results.is_dir():
        raise InputError(f"--results {args.results}: expected a file, found a folder")
    if args.results and DecodeConfig.from_args(args) != DecodeConfig():
        raise InputError("--results holds captions already; --beam-size and the like are for a run")
    if args.choose == "consensus" and args.split in ("train", "all"):
        raise InputError(
            f"--choose consensus: training images would be scored with the captions that chose theirs, found --split "
            f"{args.split}; expected val or test"
        )
    if args.results and args.features_dir:
        raise InputError("--features-dir is for the captions of a run, and --results has them; omit one of them")
    if args.results and args.boxes:
        raise InputError("--boxes measures the attention of a run, and --results has captions only; omit one of them")
    if args.results:
        check_output("--results", metrics_path(args), lambda path: b'"scores"' in path.read_bytes())
    if args.per_image:
        inputs = (args.results, args.annotations, args.val_annotations, args.test_annotations)
        check_table_path(args.per_image, filter(None, inputs))
    if not has_pycocoevalcap():
        raise InputError("scoring needs pycocoevalcap, which is not installed; run `pip install pycocoevalcap`")
    if args.spice:
        check_spice()
    return args


def metrics_path(args: argparse.Namespace) -> Path:
    """Returns the file for the scores of --results."""
    return args.results.with_name(f"{args.results.stem}_metrics_{args.split}.json")


def other_data_from_args(args: argparse.Namespace) -> DataConfig | None:
    """Returns the data that the captions of --results are scored against, or None for the data of the run."""
    data_config = DataConfig.from_args(args)
    if data_config == NO_DATA:
        return None
    if args.results and not args.run:
        if not (args.dataset or args.annotations):
            raise InputError("expected --dataset or --annotations with the other data options")
        return data_config
    # A model must not be scored on images that it was trained on, as it might be with another split.
    names = [name for name in data_config.to_json() if name not in DATA_PATHS]
    if any(getattr(data_config, name) != getattr(NO_DATA, name) for name in names):
        raise InputError(
            "a run is scored on its own data, of which only where they are can be named; other data need --results "
            "FILE, without --run"
        )
    return None


def select_split(dataset: data_utils.CaptionDataset, split: str) -> list[Example]:
    """Returns the examples of a split, or of all."""
    return list(dataset.examples) if split == "all" else dataset.split(split)


def check_spice_words(args: argparse.Namespace, words: str) -> None:
    """Raises InputError if --spice is given for captions of characters."""
    if args.spice and words == "characters":
        raise InputError("--spice supports English words only, and these captions are split into characters; omit it")


def evaluate_results(args: argparse.Namespace) -> None:
    """Scores the results file of the command line, prints the scores and writes them beside the file."""
    # Only the reference captions are needed, not the images.
    if args.other_data:
        data_config = args.other_data
        dataset = data_utils.load_dataset(data_config, with_images=False)
        dataset = dataset.move(data_utils.find_moved_copies(dataset))  # as in training, if the images are there
        source = args.annotations or args.dataset
    else:
        run = open_run(args.run)
        config = read_config(run)
        locations = data_utils.locations_from_args(args)
        data_config, dataset = config.data, data_utils.load_run_dataset(config, False, locations)
        source = str(run)
    examples = select_split(dataset, args.split)
    check_spice_words(args, data_config.words)
    texts = read_results(args.results, examples, dataset.examples)  # the file may hold captions of other splits
    metrics, scores = score_texts(examples, texts, data_config.words, args.spice)
    metrics = {"results": str(args.results), **metrics, "references": source}
    metrics |= {"split": args.split, "images": len(examples)}
    print_metrics(args.results, metrics)
    write_json(metrics_path(args), metrics)
    if args.per_image:
        write_score_table(args.per_image, examples, texts, scores.by_image)


def evaluate_run(args: argparse.Namespace) -> Evaluation:
    """Captions and scores the split of the command line, prints the scores and writes all into the run folder."""
    locations = data_utils.locations_from_args(args)
    moved = locations | ({"features_dir": args.features_dir} if args.features_dir else {})
    captioner = inference.Captioner.load(args.run, DecodeConfig.from_args(args), locations=moved)
    if not os.access(captioner.run, os.W_OK):
        raise InputError(f"{captioner.run}: expected a folder that can be written, for the captions and their scores")
    check_spice_words(args, captioner.tokenizer.words)
    dataset = data_utils.load_run_dataset(captioner.config, locations=locations)
    examples = select_split(dataset, args.split)
    boxes = read_boxes(args.boxes, examples, dataset.image_dir) if args.boxes else []

    # The model writes each caption alone, as for a new image. In training it is given the true word before each word;
    # scored like that, it would look better than it is.
    cache = open_features(captioner, args.features_dir)
    captions = caption_examples(captioner, dataset.image_dir, examples, cache)
    texts = [caption.text for caption in captions]
    # COCO's format for results, which other programs can score. The names of the files say how captions were searched
    # for, so that greedy search and a beam search of the same run can be compared.
    results = [{"image_id": i, "caption": text} for i, text in zip(result_ids(examples), texts, strict=True)]
    name = f"{args.split}{DecodeConfig.from_args(args).suffix}.json"
    write_json(captioner.run / f"captions_{name}", results)
    num_unfinished = sum(not caption.finished for caption in captions)  # without <end>
    scored, scores = score_texts(examples, texts, captioner.tokenizer.words, args.spice)
    chosen = set(examples)
    train_examples = [example for example in dataset.split("train") if example not in chosen]
    train_captions = [caption for example in train_examples for caption in example.captions]
    metrics = {
        "run": str(captioner.run),
        **captioner.decode_config.to_json(),
        "beam_size": 1 if captioner.decode_config.sample else captioner.decode_config.num_beams,
        **scored,
        "unfinished captions": round(100 * num_unfinished / len(captions), 1),
        "split": args.split,
        "images": len(examples),
    }
    if train_captions:
        metrics["copied captions"] = copied_ratio(texts, train_captions, captioner.tokenizer.words)
    if boxes:
        metrics["attention"] = measure_captions(captions, boxes)
    print_metrics(captioner.run, metrics)
    # A model may write well and know nothing of the image. Then its captions score no more than one caption for all.
    metrics["baselines"] = compare_with_baselines(
        examples, train_examples, cache, captioner.tokenizer.words, scored["scores"]["CIDEr"], len(set(texts))
    )
    write_json(captioner.run / f"metrics_{name}", metrics)
    if args.per_image:
        write_score_table(args.per_image, examples, texts, scores.by_image)
    return Evaluation(examples, dataset.image_dir, captions, metrics, scores.by_image)


def print_metrics(source: Path, metrics: dict[str, Any]) -> None:
    """Prints what was scored, and the scores below it, one a line."""
    print_results(f"{source}, {metrics['split']}: {metrics['images']:,} images")
    ratios = {name: metrics[name] for name in RATIOS if name in metrics}
    for name, value in {**metrics["scores"], **ratios}.items():
        print_results(f"{name:19} {value:6.1f}")
    if "attention" in metrics:
        (_, num_words), *measures = metrics["attention"].items()
        print_results(f"attention of {num_words:,} words that name a box")
        for name, value in measures:
            print_results(f"{name:19} {value:6.1f}")


def main(argv: list[str] | None = None) -> None:
    """Captions and scores a split of a run's dataset, or scores a results file."""
    args = parse(argv)
    if args.results:
        evaluate_results(args)
    else:
        evaluate_run(args)


if __name__ == "__main__":
    run_main(main)
