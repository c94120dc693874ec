"""Exports a trained run, for programs without this project and for other devices.

Tutorial section: none.

    python -m beyond.export --run runs/coco                    # coco_saved_model/: pixels in, captions out
    python -m beyond.export --run runs/coco --with-decoder     # image files in, too
    python -m beyond.export --run runs/coco --beam-size 5 --captions 3 --output captioner/
    python -m beyond.export --run runs/coco --litert           # coco.tflite, for phones: pixels in, ids out

The settings of the search are fixed at export. README.md shows how each form is used, and how far its captions
differ from those of inference.py.
"""

import argparse
from pathlib import Path

from beyond.export.litert import convert, is_litert
from beyond.export.saved_model import ExportedModel, save
from captioning.base.cli import InputError, add_quiet_option, format_bytes, log, make_parser, print_results, run_main
from captioning.base.files import atomic_write, check_output
from captioning.config.settings import DecodeConfig
from inference import Captioner, add_model_options
from tokenizer import is_vocabulary


def check_litert_output(path: Path) -> Path:
    """Returns the file of the vocabulary beside a LiteRT file; raises InputError if one of them is something else."""
    check_output("--output", path, is_litert)
    vocabulary = path.with_name(f"{path.stem}_vocabulary.json")
    check_output("--output", vocabulary, is_vocabulary)
    return vocabulary


def export_litert(captioner: Captioner, path: Path, weights: str) -> None:
    """Writes a LiteRT file, and its vocabulary as JSON beside it.

    Raises:
        InputError: the converter cannot take these settings, or one of the files is something else.
        OSError: a file cannot be written.
    """
    vocabulary = check_litert_output(path)
    content = convert(captioner, weights)
    with atomic_write(path, "wb") as file:
        file.write(content)
    captioner.tokenizer.save(vocabulary)
    log(f"vocabulary: {vocabulary}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser(__doc__)
    group = parser.add_argument_group("form (default: a SavedModel that takes pixels)")
    forms = group.add_mutually_exclusive_group()
    text = "add a signature to the SavedModel that reads image files; its pixels differ slightly from the training's"
    forms.add_argument("--with-decoder", action="store_true", help=text)
    text = "write a LiteRT file, and its vocabulary as JSON beside it: pixels in; ids, probabilities and attention out"
    forms.add_argument("--litert", action="store_true", help=text)
    text = "number format of the weights in a LiteRT file (default: float32)"
    group.add_argument("--weights", choices=("float16", "float32"), help=text)
    text = "folder of the SavedModel, or LiteRT file (default: <run>_saved_model or <run>.tflite)"
    group.add_argument("--output", type=Path, metavar="PATH", help=text)
    add_model_options(parser)
    add_quiet_option(parser)
    args = parser.parse_args(argv)
    if args.weights and not args.litert:
        raise InputError("--weights is only for --litert; a SavedModel keeps the weights as they are")
    if args.litert and args.output:
        check_litert_output(args.output)
    if args.sample:
        raise InputError("--sample cannot be exported; expected greedy search or a beam search")
    if args.choose != "probability":
        raise InputError(f"--choose {args.choose} cannot be exported: it needs the captions of the training images")
    if args.litert and args.no_repeat:
        raise InputError("--no-repeat needs TensorFlow's TensorScatterMin, which LiteRT lacks; leave it out")
    return args


def main(argv: list[str] | None = None) -> None:
    """Exports a run in the form of the command line, and prints the path."""
    args = parse(argv)
    captioner = Captioner.load(args.run, DecodeConfig.from_args(args))
    log(f"run: {captioner.run}")
    log(f"decoding (fixed): {captioner.decode_config.describe()}, at most {captioner.decode_config.max_words} words")
    output = args.output or Path(captioner.run.resolve().name + (".tflite" if args.litert else "_saved_model"))
    if args.litert:
        export_litert(captioner, output, args.weights or "float32")
    else:
        save(ExportedModel(captioner, args.with_decoder), output)
    files = [path for path in output.rglob("*") if path.is_file()] if output.is_dir() else [output]
    log(f"size: {format_bytes(sum(path.stat().st_size for path in files))}")
    print_results(output)


if __name__ == "__main__":
    run_main(main)
