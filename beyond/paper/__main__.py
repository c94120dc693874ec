"""Trains the decoder of Show, Attend and Tell, soft or hard attention, with the paper's penalty and REINFORCE.

    python -m beyond.paper                                          # the paper's decoder with a GRU, on COCO
    python -m beyond.paper --decoder paper-lstm --attention hard
    python -m beyond.paper --decoder tutorial --doubly-stochastic 1
    python -m beyond.paper --attention hard --reinforce-weight 0.5 --entropy-weight 0.01

The options of train.py work here, too, but not --start, --keep-words and --dry-run. `python train.py --decoder paper
--attention hard` trains the same with the default weights. A run is resumed by the same command.
"""

import dataclasses
import functools
from pathlib import Path

import train
from beyond.paper.objective import PaperConfig, PaperObjective
from captioning.base.cli import log, make_parser, run_main
from captioning.config.options import add_options
from captioning.config.settings import TrainConfig


def main(argv: list[str] | None = None, on_step: train.OnStep | None = None) -> None:
    """Prepares data, features and vocabulary, and trains; calls `on_step` after every step."""
    parser = make_parser(__doc__)
    parser.add_argument("--run", type=Path, metavar="DIR", help="run folder (default: runs/<name of the dataset>)")
    add_options(parser.add_argument_group("the paper's objective"), PaperConfig)
    train.add_train_options(parser, train.find_defaults(argv)[0] | {"decoder": "paper"})
    args = parser.parse_args(argv)
    args.run = args.run or train.default_run(args)
    paper, defaults = PaperConfig.from_args(args), PaperConfig()
    for name in ("reinforce_weight", "entropy_weight"):
        if args.attention != "hard" and getattr(paper, name) != getattr(defaults, name):
            log(f"--{name.replace('_', '-')} changes nothing without --attention hard")
    strategy = train.start_devices(TrainConfig.from_args(args))
    train.check_settings(args)
    data, config = train.prepare(args)
    # Defaults are left out, as train.py knows nothing of them.
    settings = {name: value for name, value in paper.to_json().items() if value != getattr(defaults, name)}
    config = dataclasses.replace(config, objective=settings)
    build = functools.partial(train.build_train_state, objective=PaperObjective)
    with train.open_run_folder(args.run, data, config, strategy):
        train.train(args.run, data, config, strategy, build, on_step)


if __name__ == "__main__":
    run_main(main)
