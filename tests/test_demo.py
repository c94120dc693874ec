import numpy as np
import pytest

import demo
from inference import Caption


def test_attention_on_object_matches_hand_computed_values():
    attention = np.zeros((3, 64))
    attention[2, 0] = 0.75  # the location in the upper left corner
    attention[2, 63] = 0.25
    shapes = [
        {"colour": "red", "noun": "circle", "box": [0, 0, 299 / 8, 299 / 16]},  # the upper half of that location
        {"colour": "blue", "noun": "circle", "box": [0, 0, 299, 299]},
    ]
    caption = Caption(("a", "red", "circle"), (1.0,) * 3, attention, True)
    assert demo.attention_on_object(caption, shapes) == [(pytest.approx(0.75 / 2), pytest.approx(0.5 / 64))]


def test_attention_on_object_ignores_shapes_that_do_not_exist():
    shapes = [{"colour": "red", "noun": "circle", "box": [0, 0, 10, 10]}]
    caption = Caption(("a", "green", "circle"), (1.0,) * 3, np.zeros((3, 64)), True)
    assert demo.attention_on_object(caption, shapes) == []
