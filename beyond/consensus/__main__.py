"""Makes the index that `--choose consensus` looks similar training images up in, and prints its path.

Tutorial section: none. After Mao et al. 2015 (m-RNN, section 8) and Devlin et al. 2015.

    python -m beyond.consensus --run runs/coco
    python inference.py photo.jpg --choose consensus      # makes it, too, if there is none yet
    python evaluate.py --choose consensus

It is made from the cached features, or, of a run whose CNN was trained, from the images.
"""

import argparse
import os

import data_utils
import evaluate
from beyond.consensus.index import INDEX_FILE, build_index, save_index
from captioning.base.cli import InputError, add_quiet_option, make_parser, print_results, run_main
from captioning.config.options import add_options
from captioning.config.settings import FeatureConfig
from inference import Captioner


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--run", metavar="DIR", help="run folder (default: the latest in runs/)")
    group = parser.add_argument_group("features of the run, if they were moved")
    add_options(group, FeatureConfig, only=("features_dir",))
    data_utils.add_location_options(parser)
    add_quiet_option(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Makes the index of a run."""
    args = parse(argv)
    captioner = Captioner.load(args.run)
    if not os.access(captioner.run, os.W_OK):
        raise InputError(f"{captioner.run}: expected a folder that can be written, for {INDEX_FILE}")
    cache = evaluate.open_features(captioner, args.features_dir)
    # Downloads what is missing of the data; images only if there are no features.
    dataset = data_utils.load_run_dataset(captioner.config, cache is None, data_utils.locations_from_args(args))
    path = captioner.run / INDEX_FILE
    save_index(build_index(captioner, dataset, cache), path)
    print_results(path)


if __name__ == "__main__":
    run_main(main)
