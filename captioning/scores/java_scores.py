"""The scores that are Java programs: METEOR, which comes with pycocoevalcap, and SPICE, which downloads its parser."""

import contextlib
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator

from captioning.base.cli import InputError, log

NEED_JAVA = "it needs Java (Debian, Ubuntu, Colab: apt-get install default-jre-headless)"
NEEDS = {  # what the programs need; they do not tell what they lack
    "METEOR": "2 GB of memory, and a folder without a space in its path",
    "SPICE": "8 GB of memory, and in its folder, which it writes into, lib/ with what it downloads the first time: the "
    "two .jar files of http://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip",
}
# From Java 16 on SPICE's libraries may not look into Java's own objects, and it fails before the first caption.
SPICE_JAVA_VERSIONS = range(8, 16)


def java_version() -> int | None:
    """Returns the version of Java, such as 8 or 17; 0 if it does not tell, and None if there is no Java."""
    if not shutil.which("java"):
        return None
    # It is run to find out: macOS has a `java` that only prints where to download one.
    done = subprocess.run(["java", "-version"], capture_output=True, text=True)
    if done.returncode != 0:
        return None
    version = re.search(r'version "(?:1\.)?(\d+)', done.stderr)  # Java 8 is "1.8.0"
    return int(version[1]) if version else 0


def has_java() -> bool:
    """Tells whether Java runs."""
    return java_version() is not None


def check_spice() -> None:
    """Checks, before captions are generated, that there is a Java that SPICE runs in; raises InputError if not."""
    version = java_version()
    if version not in SPICE_JAVA_VERSIONS:
        found = "none" if version is None else f"Java {version or 'of an unknown version'}"
        raise InputError(
            f"--spice needs Java {SPICE_JAVA_VERSIONS[0]} to {SPICE_JAVA_VERSIONS[-1]}, found {found}; put the java of "
            "version 8 or 11 first in PATH (https://adoptium.net has them)"
        )


def compute_java_score(
    name: str, references: dict[int, list[str]], captions: dict[int, list[str]]
) -> tuple[float, list[float]] | None:
    """Computes METEOR (Denkowski and Lavie 2014) or SPICE (Anderson et al. 2016), between 0 and 1.

    Args:
        name: which of them.
        references: of each image, split by `metrics.tokenize`.
        captions: one for each image, in a list, split in the same way.

    Returns:
        The score of all captions, and that of each image; None if the program fails, which is logged.
    """
    compute = {"METEOR": _meteor, "SPICE": _spice}[name]
    try:
        with _stdout_to_stderr():
            total, by_image = compute(references, captions)
        if not math.isfinite(total):
            raise ValueError("an image has no score")
    except (OSError, ValueError, LookupError, zipfile.BadZipFile, subprocess.CalledProcessError) as error:
        log(f"{name} is left out: its Java program failed ({error}); it needs {NEEDS[name]}")
        return None
    return total, by_image


def _meteor(references: dict[int, list[str]], captions: dict[int, list[str]]) -> tuple[float, list[float]]:
    from pycocoevalcap.meteor.meteor import Meteor

    program = Meteor()
    try:
        return program.compute_score(references, captions)
    except BaseException:  # also Ctrl-C
        program.lock.release()  # a failure leaves it locked, and `__del__` would wait for it forever
        with contextlib.suppress(OSError):  # otherwise `__del__` complains that the program is gone
            program.meteor_p.stdin.close()
        raise


def _spice(references: dict[int, list[str]], captions: dict[int, list[str]]) -> tuple[float, list[float]]:
    from pycocoevalcap.spice.spice import Spice

    total, by_image = Spice().compute_score(references, captions)
    return float(total), [float(score["All"]["f"]) for score in by_image]


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Sends what Python and the programs that it starts print to standard error: standard output has the scores."""
    sys.stdout.flush()
    original = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(original, 1)
        os.close(original)
