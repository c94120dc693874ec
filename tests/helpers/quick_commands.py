"""Commands without what takes long and is tested elsewhere."""

import contextlib
import functools

import pytest
from helpers.train_and_kill import build_small_cnn

import features
import model
from captioning.scores import metrics


@contextlib.contextmanager
def quick_commands():
    """Replaces InceptionV3 by an image's mean colours, and saves time, while the block runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "build_feature_extractor", build_small_cnn)
        patch.setattr(model, "build", functools.cache(model.build))  # so that decoding is traced once
        patch.setattr(model, "fused_decoder_matches", functools.cache(model.fused_decoder_matches))
        patch.setattr(metrics, "has_java", lambda: False)  # METEOR's Java program takes seconds to start
        yield
