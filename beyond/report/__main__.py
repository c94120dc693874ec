"""Writes an HTML page of images with their captions, which shows the attention for each word.

    python -m beyond.report photos/ --html report.html                # all images in a folder
    python -m beyond.report --html report.html                        # a few test images of the latest run
    python -m beyond.report --split val --html report.html            # a whole split, scored, the worst captions first

All options of inference.py are possible, or with --split all options of evaluate.py; see their --help.
"""

from pathlib import Path

from PIL import Image

import evaluate
import inference
from beyond.report.report import is_report, open_report
from captioning.base.cli import InputError, log, make_parser, run_main
from captioning.base.files import check_output
from captioning.config.settings import DecodeConfig
from captioning.data.annotations import SPLITS
from captioning.images.reading import map_threads, read_image
from captioning.output.plots import thumbnail
from captioning.output.results import CaptionedImage


def caption_images(page: Path, argv: list[str]) -> None:
    """Captions images as inference.py does with these arguments, and shows them on a page."""
    args = inference.parse(argv)
    captioner = inference.load_captioner(args)
    with open_report(page, f"run {captioner.run.resolve().name}; {captioner.decode_config.describe()}") as report:
        num_failed = inference.caption_from_args(args, captioner, [report])
    inference.check_all_captioned(num_failed, args)


def evaluate_split(page: Path, argv: list[str]) -> None:
    """Captions and scores a split as evaluate.py does with these arguments, and shows its images on a page."""
    args = evaluate.parse(argv)
    if args.results:
        raise InputError("--results has no attention; --html is for a run")
    write_evaluation(page, evaluate.evaluate_run(args))


def write_evaluation(page: Path, evaluation: evaluate.Evaluation) -> None:
    """Writes a page of scored images, the worst CIDEr first, without those that cannot be read, which is logged."""
    metrics = evaluation.metrics
    search = DecodeConfig(**{name: metrics[name] for name in DecodeConfig().to_json()}).describe()
    scores = ", ".join(f"{name} {metrics['scores'][name]:.1f}" for name in ("BLEU-4", "CIDEr"))
    subtitle = f"run {Path(metrics['run']).resolve().name}, {metrics['split']} images, {search}: {scores}"
    ciders = evaluation.by_image["CIDEr"]

    def load(index: int) -> Image.Image | InputError:
        try:
            return thumbnail(read_image(evaluation.image_dir / evaluation.examples[index].image_path))
        except InputError as error:
            return error

    worst_first = sorted(range(len(ciders)), key=ciders.__getitem__)
    with open_report(page, subtitle) as report:
        for index, image in map_threads(load, worst_first, inference.NUM_AHEAD * inference.BATCH_SIZE):
            if isinstance(image, InputError):
                log(f"left out of {page}: {image}", error=True)
                continue
            example = evaluation.examples[index]
            result = CaptionedImage(example.image_path, image, evaluation.captions[index], example.captions)
            report.write(result, score=ciders[index])


def main(argv: list[str] | None = None) -> None:
    """Writes the page of the command line."""
    parser = make_parser(__doc__, "--html FILE [--split SPLIT] [option ...] [image ...]")
    parser.add_argument("--html", type=Path, metavar="FILE", required=True, help="write the page into this file")
    parser.add_argument("--split", choices=(*SPLITS, "all"), help="caption and score this split of the run's dataset")
    args, others = parser.parse_known_args(argv)
    check_output("--html", args.html, is_report)
    if args.split:
        evaluate_split(args.html, ["--split", args.split, *others])
    else:
        caption_images(args.html, others)


if __name__ == "__main__":
    run_main(main)
