"""Scores generated captions against reference captions: BLEU-1 to 4, METEOR, ROUGE-L, CIDEr and SPICE.

Tutorial section: none. The tutorial compares single captions by eye.

    python evaluate.py                                    # the latest run on its val split
    python evaluate.py --run runs/coco --split test --beam-size 5
    python evaluate.py --html report.html                 # a page of all images, the worst captions first
    python evaluate.py --per-image scores.csv             # a table of all images, the worst captions first
    python evaluate.py --results captions.json --annotations captions_val2014.json

The captions are generated without the reference captions. They are written into the run folder as COCO results,
captions_<split>.json, and their scores as metrics_<split>.json. Scoring needs pycocoevalcap, the code of the COCO
challenge; captions are split into words as for published scores. METEOR and SPICE need Java.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import data_utils
import inference
from beyond.report.report import ReportWriter
from beyond.share.packed_run import open_run
from captioning.base.cli import InputError, add_quiet_option, log, make_parser, run_main
from captioning.base.files import write_json
from captioning.base.quiet_tensorflow import tf
from captioning.config.options import add_options
from captioning.config.settings import DATA_PATHS, DataConfig, DecodeConfig, FeatureConfig
from captioning.data.annotations import SPLITS, Example
from captioning.decoder.decoding import StepModel
from captioning.images.feature_cache import FeatureCache, FeatureSource, map_prefetch, open_run_cache
from captioning.images.image_records import ImageRecords
from captioning.images.reading import map_threads, read_image
from captioning.output.plots import thumbnail
from captioning.runs.run_folder import read_config
from captioning.scores.coco_results import match_results, read_results
from captioning.scores.java_scores import check_spice
from captioning.scores.metrics import Scores, distinct_ratio, has_pycocoevalcap, mid_sentence_ratio, score_all
from captioning.scores.score_table import check_table_path, write_score_table
from tokenizer import Tokenizer, split_words

NO_DATA = DataConfig(dataset=None)  # the data options if none is given
RATIOS = ("distinct captions", "end in mid-sentence", "unfinished captions")  # in percent, beside the scores


# Captions of a split.


def generate_captions(
    model: StepModel,
    tokenizer: Tokenizer,
    cache: FeatureSource,
    examples: list[Example],
    batch_size: int = 64,
    config: DecodeConfig = inference.GREEDY,
) -> list[inference.Caption]:
    """Captions images from their cached features.

    Args:
        model: the caption model.
        tokenizer: its vocabulary.
        cache: holds the features of all images.
        examples: the images.
        batch_size: captions that are decoded at the same time; those of a beam count each.
        config: how captions are searched for.
    """
    paths = [str(cache.path(example.image_path)) for example in examples]
    num_rows = config.captions if config.sample else config.num_beams  # that are followed for each image
    batches = tf.data.Dataset.from_tensor_slices(paths).batch(max(1, batch_size // num_rows))
    captions = []
    for values in map_prefetch(batches, cache.read):  # (B, L, C), or pixels, which a trained CNN takes
        captions += inference.decode_captions(model, tokenizer, values, config)
    return captions


def unfinished_ratio(captions: list[inference.Caption]) -> float:
    """Returns the number of captions without <end>, in percent of all captions."""
    return round(100 * sum(not caption.finished for caption in captions) / len(captions), 1)


# Scores.


def check_features(cache: FeatureCache, image_dir: Path, examples: list[Example]) -> None:
    """Checks that a cache has the features of images as they are now; raises InputError if it has not."""
    image_paths = [example.image_path for example in examples]
    hint = "run features.py with the data options of the run"
    if missing := cache.missing(image_paths):
        raise InputError(
            f"{cache.folder}: the features of {len(missing):,} images are missing or incomplete (the first: "
            f"{cache.path(missing[0])}); {hint}"
        )
    records = ImageRecords(cache.folder, image_dir)
    if changed := records.find_changed({path: cache.path(path) for path in image_paths}):
        raise InputError(
            f"{cache.folder}: {len(changed):,} images have changed since their features were computed (the first: "
            f"{image_dir / changed[0]}); {hint}"
        )


def score_run(
    captioner: inference.Captioner, cache: FeatureSource, examples: list[Example], with_spice: bool = False
) -> tuple[dict[str, Any], list[inference.Caption], Scores]:
    """Captions images from their cached features, and scores the captions.

    Returns:
        The metrics, the caption of each image, and the scores.
    """
    config = captioner.decode_config
    captions = generate_captions(captioner.model, captioner.tokenizer, cache, examples, config=config)
    texts = [caption.text for caption in captions]
    references = [list(example.captions) for example in examples]
    scores, tokenizer_name = score_all(references, texts, split_words, captioner.tokenizer.words, with_spice)
    metrics = {
        "run": str(captioner.run),
        **config.to_json(),
        "tokenizer": tokenizer_name,
        "scores": scores.total,
        "distinct captions": distinct_ratio(texts),
        "end in mid-sentence": mid_sentence_ratio(texts),
        "unfinished captions": unfinished_ratio(captions),
    }
    return metrics, captions, scores


def write_report(
    path: Path,
    examples: Sequence[Example],
    captions: Sequence[inference.Caption],
    metrics: dict[str, Any],
    image_dir: Path,
    ciders: Sequence[float],
) -> None:
    """Writes a page of images, each with its caption, those of people and its CIDEr; the worst captions come first.

    Args:
        path: the page.
        examples: the images.
        captions: the caption of each.
        metrics: what `score_run` returned.
        image_dir: the folder of the images. Those that cannot be read are left out, which is logged.
        ciders: the CIDEr of each caption, in percent.
    """
    scores = ", ".join(f"{name} {metrics['scores'][name]:.1f}" for name in ("BLEU-4", "CIDEr"))
    search = DecodeConfig(**{name: metrics[name] for name in DecodeConfig().to_json()}).describe()
    subtitle = f"run {Path(metrics['run']).name}, {metrics['split']} images, {search}: {scores}"

    def load(index: int) -> Image.Image | InputError:
        try:
            return thumbnail(read_image(image_dir / examples[index].image_path))
        except InputError as error:
            return error

    worst_first = sorted(range(len(examples)), key=ciders.__getitem__)
    with ReportWriter(path, "Captions", subtitle) as report:
        for index, image in map_threads(load, worst_first, 2 * inference.BATCH_SIZE):
            if isinstance(image, InputError):
                log(f"left out of {path}: {image}", error=True)
                continue
            result = captions[index].to_json(with_attention=True)
            references = list(examples[index].captions)
            report.add(image, examples[index].image_path, result, references, ciders[index], "CIDEr")
    log(f"page: {path}")


def score_file(
    path: Path,
    examples: list[Example],
    all_examples: Sequence[Example] = (),
    words: str = "spaces",
    with_spice: bool = False,
) -> tuple[dict[str, Any], list[str], Scores]:
    """Scores a COCO results file against the reference captions of some images.

    Args:
        path: the file.
        examples: the images.
        all_examples: those of all splits, whose captions are left out; none if `examples` are all.
        words: what a word is, see `tokenizer.split_words`.
        with_spice: whether to compute SPICE.

    Returns:
        The metrics, the caption of each image, and the scores.

    Raises:
        InputError: an image has no caption; or see `read_results` and `match_results`.
    """
    captions, strangers = match_results(path, results := read_results(path), all_examples or examples)
    no_image = ""
    if strangers:
        no_image = (
            f"{len(strangers):,} of its {len(results):,} captions belong to no image of the data, the first with "
            f"image_id {strangers[0]!r}"
        )
    if missing := [example for example in examples if example not in captions]:
        raise InputError(
            f"{path}: no caption of {len(missing):,} of the {len(examples):,} images, the first with image_id "
            f"{missing[0].image_id} ({missing[0].image_path}); "
            + (f"{no_image}; expected ids, paths or file names" if no_image else "are they of this --split?")
        )
    if no_image:
        log(f"{path}: {no_image}; left out")
    if num_others := len(captions) - len(examples):
        log(f"{path}: {num_others:,} captions of images of other splits are left out")
    texts = [captions[example] for example in examples]
    references = [list(example.captions) for example in examples]
    scores, tokenizer_name = score_all(references, texts, split_words, words, with_spice)
    metrics = {
        "results": str(path),
        "tokenizer": tokenizer_name,
        "scores": scores.total,
        "distinct captions": distinct_ratio(texts),
        "end in mid-sentence": mid_sentence_ratio(texts),
    }
    return metrics, texts, scores


# The command.


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; `args.other_data` are the data of --results, or None for those of the run."""
    parser = make_parser(__doc__)
    inference.add_model_options(parser)
    parser.add_argument(
        "--split", choices=(*SPLITS, "all"), help="images to score (default: val; of data given below, all)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE.json",
        help="score these captions, COCO results made elsewhere, against the data of the run or those given below; "
        "writes FILE_metrics_<split>.json",
    )
    text = "write a page of the images with their attention and people's captions, the worst first"
    parser.add_argument("--html", type=Path, metavar="FILE", help=text)
    text = "write a table of the images with their captions, scores and references, the worst first"
    parser.add_argument("--per-image", type=Path, metavar="FILE.csv", help=text)
    parser.add_argument(
        "--spice", action="store_true", help="SPICE too: needs Java 8 to 15; the first time downloads Stanford CoreNLP"
    )
    group = parser.add_argument_group("features of the run, if they were moved")
    add_options(group, FeatureConfig, only=("features_dir",))
    title = "data of --results (default: the run's); or where those of the run are, if they were moved"
    data_utils.add_data_options(parser, title, dataset=None)
    add_quiet_option(parser)
    args = parser.parse_args(argv)
    data_config = DataConfig.from_args(args)
    args.other_data = None
    if args.results and not args.run:
        args.other_data = data_config if data_config != NO_DATA else None
        if args.other_data and not (args.dataset or args.annotations):
            raise InputError("expected --dataset or --annotations with the other data options")
    elif any(
        value != getattr(NO_DATA, name) for name, value in data_config.to_json().items() if name not in DATA_PATHS
    ):
        raise InputError(
            "a run is scored on its own data; only where they are can be named, and other data for --results FILE "
            "without --run"
        )
    if args.results and DecodeConfig.from_args(args) != DecodeConfig():
        raise InputError("--results holds captions already; --beam-size and the like are for a run")
    if args.results and args.html:
        raise InputError("--results has no attention; --html is for a run")
    if args.per_image:
        check_table_path(args.per_image)
    args.split = args.split or ("all" if args.other_data else "val")
    return args


def select_split(dataset: data_utils.CaptionDataset, split: str) -> list[Example]:
    """Returns the examples of a split, or of all."""
    return list(dataset.examples) if split == "all" else dataset.split(split)


def check_spice_words(args: argparse.Namespace, words: str) -> None:
    """Checks that SPICE, if it is asked for, is of words between spaces; raises InputError if it is of characters."""
    if args.spice and words == "characters":
        raise InputError("--spice knows English words only, and these captions are split into characters; leave it out")


def evaluate_results(args: argparse.Namespace) -> None:
    """Scores the results file of the command line, prints the scores and writes them beside the file."""
    if args.other_data:
        data_config = args.other_data
        dataset = data_utils.load_dataset(data_config, with_images=False)
        source = args.annotations or args.dataset
    else:
        run = open_run(args.run)
        config = read_config(run)
        locations = data_utils.locations_from_args(args)
        data_config, dataset = config.data, data_utils.load_run_dataset(config, False, locations)
        source = str(run)
    examples = select_split(dataset, args.split)
    check_spice_words(args, data_config.words)
    metrics, texts, scores = score_file(args.results, examples, dataset.examples, data_config.words, args.spice)
    metrics |= {"references": source, "split": args.split, "images": len(examples)}
    print_metrics(args.results, metrics)
    write_json(args.results.parent / f"{args.results.stem}_metrics_{args.split}.json", metrics)
    if args.per_image:
        write_score_table(args.per_image, examples, texts, scores.by_image)


def open_features(
    captioner: inference.Captioner, image_dir: Path, examples: list[Example], features_dir: str | None
) -> FeatureSource:
    """Opens the features of images, or the images themselves if the run's CNN was trained and no folder is given."""
    manifest = captioner.config.features
    cache = open_run_cache(manifest | {"folder": features_dir or manifest["folder"]})
    check_features(cache, image_dir, examples)
    return cache


def evaluate_run(args: argparse.Namespace) -> None:
    """Captions and scores the split of the command line, prints the scores and writes all into the run folder."""
    captioner = inference.Captioner.load(args.run, DecodeConfig.from_args(args))
    check_spice_words(args, captioner.tokenizer.words)
    dataset = data_utils.load_run_dataset(captioner.config, locations=data_utils.locations_from_args(args))
    examples = select_split(dataset, args.split)
    cache = open_features(captioner, dataset.image_dir, examples, args.features_dir)
    metrics, captions, scores = score_run(captioner, cache, examples, args.spice)
    metrics |= {"split": args.split, "images": len(examples)}
    print_metrics(captioner.run, metrics)
    results = [
        {"image_id": example.image_id, "caption": caption.text}
        for example, caption in zip(examples, captions, strict=True)
    ]
    name = f"{args.split}{captioner.decode_config.suffix}.json"
    write_json(captioner.run / f"captions_{name}", results)
    write_json(captioner.run / f"metrics_{name}", metrics)
    if args.html:
        write_report(args.html, examples, captions, metrics, dataset.image_dir, scores.by_image["CIDEr"])
    if args.per_image:
        write_score_table(args.per_image, examples, [caption.text for caption in captions], scores.by_image)


def print_metrics(source: Path, metrics: dict[str, Any]) -> None:
    """Prints the scores, one a line, below what was scored."""
    print(f"{source}, {metrics['split']}: {metrics['images']:,} images")
    ratios = {name: metrics[name] for name in RATIOS if name in metrics}
    for name, value in {**metrics["scores"], **ratios}.items():
        print(f"{name:19} {value:6.1f}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Captions and scores a split of a run's dataset, or scores a results file."""
    args = parse(argv)
    if not has_pycocoevalcap():
        raise InputError("scoring needs pycocoevalcap, which is not installed; run `pip install pycocoevalcap`")
    if args.spice:
        check_spice()
    if args.results:
        evaluate_results(args)
    else:
        evaluate_run(args)


if __name__ == "__main__":
    run_main(main)
