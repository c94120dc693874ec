"""Trains a run further on the CIDEr of captions that it samples (self-critical training), into a run of its own.

    python -m beyond.cider --run runs/coco                    # from its best weights, into runs/coco_cider
    python -m beyond.cider --run runs/coco --baseline greedy --epochs 5
    python -m beyond.cider --run runs/coco --bleu-weight 0 --cross-entropy-weight 0

The learning rate is small, since the model has converged. A run is resumed by the same command.
"""

import dataclasses
import functools
from typing import Any

import train
from beyond.cider.self_critical import CiderConfig, SelfCritical, make_reward
from beyond.start import check_start, parse_start, take_words
from captioning.base.cli import make_parser, run_main
from captioning.config.options import add_options
from captioning.config.run_config import RunConfig
from captioning.config.settings import TrainConfig
from captioning.runs.run_folder import best_checkpoint, restore_weights
from captioning.training.objective import CrossEntropy

# What scored best on Flickr8k, after `--recipe best`.
RECIPE: dict[str, Any] = {
    "epochs": 3,
    "learning_rate": 4e-5,
    "clip_norm": 0.5,
    "ema_decay": 0.998,
    "dropout": 0.3,
    "feature_dropout": 0.5,
}
# XLA cannot compile the rewards, which are computed on the CPU. Gradients of several devices would be weighed by their
# samples, and not by the words.
WITHOUT = ("recipe", "label_smoothing", "jit", "strategy")


def main(argv: list[str] | None = None, on_step: train.OnStep | None = None) -> None:
    """Trains; calls `on_step` after every step."""
    parser = make_parser(__doc__)
    add_options(parser.add_argument_group("samples and rewards"), CiderConfig)
    args = parse_start(parser, argv, RECIPE, without=WITHOUT)
    cider = CiderConfig.from_args(args)
    strategy = train.start_devices(TrainConfig.from_args(args))
    data, config = train.prepare(args)
    check_start(args.run, config)
    data, config = take_words(args.run, data, config)
    config = dataclasses.replace(config, objective=cider.to_json())
    run = args.run.with_name(f"{args.run.name}_cider")

    def make_objective(config: RunConfig) -> CrossEntropy:
        return SelfCritical(config.train, cider, make_reward(data, cider.bleu_weight))

    start = functools.partial(restore_weights, best_checkpoint(args.run))
    build = functools.partial(train.build_train_state, objective=make_objective, start=start)
    with train.open_run_folder(run, data, config, strategy):
        train.train(run, data, config, strategy, build, on_step)


if __name__ == "__main__":
    run_main(main)
