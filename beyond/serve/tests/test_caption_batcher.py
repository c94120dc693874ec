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


def caption_in_threads(batcher, captioner, jobs):
    """Captions a red image, and while that is in work others; returns the texts, or the errors, of the others."""
    results = [None] * len(jobs)

    def caption(index, pixels, config):
        try:
            results[index] = batcher.caption(pixels, config).text
        except Exception as error:
            results[index] = error

    captioner.may_end.clear()
    first = threading.Thread(target=batcher.caption, args=[RED, GREEDY])
    first.start()
    assert captioner.begun.wait(20)
    threads = [threading.Thread(target=caption, args=[i, *job]) for i, job in enumerate(jobs)]
    for number, thread in enumerate(threads, 1):
        thread.start()
        wait_until(lambda number=number: len(batcher._waiting) == number)
    captioner.may_end.set()
    for thread in [first, *threads]:
        thread.join(20)
    return results


def test_batcher_captions_together_what_waits_for_the_same_search():
    captioner = FakeCaptioner()
    jobs = [(GREEN, GREEDY), (RED, BEAM), (RED, GREEDY), (GREEN, BEAM)]
    texts = caption_in_threads(Batcher(captioner.service), captioner, jobs)
    assert texts == ["a green image", "a red image", "a red image", "a green image"]
    assert sorted(captioner.batches[1:], key=str) == sorted([(2, GREEDY), (2, BEAM)], key=str)


def test_batcher_makes_batches_of_limited_size():
    captioner = FakeCaptioner()
    texts = caption_in_threads(Batcher(captioner.service, max_batch=2), captioner, [(GREEN, GREEDY)] * 5)
    assert texts == ["a green image"] * 5
    assert [count for count, _ in captioner.batches] == [1, 2, 2, 1]


def test_batcher_raises_the_error_of_a_batch_and_works_after_it():
    captioner = FakeCaptioner()
    batcher = Batcher(captioner.service)
    captioner.error = ValueError("no memory")
    with pytest.raises(ValueError, match="no memory"):
        batcher.caption(RED, GREEDY)
    captioner.error = None
    assert batcher.caption(RED, GREEDY).text == "a red image"
    assert not batcher._waiting


def test_batcher_raises_an_error_if_captions_are_missing():
    captioner = FakeCaptioner()
    batcher = Batcher(caption_batcher.Service("small", GREEDY, captioner.service.load_image, lambda *_: []))
    with pytest.raises(ValueError):
        batcher.caption(RED, GREEDY)


def test_batcher_limits_the_searches_that_are_compiled(monkeypatch):
    monkeypatch.setattr(caption_batcher, "MAX_SEARCHES", 2)
    captioner = FakeCaptioner()
    batcher = Batcher(captioner.service)
    drawn = [DecodeConfig(sample=True, decode_seed=seed) for seed in range(5)]
    for config in [GREEDY, *drawn, GREEDY]:  # a seed compiles nothing
        batcher.caption(RED, config)
    with pytest.raises(InputError, match="expected settings that were used before: 2 others are compiled"):
        batcher.caption(RED, BEAM)
    assert batcher.caption(RED, GREEDY).text == "a red image"


def test_batcher_gives_up_an_image_that_waits_too_long_and_no_other():
    captioner = FakeCaptioner()
    batcher = Batcher(captioner.service)
    captioner.may_end.clear()
    texts = []
    thread = threading.Thread(target=lambda: texts.append(batcher.caption(RED, GREEDY, 0.05).text))
    thread.start()
    assert captioner.begun.wait(20)
    with pytest.raises(TimeoutError):
        batcher.caption(GREEN, GREEDY, 0.1)
    captioner.may_end.set()
    thread.join(20)
    assert texts == ["a red image"], "an image in work gets its caption, however long that takes"
    assert batcher.caption(GREEN, BEAM, 20).text == "a green image"
    assert captioner.batches == [(1, GREEDY), (1, BEAM)]
    batcher.finish()


def test_finish_waits_for_the_images_in_work():
    captioner = FakeCaptioner()
    batcher = Batcher(captioner.service)
    captioner.may_end.clear()
    thread = threading.Thread(target=batcher.caption, args=[RED, GREEDY], daemon=True)
    thread.start()
    assert captioner.begun.wait(20)
    finished = threading.Thread(target=batcher.finish, daemon=True)
    finished.start()
    finished.join(0.05)
    assert finished.is_alive()
    captioner.may_end.set()
    finished.join(20)
    thread.join(20)
    assert not finished.is_alive() and not thread.is_alive()
