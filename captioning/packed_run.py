"""A run as one .zip file."""

from pathlib import Path

from captioning.run_folder import latest_run


def open_run(run: str | Path | None) -> Path:
    """Returns a run folder; the latest one for None."""
    return Path(run) if run else latest_run()
