"""Scores generated captions against reference captions: BLEU-1 to 4, METEOR, ROUGE-L and CIDEr.

Tutorial section: none. The tutorial compares single captions by eye.

    python evaluate.py                                    # the latest run on its val split
    python evaluate.py --run runs/coco --split test --beam-size 5
    python evaluate.py --results captions.json --annotations captions_val2014.json

The captions are generated without the reference captions. They are written into the run folder as COCO results,
captions_<split>.json, and their scores as metrics_<split>.json. Scoring needs pycocoevalcap, the code of the COCO
challenge. METEOR, and the tokenizer behind the published scores, need Java.
"""

import argparse
from pathlib import Path
from typing import Any

import data_utils
import inference
from captioning.annotations import SPLITS, Example
from captioning.cli import InputError, add_quiet_option, log, make_parser, run_main
from captioning.config import DataConfig, DecodeConfig
from captioning.decoding import StepModel
from captioning.feature_cache import FeatureCache, map_prefetch, open_run_cache
from captioning.files import read_json, write_json
from captioning.metrics import distinct_ratio, has_pycocoevalcap, score_with_fallback
from captioning.quiet_tensorflow import tf
from captioning.run_folder import latest_run, read_config
from captioning.settings import add_options
from tokenizer import Tokenizer, split_words

NO_DATA = DataConfig(dataset=None)  # the data options if none is given


# Captions of a split.


def generate_captions(
    model: StepModel,
    tokenizer: Tokenizer,
    cache: FeatureCache,
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
    batches = tf.data.Dataset.from_tensor_slices(paths).batch(max(1, batch_size // config.beam_size))
    captions = []
    for features in map_prefetch(batches, cache.read):  # (B, 64, 2048)
        captions += inference.decode_captions(model, tokenizer, features, config)
    return captions


def unfinished_ratio(captions: list[inference.Caption]) -> float:
    """Returns the number of captions without <end>, in percent of all captions."""
    return round(100 * sum(not caption.finished for caption in captions) / len(captions), 1)


# Scores.


def score_run(captioner: inference.Captioner, examples: list[Example]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Captions images from their cached features, and scores the captions.

    Returns:
        The metrics, and the captions as COCO results.

    Raises:
        InputError: features are missing.
    """
    cache = open_run_cache(captioner.config.features)
    if missing := cache.missing([example.image_path for example in examples]):
        raise InputError(
            f"{cache.folder}: the features of {len(missing):,} images are missing or incomplete (the first: "
            f"{cache.path(missing[0])}); run features.py with the data options of the run"
        )
    config = captioner.decode_config
    captions = generate_captions(captioner.model, captioner.tokenizer, cache, examples, config=config)
    texts = [caption.text for caption in captions]
    references = [list(example.captions) for example in examples]
    scores, tokenizer_name = score_with_fallback(references, texts, split_words)
    metrics = {
        "run": str(captioner.run),
        **config.to_json(),
        "tokenizer": tokenizer_name,
        "scores": scores,
        "distinct captions": distinct_ratio(texts),
        "unfinished captions": unfinished_ratio(captions),
    }
    results = [{"image_id": example.image_id, "caption": text} for example, text in zip(examples, texts, strict=True)]
    return metrics, results


def read_results(path: Path) -> dict[str, str]:
    """Reads a COCO results file.

    Returns:
        The captions by image id, as text.

    Raises:
        InputError: it is not such a file, or has two captions of one image.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("caption"), str) and type(row.get("image_id")) in (int, str)
        for row in rows
    ):
        raise InputError(f'{path}: not COCO results; expected a list of {{"image_id": ..., "caption": "..."}}')
    results: dict[str, str] = {}
    for row in rows:
        image_id = str(row["image_id"])
        caption = " ".join(row["caption"].split())  # one line, which the PTB tokenizer needs
        if image_id in results:
            raise InputError(f"{path}: expected one caption for each image, found two of image_id {image_id}")
        try:
            caption.encode()
        except UnicodeEncodeError:  # JSON can hold half of a surrogate pair
            raise InputError(f"{path}: the caption of image_id {image_id} is not Unicode text: {caption!r}") from None
        results[image_id] = caption
    return results


def score_file(path: Path, examples: list[Example]) -> dict[str, Any]:
    """Scores a COCO results file against the reference captions of some images.

    Raises:
        InputError: an image has no caption; or as `read_results`.
    """
    results = read_results(path)
    if missing := [example for example in examples if str(example.image_id) not in results]:
        raise InputError(
            f"{path}: no caption of {len(missing):,} of the {len(examples):,} images, the first with image_id "
            f"{missing[0].image_id} ({missing[0].image_path}); are they of this --split?"
        )
    if num_others := len(results) - len(examples):
        log(f"{path}: {num_others:,} captions of other images are left out")
    texts = [results[str(example.image_id)] for example in examples]
    references = [list(example.captions) for example in examples]
    scores, tokenizer_name = score_with_fallback(references, texts, split_words)
    return {
        "results": str(path),
        "tokenizer": tokenizer_name,
        "scores": scores,
        "distinct captions": distinct_ratio(texts),
    }


# The command.


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; `args.has_data_options` is whether it names data."""
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
    add_options(parser.add_argument_group("data of --results (default: the run's)"), DataConfig, {"dataset": None})
    add_quiet_option(parser)
    args = parser.parse_args(argv)
    args.has_data_options = DataConfig.from_args(args) != NO_DATA
    if args.has_data_options and not args.results:
        raise InputError("a run is scored on its own data; data can be named for --results FILE only")
    if args.has_data_options and args.run:
        raise InputError("expected --run, whose data are the references, or other data; found both")
    if args.has_data_options and not (args.dataset or args.annotations):
        raise InputError("expected --dataset or --annotations with the other data options")
    if args.results and DecodeConfig.from_args(args) != DecodeConfig():
        raise InputError("--results holds captions already; --beam-size and --length-penalty are for a run")
    args.split = args.split or ("all" if args.has_data_options else "val")
    return args


def select_split(dataset: data_utils.CaptionDataset, split: str) -> list[Example]:
    """Returns the examples of a split, or of all."""
    return list(dataset.examples) if split == "all" else dataset.split(split)


def evaluate_results(args: argparse.Namespace) -> None:
    """Scores the results file of the command line, prints the scores and writes them beside the file."""
    if args.has_data_options:
        dataset = data_utils.load_dataset(DataConfig.from_args(args), with_images=False)
        source = args.annotations or args.dataset
    else:
        run = args.run or latest_run()
        dataset = inference.load_run_dataset(read_config(run), with_images=False)
        source = str(run)
    examples = select_split(dataset, args.split)
    metrics = score_file(args.results, examples)
    metrics |= {"references": source, "split": args.split, "images": len(examples)}
    print_metrics(args.results, metrics)
    write_json(args.results.parent / f"{args.results.stem}_metrics_{args.split}.json", metrics)


def evaluate_run(args: argparse.Namespace) -> None:
    """Captions and scores the split of the command line, prints the scores and writes all into the run folder."""
    captioner = inference.Captioner.load(args.run or latest_run(), DecodeConfig.from_args(args))
    examples = select_split(inference.load_run_dataset(captioner.config), args.split)
    metrics, results = score_run(captioner, examples)
    metrics |= {"split": args.split, "images": len(examples)}
    print_metrics(captioner.run, metrics)
    suffix = args.split if args.beam_size == 1 else f"{args.split}_beam{args.beam_size}"
    write_json(captioner.run / f"captions_{suffix}.json", results)
    write_json(captioner.run / f"metrics_{suffix}.json", metrics)


def print_metrics(source: Path, metrics: dict[str, Any]) -> None:
    """Prints the scores, one a line, below what was scored."""
    print(f"{source}, {metrics['split']}: {metrics['images']:,} images")
    ratios = {name: metrics[name] for name in ("distinct captions", "unfinished captions") if name in metrics}
    for name, value in {**metrics["scores"], **ratios}.items():
        print(f"{name:19} {value:6.1f}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Captions and scores a split of a run's dataset, or scores a results file."""
    args = parse(argv)
    if not has_pycocoevalcap():
        raise InputError("scoring needs pycocoevalcap, which is not installed; run `pip install pycocoevalcap`")
    if args.results:
        evaluate_results(args)
    else:
        evaluate_run(args)


if __name__ == "__main__":
    run_main(main)
