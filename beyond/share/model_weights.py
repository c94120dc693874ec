"""The weights of a caption model as a NumPy .npz file, and back to a checkpoint.

An array is named after its variable: `decoder/fc1/_kernel` is what the checkpoint calls
`model/decoder/fc1/_kernel/.ATTRIBUTES/VARIABLE_VALUE`. No model has to be built, so that a decoder of one's own is
packed like any other.
"""

import math
import re
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from captioning.base.cli import InputError
from captioning.base.quiet_tensorflow import tf

CNN = "model/cnn/"  # a trained CNN, which has a file of its own
MODEL, VALUE = "model/", "/.ATTRIBUTES/VARIABLE_VALUE"  # what a checkpoint puts around the name of a variable
MAX_WEIGHTS = 10_000  # arrays of a file
DTYPES = ("float16", "float32")

_NAME = re.compile(r"\w+(/\w+)*", re.ASCII)


def read_checkpoint(prefix: str) -> dict[str, np.ndarray]:
    """Reads the weights of the model in a checkpoint.

    Args:
        prefix: the checkpoint.

    Returns:
        The arrays, float32, by the names of the variables, in the order of the names.

    Raises:
        InputError: it is damaged, or a weight is no number of 32 bits, or not finite.
    """
    try:
        reader = tf.train.load_checkpoint(prefix)
        names = (name for name in reader.get_variable_to_shape_map() if not name.startswith(CNN))
        keys = sorted(key for key in names if key.startswith(MODEL) and VALUE in key)
        weights = {key.removeprefix(MODEL).removesuffix(VALUE): reader.get_tensor(key) for key in keys}
    except (tf.errors.OpError, ValueError, IndexError) as error:
        raise InputError(f"{prefix}: damaged ({str(error).strip().splitlines()[0][:200]})") from None
    for name, array in weights.items():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise InputError(f"{prefix}: {name}: expected finite float32 weights, found others ({array.dtype})")
    return weights


def write_checkpoint(folder: Path, weights: dict[str, np.ndarray]) -> None:
    """Writes weights as the checkpoint that training writes, so that a model is restored from it.

    Args:
        folder: the folder of the checkpoint, such as `checkpoints/best`.
        weights: what `read_weights` returned.

    Raises:
        OSError: it cannot be written; the disk may be full.
    """
    # TensorFlow finds a variable by its way through the attributes of the model. Dictionaries have the same ways.
    tree: dict[str, Any] = {}
    for name, array in weights.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = tf.Variable(array)
    try:
        tf.train.CheckpointManager(tf.train.Checkpoint(model=tree), str(folder), max_to_keep=1).save()
    except tf.errors.OpError as error:  # which is what a full disk is to TensorFlow
        raise InputError(
            f"cannot save a checkpoint into {folder} ({str(error).strip().splitlines()[0][:200]})"
        ) from None


def write_weights(file: IO[bytes], weights: dict[str, np.ndarray], dtype: str) -> None:
    """Writes weights as an .npz file: the same weights as the same bytes.

    Args:
        file: an open file.
        weights: what `read_checkpoint` returned.
        dtype: `float32`, or `float16`, which rounds them to 3 decimal digits.

    Raises:
        InputError: a weight is too large for float16.
    """
    with np.errstate(over="ignore"):
        arrays: dict[str, Any] = {name: array.astype(dtype) for name, array in weights.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise InputError(
                f"{name}: a weight of {np.abs(weights[name]).max():g} is too large for float16; use float32"
            )
    np.savez(file, **arrays)


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Reads what `write_weights` wrote. Nothing is pickled, and no memory is taken before the sizes are checked.

    Returns:
        The arrays, float32, by the names of the variables.

    Raises:
        InputError: the file is damaged, or holds anything else than finite float16 or float32 numbers.
        zipfile.BadZipFile: it is not a .npz file, or its CRC does not fit. Other damages raise other errors.
    """
    weights: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if not 0 < len(members) <= MAX_WEIGHTS:
            raise InputError(f"expected from 1 to {MAX_WEIGHTS:,} arrays of weights, found {len(members):,}")
        for member in members:
            name = member.filename.removesuffix(".npy")
            if not _NAME.fullmatch(name) or name in weights or member.compress_type != zipfile.ZIP_STORED:
                raise InputError(f"{member.filename[:60]!r}: not an array of weights")
            # Not compressed, so that it is as large as it says, and a shape that fits is no bomb.
            with archive.open(member) as file:
                weights[name] = _read_array(file, name, member.file_size)
    _check_tree(weights)
    return weights


def _read_array(file: IO[bytes], name: str, num_bytes: int) -> np.ndarray:
    """Reads an array of a file of so many bytes as float32; raises InputError if it is not one of weights."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise InputError(f"{name}: expected version 1.0 of .npy, found {version}")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    size = math.prod(shape)
    is_size = min(shape, default=0) >= 0 and size * dtype.itemsize == num_bytes - file.tell()
    if str(dtype) not in DTYPES or is_fortran or not is_size:
        raise InputError(f"{name}: expected float16 or float32 weights of the size of the file, found {shape} {dtype}")
    array = np.frombuffer(file.read(), dtype).reshape(shape).astype(np.float32)  # read to the end: the CRC is checked
    if not np.isfinite(array).all():
        raise InputError(f"{name}: expected finite weights, found infinite ones or no numbers")
    return array


def _check_tree(weights: dict[str, np.ndarray]) -> None:
    """Raises InputError if a name is the beginning of another: a variable has no attributes."""
    parents = {"/".join(parts[:end]) for parts in (name.split("/") for name in weights) for end in range(1, len(parts))}
    if both := parents & weights.keys():
        raise InputError(f"{min(both)}: expected an array or a folder of arrays, found both")
