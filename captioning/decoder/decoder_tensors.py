"""The tensors that the parts of the model hand to each other, and what projects them.

B is the number of captions in a batch, T that of steps, L that of locations; the other sizes are the defaults.
"""

from typing import NamedTuple

from captioning.base.quiet_tensorflow import tf


class EncodedImages(NamedTuple):
    """A batch of images as the decoder takes them, computed once for all words of a caption."""

    features: tf.Tensor  # (B, L, 256)
    keys: tf.Tensor  # (B, L, 512), W1 features

    def for_captions(self, image_index: tf.Tensor | None) -> "EncodedImages":
        """Repeats every image for each of its captions, whose numbers of an image are image_index (B,)."""
        if image_index is None:
            return self
        # A product, since the gradient of a product is one too; that of tf.gather is slower.
        one_hot = tf.one_hot(image_index, tf.shape(self.keys)[0], dtype=self.keys.dtype)  # (B, images)

        def repeat(tensor: tf.Tensor) -> tf.Tensor:
            shape = tensor.shape[1:]
            return tf.reshape(tf.matmul(one_hot, tf.reshape(tensor, (-1, shape.num_elements()))), (-1, *shape))

        return EncodedImages(*map(repeat, self))


class SamplingNoise(NamedTuple):
    """The random numbers that hard attention needs in training."""

    gumbel: tf.Tensor  # (T, B, L), or (B, L) of one step
    is_sampled: tf.Tensor  # (B, 1) bool: the captions whose locations are sampled; the others get the expectation


class TeacherForcingOutput(NamedTuple):
    """The outputs of teacher forcing, packed: one row for each of N words to predict.

    `positions[i]` is the (caption, step) of row i: `tf.gather_nd(x, positions)` packs a tensor (B, T, ...), and
    `tf.scatter_nd` unpacks it. The plain loop also has rows for padding, which the losses mask.
    """

    logits: tf.Tensor  # (N, vocab_size), of the next word
    attention_weights: tf.Tensor  # (N, L), which sum to 1
    location_weights: tf.Tensor  # (N, L), the weights of the context vector: in hard attention a one-hot row
    is_sampled: tf.Tensor  # (N, 1) bool, whether the location was sampled; False in soft attention
    positions: tf.Tensor  # (N, 2) int32
    targets: tf.Tensor  # (N,) int32, the true next words


def project_locations(dense: tf.keras.layers.Dense, tensor: tf.Tensor) -> tf.Tensor:
    """Applies a Dense layer at every location of a tensor (B, L, C), as one product: (B, L, units of the layer).

    Keras does so too, but asks a GPU for the shape, and waits for it.
    """
    return tf.reshape(dense(tf.reshape(tensor, (-1, tensor.shape[2]))), (-1, tensor.shape[1], dense.units))
