"""The decoders of --decoder paper and paper-lstm, and of --attention hard, for captioning/config/guests.py."""

from beyond.paper.decoder import PaperDecoder, PaperLSTMDecoder
from beyond.paper.hard_attention import HardTeacherForcing
from beyond.paper.objective import PaperObjective
from captioning.config.settings import ModelConfig
from model import RNNDecoder

DECODERS = {"tutorial": RNNDecoder, "paper": PaperDecoder, "paper-lstm": PaperLSTMDecoder}

make_objective = PaperObjective


def build_decoder(config: ModelConfig) -> RNNDecoder:
    """Builds the decoder that the settings ask for."""
    decoder = DECODERS[config.decoder]
    if config.attention == "hard":
        return type(f"Hard{decoder.__name__}", (HardTeacherForcing, decoder), {})(config)
    return decoder(config)
