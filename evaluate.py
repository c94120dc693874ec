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
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import data_utils
import inference
from captioning.annotations import SPLITS, Example
from captioning.cli import InputError, add_quiet_option, log, make_parser, run_main
from captioning.config import DATA_PATHS, DataConfig, DecodeConfig, FeatureConfig
from captioning.decoding import StepModel
from captioning.feature_cache import FeatureCache, map_prefetch, open_run_cache
from captioning.files import read_json, write_json
from captioning.image_records import ImageRecords
from captioning.metrics import distinct_ratio, has_pycocoevalcap, score_with_fallback
from captioning.quiet_tensorflow import tf
from captioning.run_folder import latest_run, read_config
from captioning.settings import add_options
from captioning.text import normalize_text
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
    captioner: inference.Captioner, cache: FeatureCache, examples: list[Example]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Captions images from their cached features, and scores the captions.

    Returns:
        The metrics, and the captions as COCO results.
    """
    config = captioner.decode_config
    captions = generate_captions(captioner.model, captioner.tokenizer, cache, examples, config=config)
    texts = [caption.text for caption in captions]
    references = [list(example.captions) for example in examples]
    scores, tokenizer_name = score_with_fallback(references, texts, split_words, captioner.tokenizer.words)
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


def read_results(path: Path) -> dict[int | str, str]:
    """Reads a COCO results file.

    Returns:
        The captions by `image_id`, as the file has it: a number or a text.

    Raises:
        InputError: it is not such a file, or has two captions of one id.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("caption"), str) and type(row.get("image_id")) in (int, str)
        for row in rows
    ):
        raise InputError(f'{path}: not COCO results; expected a list of {{"image_id": ..., "caption": "..."}}')
    results: dict[int | str, str] = {}
    for row in rows:
        image_id, caption = row["image_id"], normalize_text(row["caption"])
        if image_id in results:
            raise InputError(f"{path}: expected one caption for each image, found two of image_id {image_id}")
        try:
            f"{image_id} {caption}".encode()
        except UnicodeEncodeError:  # JSON can hold half of a surrogate pair
            raise InputError(f"{path}: the caption of image_id {image_id} is not Unicode text: {caption!r}") from None
        results[image_id] = caption
    return results


class ImageIndex:
    """Finds images by what results call them: a number is an id; a text is an id, or the image's path, name or stem.

    Leading zeros of an id do not count. Of a path, a name and a stem, the longest that fits decides.
    """

    def __init__(self, examples: Sequence[Example]):
        self.by_id: defaultdict[str, set[Example]] = defaultdict(set)
        self.by_name: tuple[defaultdict[str, set[Example]], ...] = tuple(defaultdict(set) for _ in range(3))
        for example in examples:
            path = PurePosixPath(example.image_path)
            for name in {str(example.image_id), _without_zeros(str(example.image_id))}:
                self.by_id[name].add(example)
            for index, name in zip(self.by_name, (example.image_path, path.name, path.stem), strict=True):
                index[name].add(example)

    def find(self, image_id: int | str) -> Example | None:
        """Returns the image that an id or a name means, or None.

        Raises:
            InputError: it means several images.
        """
        text = str(image_id)
        found = self.by_id.get(text) or self.by_id.get(_without_zeros(text), set())
        if isinstance(image_id, str):
            found = found | next((index[text] for index in self.by_name if text in index), set())
        if len(found) > 1:
            first, second = sorted(f"{example.image_path} (id {example.image_id})" for example in found)[:2]
            raise InputError(
                f"image_id {image_id!r} means {len(found)} images, such as {first} and {second}; expected ids as "
                "numbers, or paths as the data have them"
            )
        return next(iter(found), None)


def _without_zeros(text: str) -> str:
    """Returns a number without leading zeros, and any other text as it is."""
    return text.lstrip("0") or "0" if text.isascii() and text.isdecimal() else text


def match_results(
    path: Path, results: dict[int | str, str], examples: Sequence[Example]
) -> tuple[dict[Example, str], list[int | str]]:
    """Finds the images that captions belong to.

    Args:
        path: of the results, for messages.
        results: see `read_results`.
        examples: all images of the data.

    Returns:
        The captions by image; and the ids of those that belong to none of the images.

    Raises:
        InputError: an id or a name means several images, or two of them mean the same image.
    """
    index = ImageIndex(examples)
    texts: dict[Example, str] = {}
    strangers: list[int | str] = []
    for image_id, text in results.items():
        try:
            example = index.find(image_id)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        if example is None:
            strangers.append(image_id)
        elif example in texts:
            raise InputError(
                f"{path}: expected one caption for each image, found two of image_id {example.image_id} "
                f"({example.image_path}), the second as {image_id!r}"
            )
        else:
            texts[example] = text
    return texts, strangers


def score_file(
    path: Path, examples: list[Example], all_examples: Sequence[Example] = (), words: str = "spaces"
) -> dict[str, Any]:
    """Scores a COCO results file against the reference captions of some images.

    Args:
        path: the file.
        examples: the images.
        all_examples: those of all splits, whose captions are left out; none if `examples` are all.
        words: what a word is, see `tokenizer.split_words`.

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
    scores, tokenizer_name = score_with_fallback(references, texts, split_words, words)
    return {
        "results": str(path),
        "tokenizer": tokenizer_name,
        "scores": scores,
        "distinct captions": distinct_ratio(texts),
    }


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
        raise InputError("--results holds captions already; --beam-size and --length-penalty are for a run")
    args.split = args.split or ("all" if args.other_data else "val")
    return args


def select_split(dataset: data_utils.CaptionDataset, split: str) -> list[Example]:
    """Returns the examples of a split, or of all."""
    return list(dataset.examples) if split == "all" else dataset.split(split)


def evaluate_results(args: argparse.Namespace) -> None:
    """Scores the results file of the command line, prints the scores and writes them beside the file."""
    if args.other_data:
        data_config = args.other_data
        dataset = data_utils.load_dataset(data_config, with_images=False)
        source = args.annotations or args.dataset
    else:
        run = args.run or latest_run()
        config = read_config(run)
        locations = data_utils.locations_from_args(args)
        data_config, dataset = config.data, data_utils.load_run_dataset(config, False, locations)
        source = str(run)
    examples = select_split(dataset, args.split)
    metrics = score_file(args.results, examples, dataset.examples, data_config.words)
    metrics |= {"references": source, "split": args.split, "images": len(examples)}
    print_metrics(args.results, metrics)
    write_json(args.results.parent / f"{args.results.stem}_metrics_{args.split}.json", metrics)


def evaluate_run(args: argparse.Namespace) -> None:
    """Captions and scores the split of the command line, prints the scores and writes all into the run folder."""
    captioner = inference.Captioner.load(args.run or latest_run(), DecodeConfig.from_args(args))
    manifest = captioner.config.features
    cache = open_run_cache(manifest | {"folder": args.features_dir or manifest["folder"]})
    dataset = data_utils.load_run_dataset(captioner.config, locations=data_utils.locations_from_args(args))
    examples = select_split(dataset, args.split)
    check_features(cache, dataset.image_dir, examples)
    metrics, results = score_run(captioner, cache, examples)
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
