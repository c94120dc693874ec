"""The captioner as a LiteRT file (.tflite), for phones and small machines: from the pixels of an image to ids.

LiteRT has no operation that reads a JPEG or looks up text: the caller resizes the image and looks up the words of the
ids. The search is `captioning.decoder.decoding.beam_search`. Greedy search is a beam of 1, since LiteRT cannot convert
the array of growing length that `greedy_search` writes.
"""

import tempfile
from pathlib import Path

from beyond.export.saved_model import SAVED_MODEL_FILE, check_exportable, list_variables
from captioning.base.cli import InputError, suppress_stderr
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import DecodeConfig
from captioning.decoder.constraints import Constraints
from captioning.decoder.decoding import MAX_WORDS, beam_search
from inference import Captioner


def check_convertible(config: DecodeConfig) -> None:
    """Raises InputError if LiteRT lacks operations for the settings: random words, or no repetitions."""
    check_exportable(config)
    if config.no_repeat:
        raise InputError("--no-repeat needs TensorFlow's TensorScatterMin, which LiteRT lacks; leave it out")


class LiteRTModel(tf.Module):
    """Captions the pixels of one image.

    Args:
        captioner: the run, and how its captions are searched for.

    Raises:
        InputError: see `check_convertible`.
    """

    def __init__(self, captioner: Captioner):
        super().__init__()
        config = captioner.decode_config
        check_convertible(config)
        extractor, model, size = captioner.extractor, captioner.model, captioner.image_size
        features_dtype = captioner.config.features["dtype"]
        constraints = Constraints(config.min_words, config.no_repeat)
        max_words = config.max_words or MAX_WORDS

        def caption(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
            # Rounded as the features that the model was trained on.
            features = tf.cast(extractor(pixels, training=False), features_dtype)  # (1, L, C)
            decoded = beam_search(
                model, features, config.num_beams, config.length_penalty, max_words, constraints, config.captions
            )
            return {
                "tokens": decoded.tokens,  # (N, T)
                "probabilities": decoded.probabilities,  # (N, T)
                "attention": decoded.attention,  # (N, T, L)
            }

        self.weights = list_variables(extractor, model)
        spec = tf.TensorSpec([1, size, size, 3], tf.uint8, "pixels")
        self.caption = tf.function(caption, input_signature=[spec])


def convert(model: LiteRTModel, weights: str) -> bytes:
    """Converts the model to the content of a LiteRT file, with the signature `caption`.

    Args:
        model: what is converted. Only LiteRT's own operations are used.
        weights: `float32`, or `float16`, half as large.

    Raises:
        InputError: the converter cannot take these settings.
    """
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel  # here: quiet_tensorflow is to be the first

    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(model, folder, signatures={"caption": model.caption})
        path = Path(folder, SAVED_MODEL_FILE)
        saved = SavedModel.FromString(path.read_bytes())
        divide_in_int32(saved.meta_graphs[0].graph_def)
        path.write_bytes(saved.SerializeToString())
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=["caption"])
        if weights == "float16":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.target_spec.supported_types = [tf.float16]
        try:
            with suppress_stderr():
                return converter.convert()
        except Exception as error:  # the converter has an error of its own, and raises others
            reason = str(error).strip().split("\n")[0][:200]
            raise InputError(f"LiteRT's converter cannot take this model with these settings ({reason})") from None


def divide_in_int32(graph: tf.compat.v1.GraphDef) -> None:
    """Replaces the divisions of int64 in the functions of a graph, which LiteRT lacks, by divisions of int32.

    Beam search divides only indices into K * V, which are far smaller than 2 ** 31.
    """
    int32, int64 = tf.int32.as_datatype_enum, tf.int64.as_datatype_enum
    for function in graph.library.function:
        for node in [node for node in function.node_def if node.op == "FloorDiv" and node.attr["T"].type == int64]:
            prefix = f"{node.name}/in_int32"
            operands = []
            for i, operand in enumerate(node.input):
                cast = function.node_def.add(op="Cast", name=f"{prefix}_{i}", input=[operand])
                cast.attr["SrcT"].type, cast.attr["DstT"].type = int64, int32
                operands.append(f"{cast.name}:y:0")
            quotient = function.node_def.add(op="FloorDiv", name=prefix, input=operands)
            quotient.attr["T"].type = int32
            cast = function.node_def.add(op="Cast", name=f"{prefix}_z", input=[f"{prefix}:z:0"])
            cast.attr["SrcT"].type, cast.attr["DstT"].type = int32, int64
            # The node keeps its name and output, which others refer to: the larger of twice the same number.
            node.op, node.input[:] = "Maximum", [f"{cast.name}:y:0"] * 2
