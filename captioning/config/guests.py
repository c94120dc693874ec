"""What a value of an option asks for from outside the core: modules of beyond/, by that value.

They are named as text and imported when they are asked for, so that nothing in the core depends on them.
"""

import importlib
from types import ModuleType

GUESTS = {
    "--decoder paper": "beyond.paper.decoder",
    "--decoder paper-lstm": "beyond.paper.decoder",
    "--attention hard": "beyond.paper.hard_attention",
    "--run ZIP": "beyond.share.packed_run",  # or the address of one
}


def load_guest(value: str) -> ModuleType:
    """Imports the module that a value of an option asks for, a key of `GUESTS`."""
    return importlib.import_module(GUESTS[value])
