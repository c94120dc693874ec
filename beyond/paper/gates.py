"""Prints how much the paper's decoder uses the image for each word of a caption: its gate, from 0 to 1.

    python -m beyond.paper.gates photo.jpg                          # the latest run
    python -m beyond.paper.gates photo.jpg --run runs/coco --beam-size 5

The gate scales the context vector (Xu et al. 2015, section 4.2.1). The caption is inference.py's; the gates follow
from it, word by word.
"""

import numpy as np

from beyond.paper.decoder import PaperDecoder
from captioning.base.cli import InputError, make_parser, run_main
from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import START_ID
from captioning.config.settings import DecodeConfig
from captioning.output.captions import Caption
from inference import Captioner, add_model_options
from model import CaptionModel


def compute_gates(model: CaptionModel, features: tf.Tensor, tokens: list[int]) -> list[float]:
    """Returns the gate of every word of a caption.

    Args:
        model: a caption model with the paper's decoder.
        features: (1, L, C), of the image.
        tokens: the ids of the words, without <start> and <end>.
    """
    images = model.encode(features)
    state = model.initial_state(images)
    gates = []
    for token in [START_ID, *tokens[:-1]]:  # the words before each word
        gates.append(float(model.decoder.gate(state)[0, 0]))
        state = model.step(tf.constant([token]), images, state).state
    return gates


def caption_with_gates(captioner: Captioner, image: str) -> tuple[Caption, list[float]]:
    """Captions an image, and returns the caption with the gate of every word.

    Raises:
        InputError: the run has another decoder, or the image cannot be read.
    """
    if not isinstance(captioner.model.decoder, PaperDecoder):
        found = captioner.config.model.decoder
        raise InputError(f"{captioner.run}: expected a run with the paper's decoder, found the {found} decoder")
    caption = captioner.caption(image)
    features = captioner.extract_features(captioner.load_image(image)[np.newaxis])
    tokens = [captioner.tokenizer.word_index[word] for word in caption.words]
    return caption, compute_gates(captioner.model, features, tokens)


def main(argv: list[str] | None = None) -> None:
    """Captions the image of the command line, and prints a line for each word."""
    parser = make_parser(__doc__, "[option ...] image")
    parser.add_argument("image", help="file of an image")
    add_model_options(parser)
    args = parser.parse_args(argv)
    captioner = Captioner.load(args.run, DecodeConfig.from_args(args))
    caption, gates = caption_with_gates(captioner, args.image)
    print(caption.text)
    for word, gate in zip(caption.words, gates, strict=True):
        print(f"{gate:.2f} {word}")


if __name__ == "__main__":
    run_main(main)
