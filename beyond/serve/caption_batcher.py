"""Captions the images of several threads, such as those of a web server, together where they wait together."""

import dataclasses
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from captioning.base.cli import InputError
from captioning.config.settings import DecodeConfig
from captioning.output.captions import Caption
from inference import Captioner

MAX_BATCH = 8  # images that are captioned together; larger batches are hardly faster, and more must wait for them
MAX_SEARCHES = 200  # different settings; TensorFlow keeps a graph of several MB for each, as long as the process lives


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """An image that waits for its caption."""

    pixels: np.ndarray
    config: DecodeConfig
    caption: Future[Caption] = dataclasses.field(default_factory=Future)


class Batcher:
    """Captions the images of several threads, together those that wait at the same time for the same search."""

    def __init__(self, captioner: Captioner, max_batch: int = MAX_BATCH):
        self.captioner = captioner
        self.max_batch = max_batch
        self._worker = ThreadPoolExecutor(1)  # the only thread that computes
        self._lock = threading.Lock()  # of the two below
        self._waiting: list[_Job] = []  # in the order of their arrival
        self._searches: set[DecodeConfig] = set()

    def caption(self, pixels: np.ndarray, config: DecodeConfig, timeout: float | None = None) -> Caption:
        """Captions an image that `Captioner.load_image` has read, in `timeout` seconds.

        Raises:
            InputError: the search is new, and there were `MAX_SEARCHES` others.
            TimeoutError: it has no caption in time. Work that has begun goes on.
        """
        job = _Job(pixels, config)
        # What is a tensor in the graph compiles nothing.
        search = dataclasses.replace(config, decode_seed=0, temperature=1.0, top_p=1.0, length_penalty=1.0)
        if not config.sample:
            search = dataclasses.replace(search, beam_size=config.num_beams)
        with self._lock:
            if search not in self._searches and len(self._searches) >= MAX_SEARCHES:
                raise InputError(
                    f"expected settings that were used before: {MAX_SEARCHES} others are compiled, as many as there "
                    "is memory for until the server is started again"
                )
            self._searches.add(search)
            self._waiting.append(job)
        self._worker.submit(self._caption_waiting)
        try:
            return job.caption.result(timeout)
        finally:
            job.caption.cancel()  # if it still waits

    def _caption_waiting(self) -> None:
        """Captions the image that has waited longest, and with it others that wait for the same search."""
        with self._lock:
            same = [job for job in self._waiting if job.config == self._waiting[0].config][: self.max_batch]
            self._waiting = [job for job in self._waiting if job not in same]
        jobs = [job for job in same if job.caption.set_running_or_notify_cancel()]
        if not jobs:  # they went along with an image before them, or were given up
            return
        try:
            captioner = self.captioner.with_decoding(jobs[0].config)
            captions = captioner.caption_pixels(np.stack([job.pixels for job in jobs]))
        except Exception as error:
            for job in jobs:
                job.caption.set_exception(error)
            return
        for job, caption in zip(jobs, captions, strict=True):
            job.caption.set_result(caption)

    def finish(self) -> None:
        """Waits for the images in work, and begins no others."""
        self._worker.shutdown(cancel_futures=True)
