"""Captions the images of several threads, such as those of a web server, together where they wait together."""

import dataclasses
import threading
from collections.abc import Callable, Sequence

import numpy as np

from captioning.base.cli import InputError
from captioning.config.settings import DecodeConfig
from captioning.output.captions import Caption

MAX_BATCH = 8  # images that are captioned together; larger batches are hardly faster, and more must wait for them
MAX_SEARCHES = 200  # different settings; TensorFlow keeps a graph of several MB for each, as long as the process lives


@dataclasses.dataclass(frozen=True)
class Service:
    """What the server needs of a captioner.

    Attributes:
        run: the name of the run, for people.
        defaults: how captions are searched for if a request does not say it.
        load_image: turns the content of a file into pixels; raises InputError if it is no image. Called by several
            threads at the same time.
        caption_batch: captions pixels. Called by one thread at a time.
    """

    run: str
    defaults: DecodeConfig
    load_image: Callable[[bytes], np.ndarray]
    caption_batch: Callable[[Sequence[np.ndarray], DecodeConfig], Sequence[Caption]]


@dataclasses.dataclass(eq=False)
class _Job:
    """An image that waits for its caption."""

    pixels: np.ndarray
    config: DecodeConfig
    caption: Caption | None = None
    error: Exception | None = None


class Batcher:
    """Captions the images of several threads, together those that wait at the same time for the same search."""

    def __init__(self, service: Service, max_batch: int = MAX_BATCH):
        self.service, self.max_batch = service, max_batch
        self._model_lock = threading.Lock()
        self._waiting: list[_Job] = []  # in the order of their arrival; taken from only by who has the lock
        self._searches: set[DecodeConfig] = set()

    def caption(self, pixels: np.ndarray, config: DecodeConfig) -> Caption:
        """Captions an image.

        Raises:
            InputError: the search is new, and there were `MAX_SEARCHES` others.
            Exception: what `Service.caption_batch` raises.
        """
        self._note_search(dataclasses.replace(config, decode_seed=0))
        job = _Job(pixels, config)
        self._waiting.append(job)
        with self._model_lock:
            if job.caption is None and job.error is None:  # nobody who had the lock before has taken it along
                self._caption_waiting(job)
        if job.error:
            raise job.error
        assert job.caption is not None
        return job.caption

    def _note_search(self, search: DecodeConfig) -> None:
        """Counts a search; raises InputError if there are too many."""
        if search not in self._searches and len(self._searches) >= MAX_SEARCHES:
            raise InputError(
                f"expected settings that were used before: {MAX_SEARCHES} others are compiled, as many as there is "
                "memory for until the server is started again"
            )
        self._searches.add(search)

    def _caption_waiting(self, first: _Job) -> None:
        """Captions an image, and with it others that wait for the same search."""
        others = [job for job in list(self._waiting) if job.config == first.config and job is not first]
        jobs = [first, *others[: self.max_batch - 1]]
        for job in jobs:
            self._waiting.remove(job)
        try:
            captions = self.service.caption_batch([job.pixels for job in jobs], first.config)
            for job, caption in zip(jobs, captions, strict=True):
                job.caption = caption
        except Exception as error:
            for job in jobs:
                job.error = error

    def finish(self) -> None:
        """Waits for the images in work, and lets no others begin."""
        self._model_lock.acquire()
