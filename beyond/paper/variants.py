"""The decoders of --decoder paper and paper-lstm, and of --attention hard, for captioning/config/guests.py."""

from beyond.paper.decoder import PaperDecoder, PaperLSTMDecoder
from beyond.paper.hard_attention import with_hard_attention
from beyond.paper.objective import PaperObjective
from captioning.config.run_config import RunConfig
from captioning.config.settings import ModelConfig
from captioning.training.objective import CrossEntropy
from model import RNNDecoder

DECODERS = {"tutorial": RNNDecoder, "paper": PaperDecoder, "paper-lstm": PaperLSTMDecoder}


def build_decoder(config: ModelConfig) -> RNNDecoder:
    """Builds the decoder that the settings ask for."""
    decoder = DECODERS[config.decoder]
    return (with_hard_attention(decoder) if config.attention == "hard" else decoder)(config)


def make_objective(config: RunConfig) -> CrossEntropy:
    """Makes what such a model is trained on."""
    return PaperObjective(config)
