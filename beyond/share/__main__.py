"""Packs a run as one .zip to share, or unpacks one.

Tutorial section: none.

    python -m beyond.share runs/coco                    # coco.zip: weights, vocabulary, settings, scores, a model card
    python -m beyond.share coco.zip                     # unpacks it into runs/coco/
    python -m beyond.share https://example.com/coco.zip --output runs/theirs

`--run coco.zip` captions and scores with it, too, without unpacking it first.
"""

import argparse
from pathlib import Path

from beyond.share.packed_run import fetch_zip, is_packed_run, read_members, unpack_run
from beyond.share.run_packer import pack_run, run_name
from captioning.base.cli import InputError, add_quiet_option, format_bytes, log, make_parser, print_results, run_main
from captioning.base.files import check_output
from captioning.runs.run_folder import latest_run


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser(__doc__, "[RUN] [option ...]")
    group = parser.add_mutually_exclusive_group()
    text = "a run folder to pack (default: the latest in runs/); or a .zip, or its https address, to unpack"
    group.add_argument("run", nargs="?", metavar="RUN", default=argparse.SUPPRESS, help=text)
    group.add_argument("--run", metavar="RUN", help="the same, as the other commands take it")
    text = "file to pack into (default: <run>.zip), or run folder to unpack into (default: runs/<run>)"
    parser.add_argument("--output", type=Path, metavar="PATH", help=text)
    text = "pack the index of --choose consensus, too: with it, all captions of the training images"
    parser.add_argument("--with-consensus", action="store_true", help=text)
    add_quiet_option(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Packs or unpacks what the command line names, and prints the path of the result."""
    args = parse(argv)
    run = Path(args.run) if args.run is not None else latest_run()
    if not run.is_dir() and args.with_consensus:
        raise InputError("--with-consensus is for packing a run folder, and this is unpacked; omit it")
    if not run.is_dir():
        packed = fetch_zip(args.run)
        output = args.output or Path("runs") / read_members(packed)[0]
        unpack_run(packed, output)
    else:
        output = args.output or Path(f"{run_name(run)}.zip")
        check_output("--output", output, is_packed_run)
        log(f"run: {run}")
        pack_run(run, output, args.with_consensus)
        log(f"size: {format_bytes(output.stat().st_size)}")
    print_results(output)


if __name__ == "__main__":
    run_main(main)
