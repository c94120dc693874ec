"""Prints how much the paper's decoder uses the image for each word of a caption: its gate, from 0 to 1.

    python -m beyond.paper.gates photo.jpg                          # the latest run
    python -m beyond.paper.gates photo.jpg --run runs/coco --beam-size 5

The gate scales the context vector (Xu et al. 2015, section 4.2.1). The caption is inference.py's; the gates follow
from it, word by word.
"""

import numpy as np

from beyond.paper.decoder import PaperDecoder
from captioning.base.cli import InputError, make_parser, print_results, run_main
from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import START_ID
from captioning.config.settings import DecodeConfig
from inference import Captioner, add_model_options
from model import CaptionModel


def compute_gates(model: CaptionModel, features: tf.Tensor, tokens: list[int]) -> list[float]:
    """Returns the gate of every word of a caption, given its ids and the features (1, L, C) of its image."""
    images = model.encode(features)
    state = model.initial_state(images)
    gates = []
    for token in [START_ID, *tokens][: len(tokens)]:  # the words before each word
        gates.append(float(model.decoder.gate(state)[0, 0]))
        state = model.step(tf.constant([token]), images, state).state
    return gates


def main(argv: list[str] | None = None) -> None:
    """Captions the image of the command line, and prints a line for each word."""
    parser = make_parser(__doc__, "[option ...] image")
    parser.add_argument("image", help="file of an image")
    add_model_options(parser)
    args = parser.parse_args(argv)
    captioner = Captioner.load(args.run, DecodeConfig.from_args(args))
    if not isinstance(captioner.model.decoder, PaperDecoder):
        found = captioner.config.model.decoder
        raise InputError(f"{captioner.run}: expected a run with the paper's decoder, found the {found} decoder")
    caption = captioner.caption(args.image)
    features = captioner.extract_features(captioner.load_image(args.image)[np.newaxis])
    tokens = [captioner.tokenizer.word_index[word] for word in caption.words]
    gates = compute_gates(captioner.model, features, tokens)
    print_results(caption.text)
    for word, gate in zip(caption.words, gates, strict=True):
        print_results(f"{gate:.2f} {word}")


if __name__ == "__main__":
    run_main(main)
