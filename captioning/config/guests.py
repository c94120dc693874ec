"""What a value of an option asks for from outside the core: modules of beyond/, by that value.

They are named as text and imported when they are asked for, so that nothing in the core depends on them.
"""

import importlib
from types import ModuleType

GUESTS = {
    "--decoder paper": "beyond.paper.variants",
    "--decoder paper-lstm": "beyond.paper.variants",
    "--attention hard": "beyond.paper.variants",
    "--choose consensus": "beyond.consensus.chooser",
    "--run ZIP": "beyond.share.packed_run",  # or the address of one
}


def load_guest(value: str) -> ModuleType:
    """Imports the module that a value of an option asks for, a key of `GUESTS`."""
    return importlib.import_module(GUESTS[value])


def find_model_guest(decoder: str, attention: str) -> ModuleType | None:
    """Imports the module that builds a decoder with an attention, and what it minimises; None for the tutorial's.

    Such a module has `build_decoder(config: ModelConfig)`, which returns a `model.RNNDecoder`, and
    `make_objective(config: RunConfig)`, which returns a `captioning.training.objective.CrossEntropy`.
    """
    values = (f"--decoder {decoder}", f"--attention {attention}")
    return next((load_guest(value) for value in values if value in GUESTS), None)
