"""Exports a trained run, for use without this project or on other machines.

Tutorial section: none.

    python -m beyond.export --run runs/coco                            # coco_saved_model/: image bytes in, captions out
    python -m beyond.export --run runs/coco --beam-size 5 --captions 3 --output captioner/
    python -m beyond.export --run runs/coco --litert                    # coco.tflite, for phones: pixels in, ids out
    python -m beyond.export --run runs/coco --pack                      # coco.zip: `--run coco.zip` takes it anywhere
    python -m beyond.export --run runs/coco --pack --weights float32    # the weights as they are, not rounded

The search is fixed in what is exported, except in a .zip. docs/export.md shows how each form is used, and how far
its captions are those of inference.py.
"""

import argparse
from pathlib import Path

from beyond.export.exported_model import ExportedModel, check_exportable, save
from beyond.export.litert_model import LiteRTModel, check_convertible, convert
from beyond.share.model_weights import DTYPES
from beyond.share.packed_run import open_run
from beyond.share.run_packer import pack_run, run_name
from captioning.base.cli import InputError, add_quiet_option, format_bytes, log, make_parser, run_main
from captioning.base.files import atomic_write
from captioning.config.settings import DecodeConfig
from inference import Captioner, add_model_options


def export_saved_model(captioner: Captioner, folder: Path) -> None:
    """Writes a SavedModel; see `beyond.export.exported_model`."""
    model = ExportedModel(
        captioner.extractor,
        captioner.model,
        captioner.tokenizer,
        captioner.decode_config,
        captioner.config.features["dtype"],
        captioner.min_jpeg_side,
        captioner.image_size,
    )
    save(model, folder)


def export_litert(captioner: Captioner, path: Path, weights: str) -> Path:
    """Writes a LiteRT file, and the words of the ids as JSON beside it, whose path is returned."""
    dtype = captioner.config.features["dtype"]
    model = LiteRTModel(captioner.extractor, captioner.model, captioner.decode_config, dtype, captioner.image_size)
    content = convert(model, weights)
    with atomic_write(path, "wb") as file:
        file.write(content)
    vocabulary = path.with_name(f"{path.stem}_vocabulary.json")
    captioner.tokenizer.save(vocabulary)
    return vocabulary


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser(__doc__)
    group = parser.add_argument_group("form (default: a SavedModel)")
    forms = group.add_mutually_exclusive_group()
    text = "a LiteRT file, and its vocabulary as JSON beside it: pixels in, ids, probabilities and attention out"
    forms.add_argument("--litert", action="store_true", help=text)
    text = "the run as one .zip: weights, vocabulary, settings, scores and a model card, without paths of this machine"
    forms.add_argument("--pack", action="store_true", help=text)
    text = "number format of the weights of --pack (default: float16) and of --litert (default: float32)"
    group.add_argument("--weights", choices=DTYPES, help=text)
    text = "folder of the SavedModel, or file (default: <run>_saved_model, <run>.tflite or <run>.zip)"
    group.add_argument("--output", type=Path, metavar="PATH", help=text)
    add_model_options(parser)
    add_quiet_option(parser)
    args = parser.parse_args(argv)
    if args.weights and not (args.litert or args.pack):
        raise InputError("--weights is for --pack and --litert; a SavedModel has the weights as they are")
    if args.pack and DecodeConfig.from_args(args) != DecodeConfig():
        raise InputError("--pack leaves the search open; give --beam-size and the like to inference.py")
    check = check_convertible if args.litert else check_exportable
    check(DecodeConfig.from_args(args))
    return args


def main(argv: list[str] | None = None) -> None:
    """Exports a run in the form of the command line, and prints the path."""
    args = parse(argv)
    run = open_run(args.run)
    log(f"run: {run}")
    ending = ".zip" if args.pack else ".tflite" if args.litert else "_saved_model"
    output = args.output or Path(f"{run_name(run)}{ending}")
    if (args.pack or args.litert) and output.is_dir():
        raise InputError(f"--output {output}: expected a file that ends in {ending}, found a folder")
    if args.pack:
        pack_run(run, output, args.weights or "float16")
    else:
        captioner = Captioner.load(run, DecodeConfig.from_args(args))
        log(f"fixed in it: {captioner.decode_config.describe()}, at most {captioner.decode_config.max_words} words")
        if args.litert:
            vocabulary = export_litert(captioner, output, args.weights or "float32")
            log(f"the words of its ids: {vocabulary}")
        else:
            export_saved_model(captioner, output)
    files = [path for path in output.rglob("*") if path.is_file()] if output.is_dir() else [output]
    log(f"size: {format_bytes(sum(path.stat().st_size for path in files))}")
    print(output)


if __name__ == "__main__":
    run_main(main)
