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
from pathlib import Path

from captioning.base.cli import InputError

NEED_JAVA = "it needs Java (Debian, Ubuntu, Colab: apt-get install default-jre-headless)"
# From Java 16 on its libraries may not look into Java's own objects any more, and it fails before the first caption.
SPICE_JAVA_VERSIONS = range(8, 16)
CORENLP_URL = "http://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"
CORENLP_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


class JavaError(Exception):
    """A failure of one of pycocoevalcap's Java programs."""


def java_version() -> int | None:
    """Returns the version of Java, such as 8 or 17; 0 if it does not tell, and None if there is no Java.

    It is run to find out: macOS has a `java` that only prints where to download one.
    """
    if not shutil.which("java"):
        return None
    done = subprocess.run(["java", "-version"], capture_output=True, text=True)
    if done.returncode != 0:
        return None
    version = re.search(r'version "(?:1\.)?(\d+)', done.stderr)  # Java 8 is "1.8.0"
    return int(version[1]) if version else 0


def has_java() -> bool:
    """Tells whether Java runs."""
    return java_version() is not None


def meteor(references: dict[int, list[str]], captions: dict[int, list[str]]) -> tuple[float, list[float]]:
    """Computes METEOR (Denkowski and Lavie 2014), between 0 and 1, of captions split by `metrics.tokenize`.

    Returns:
        The score of all captions, and that of each image.

    Raises:
        JavaError: METEOR's Java program failed.
    """
    from pycocoevalcap.meteor import meteor

    program = meteor.Meteor()
    try:
        return program.compute_score(references, captions)
    except BaseException as error:
        program.lock.release()  # a failure leaves it locked, and `__del__` would wait for it forever
        with contextlib.suppress(OSError):  # otherwise `__del__` complains that the program is gone
            program.meteor_p.stdin.close()
        if not isinstance(error, OSError | ValueError):  # such as Ctrl-C
            raise
        folder = str(Path(meteor.__file__).parent)
        if " " in folder:
            reason = f", as it does in a folder with a space in its path: {folder}"
        else:
            reason = "; it needs 2 GB of memory"
        raise JavaError(f"METEOR's Java program failed{reason}") from None


def check_spice() -> None:
    """Checks, before captions are generated, what can be known of whether SPICE can run.

    Whether its parser can be downloaded, and whether there is memory enough, shows only when it runs.

    Raises:
        InputError: there is no Java, or not one that SPICE runs in; or SPICE cannot write beside its code.
    """
    from pycocoevalcap.spice import spice

    expected = f"--spice needs Java {SPICE_JAVA_VERSIONS[0]} to {SPICE_JAVA_VERSIONS[-1]}"
    hint = "put the java of version 8 or 11 first in PATH (https://adoptium.net has them)"
    version = java_version()
    if version is None:
        raise InputError(f"{expected}, found none; {hint}")
    if version not in SPICE_JAVA_VERSIONS:
        raise InputError(f"{expected}, found Java {version or 'of an unknown version'}; {hint}")
    folder = Path(spice.__file__).parent
    if not os.access(folder, os.W_OK):
        raise InputError(
            f"--spice writes into {folder}, which is read-only here; install pycocoevalcap in a folder of yours"
        )


def spice(references: dict[int, list[str]], captions: dict[int, list[str]]) -> tuple[float, list[float]]:
    """Computes SPICE (Anderson et al. 2016), between 0 and 1, of captions split by `metrics.tokenize`.

    The first time, pycocoevalcap downloads Stanford CoreNLP 3.6.0 beside its code.

    Returns:
        The score of all captions, and that of each image.

    Raises:
        JavaError: the download failed, or SPICE's Java program.
    """
    from pycocoevalcap.spice import spice

    folder = Path(spice.__file__).parent / "lib"
    try:
        with _stdout_to_stderr():
            total, scores = spice.Spice().compute_score(references, captions)
    except (OSError, ValueError, LookupError, zipfile.BadZipFile, subprocess.CalledProcessError) as error:
        if missing := [name for name in CORENLP_JARS if not (folder / name).exists()]:
            raise JavaError(
                f"{' and '.join(missing)} could not be downloaded ({error}); put what {CORENLP_URL} holds of them into "
                f"{folder}"
            ) from None
        raise JavaError(f"SPICE's Java program failed ({error}); it needs 8 GB of memory") from None
    if not math.isfinite(total):
        raise JavaError("SPICE's Java program gave an image no score")
    return float(total), [float(score["All"]["f"]) for score in scores]


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
