import threading

import numpy as np
import pytest
from helpers.web import FakeCaptioner, wait_until

from beyond.serve import caption_batcher
from beyond.serve.caption_batcher import Batcher
from captioning.base.cli import InputError
from captioning.config.settings import DecodeConfig

RED, GREEN = (np.full((8, 8, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 255, 0)))
GREEDY, BEAM = DecodeConfig(), DecodeConfig(beam_size=3)


@pytest.fixture
def captioner():
    return FakeCaptioner()


def start(batcher, texts, pixels, config):
    """Captions an image in a thread, which appends the text to a list."""
    target = lambda: texts.append(batcher.caption(pixels, config).text)  # noqa: E731
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def test_batcher_captions_together_what_waits_for_the_same_search(captioner):
    batcher, texts = Batcher(captioner, max_batch=2), []
    captioner.may_end.clear()
    threads = [start(batcher, texts, RED, GREEDY)]
    assert captioner.begun.wait(20)
    for number, job in enumerate([(GREEN, GREEDY), (RED, BEAM), (RED, GREEDY), (GREEN, BEAM), (RED, BEAM)], 1):
        threads.append(start(batcher, texts, *job))
        wait_until(lambda number=number: len(batcher._waiting) == number)
    captioner.may_end.set()
    for thread in threads:
        thread.join(20)
    assert sorted(texts) == ["a green image"] * 2 + ["a red image"] * 4
    assert captioner.batches == [(1, GREEDY), (2, GREEDY), (2, BEAM), (1, BEAM)]


def test_batcher_raises_the_error_of_a_batch_and_works_after_it(captioner):
    batcher = Batcher(captioner)
    captioner.error = ValueError("no memory")
    with pytest.raises(ValueError, match="no memory"):
        batcher.caption(RED, GREEDY)
    captioner.error = None
    assert batcher.caption(RED, GREEDY).text == "a red image"


def test_batcher_limits_the_searches_that_are_compiled(captioner, monkeypatch):
    monkeypatch.setattr(caption_batcher, "MAX_SEARCHES", 2)
    batcher = Batcher(captioner)
    drawn = [DecodeConfig(sample=True, decode_seed=n, temperature=1 + n / 9, top_p=1 - n / 9) for n in range(5)]
    for config in [GREEDY, *drawn, GREEDY]:  # which compile nothing
        batcher.caption(RED, config)
    with pytest.raises(InputError, match="expected settings that were used before: 2 others are compiled"):
        batcher.caption(RED, BEAM)
    monkeypatch.setattr(caption_batcher, "MAX_SEARCHES", 3)
    batcher.caption(RED, DecodeConfig(captions=5))
    for config in (DecodeConfig(captions=5, beam_size=5), DecodeConfig(captions=5, length_penalty=0.5)):
        batcher.caption(RED, config)
    with pytest.raises(InputError, match="3 others are compiled"):
        batcher.caption(RED, DecodeConfig(captions=4, beam_size=5))
    assert batcher.caption(RED, GREEDY).text == "a red image"


def test_batcher_gives_up_an_image_that_takes_too_long_and_no_other(captioner):
    batcher = Batcher(captioner)
    captioner.may_end.clear()
    for pixels in (RED, GREEN):  # one in work, and one that waits
        with pytest.raises(TimeoutError):
            batcher.caption(pixels, GREEDY, 0.1)
    captioner.may_end.set()
    assert batcher.caption(GREEN, BEAM, 20).text == "a green image"
    assert captioner.batches == [(1, GREEDY), (1, BEAM)]


def test_finish_waits_for_the_images_in_work(captioner):
    batcher, texts = Batcher(captioner), []
    captioner.may_end.clear()
    thread = start(batcher, texts, RED, GREEDY)
    assert captioner.begun.wait(20)
    finished = threading.Thread(target=batcher.finish, daemon=True)
    finished.start()
    finished.join(0.05)
    assert finished.is_alive()
    captioner.may_end.set()
    finished.join(20)
    thread.join(20)
    assert texts == ["a red image"] and not finished.is_alive()
