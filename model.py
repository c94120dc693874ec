"""The model: a CNN encoder, Bahdanau attention, and a GRU decoder that is trained by teacher forcing.

Tutorial section: "Model".

    python model.py                                # the shapes of everything, for a batch of 16
    python model.py --units 1024 --vocab-size 10000

After "Show, Attend and Tell" (Xu et al. 2015, https://arxiv.org/abs/1502.03044). In the comments B is the number of
captions in a batch, T the number of steps and L the number of locations in the CNN's grid; all other sizes are the
defaults.
"""

import dataclasses
from typing import NamedTuple

from captioning.base import devices
from captioning.base.cli import make_parser, run_main
from captioning.base.quiet_tensorflow import tf
from captioning.config.cnns import INCEPTION_V3
from captioning.config.guests import find_model_guest
from captioning.config.options import add_options
from captioning.config.settings import ModelConfig
from captioning.decoder import fused_decoder
from captioning.decoder.fused_decoder import WordOrder

layers = tf.keras.layers


# What the parts of the model hand to each other.


class EncodedImages(NamedTuple):
    """Images as the decoder takes them. They are computed once, and used for every word of a caption."""

    features: tf.Tensor  # (B, L, 256)
    keys: tf.Tensor  # (B, L, 512), W1 features

    def for_captions(self, image_index: tf.Tensor | None) -> "EncodedImages":
        """Repeats the images for their captions: caption i belongs to image image_index[i], (B,)."""
        if image_index is None:  # every caption has an image of its own
            return self
        # A product with one-hot rows, since its gradient is a product, too, and faster than that of tf.gather.
        one_hot = tf.one_hot(image_index, tf.shape(self.keys)[0], dtype=self.keys.dtype)  # (B, images)

        def repeat(tensor: tf.Tensor) -> tf.Tensor:
            shape = tensor.shape[1:]
            return tf.reshape(tf.matmul(one_hot, tf.reshape(tensor, (-1, shape.num_elements()))), (-1, *shape))

        return EncodedImages(repeat(self.features), repeat(self.keys))


class StepOutput(NamedTuple):
    """What the model knows after a word."""

    logits: tf.Tensor  # (B, vocab_size), of the next word
    state: tf.Tensor  # (B, 512), the decoder's memory of the words so far
    attention_weights: tf.Tensor  # (B, L), where it attended; they sum to 1


class TeacherForcingOutput(NamedTuple):
    """The outputs of teacher forcing, packed: one row for each of N words to predict.

    `positions[i]` is the (caption, step) of row i: `tf.gather_nd(x, positions)` packs a tensor (B, T, ...), and
    `tf.scatter_nd` unpacks it. The plain loop also has rows for padding, which the losses mask.
    """

    logits: tf.Tensor  # (N, vocab_size), of the next word
    attention_weights: tf.Tensor  # (N, L), which sum to 1
    positions: tf.Tensor  # (N, 2) int32
    targets: tf.Tensor  # (N,) int32, the true next words


def project_locations(dense: tf.keras.layers.Dense, tensor: tf.Tensor) -> tf.Tensor:
    """Applies a Dense layer at every location of a tensor (B, L, C), as one product: (B, L, units of the layer).

    Keras does so too, but asks a GPU for the shape, and waits for it.
    """
    return tf.reshape(dense(tf.reshape(tensor, (-1, tensor.shape[2]))), (-1, tensor.shape[1], dense.units))


# The tutorial's three models.


class CNNEncoder(tf.keras.Model):
    """Passes the CNN's features through one fully connected layer with ReLU.

    The CNN itself is not here: features.py has run it once for every image and cached what it computed.
    """

    def __init__(self, embedding_dim: int, dropout: float = 0.0):
        super().__init__()
        self.fc = layers.Dense(embedding_dim, activation="relu")
        self.dropout = layers.Dropout(dropout)

    def call(self, features: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Encodes features (B, L, 2048) as (B, L, 256)."""
        return self.dropout(project_locations(self.fc, features), training=training)


class BahdanauAttention(tf.keras.Model):
    """Additive attention: score = V tanh(W1 features + W2 state) (Bahdanau et al. 2014, section A.1.2).

    This is the paper's soft attention (Xu et al. 2015, section 4.2): the context vector is the mean of the features of
    all locations, weighted by the softmax of their scores.
    """

    def __init__(self, units: int):
        super().__init__()
        self.W1 = layers.Dense(units)
        self.W2 = layers.Dense(units)
        self.V = layers.Dense(1)

    def encode(self, features: tf.Tensor) -> EncodedImages:
        """Adds the keys, W1 features, to encoded features (B, L, 256): they are the same at every step."""
        return EncodedImages(features, keys=project_locations(self.W1, features))

    def score(self, keys: tf.Tensor, state: tf.Tensor) -> tf.Tensor:
        """Scores how well each location, with keys (B, L, 512), fits a state (B, 512): (B, L)."""
        query = self.W2(state)[:, tf.newaxis]  # (B, 1, 512)
        return tf.squeeze(project_locations(self.V, tf.nn.tanh(keys + query)), axis=2)  # (B, L)

    def call(self, images: EncodedImages, state: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Computes the context vector of one step.

        Args:
            images: the encoded images, one for each caption.
            state: (B, 512), the GRU's state before this step.

        Returns:
            The context vector (B, 256), and the attention weights (B, L), which sum to 1.
        """
        attention_weights = tf.nn.softmax(self.score(images.keys, state))  # (B, L)
        # A matrix product sums over the locations without storing the weighted features, (B, L, 256).
        context_vector = tf.matmul(attention_weights[:, tf.newaxis], images.features)  # (B, 1, 256)
        return tf.squeeze(context_vector, axis=1), attention_weights


class RNNDecoder(tf.keras.Model):
    """Attention, word embedding, GRU, and two Dense layers that give the logits of the next word.

    The GRU's state is carried from word to word. (The tutorial's code never passes it back to the GRU, which starts
    each word from zeros: https://github.com/tensorflow/tensorflow/issues/38248.)
    """

    attention_class = BahdanauAttention

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.units = config.units
        self.embedding = layers.Embedding(config.vocab_size, config.embedding_dim)
        # The cell of the tutorial's GRU. Its input is the context vector beside the word, 256 + 256 numbers.
        self.gru = layers.GRUCell(config.units, recurrent_initializer="glorot_uniform")
        self.fc1 = layers.Dense(config.units)
        self.fc2 = layers.Dense(config.vocab_size)
        self.attention = self.attention_class(config.units)
        self.dropout = layers.Dropout(config.dropout)
        self.fused = False  # whether teacher forcing runs captioning/decoder/fused_decoder.py; train.py sets it

    def initial_state(self, images: EncodedImages) -> tf.Tensor:
        """Returns the GRU's state before the first word: zeros, (B, 512) (the tutorial's `reset_state`)."""
        return tf.zeros((tf.shape(images.features)[0], self.units), self.compute_dtype)

    def step(
        self, dec_input: tf.Tensor, images: EncodedImages, state: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Runs one step. Training, validation and captioning all use it, so that they cannot differ.

        To try another decoder, change this function.

        Args:
            dec_input: (B, 256), the embedding of the previous word.
            images: the encoded images, one for each caption.
            state: (B, 512), the state after the previous word.

        Returns:
            The output (B, 512), of which `to_logits` makes the next word; the new state (B, 512), which in a GRU is
            the same; and the attention weights (B, L).
        """
        context_vector, attention_weights = self.attention(images, state)
        gru_input = tf.concat([context_vector, dec_input], axis=-1)  # (B, 512)
        output, (state,) = self.gru(gru_input, [state])  # (B, 512)
        return output, state, attention_weights

    def to_logits(self, outputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Maps the outputs (N, 512) of N steps to logits (N, vocab_size)."""
        return self.fc2(self.fc1(self.dropout(outputs, training=training)))

    def variables_by_word(self) -> list[tuple[tf.Variable, int]]:
        """Returns the weights that each word of the vocabulary has a part of, each with its axis of words."""
        return [(self.embedding.embeddings, 0), (self.fc2.kernel, 1), (self.fc2.bias, 0)]

    def call(self, token: tf.Tensor, images: EncodedImages | tf.Tensor, state: tf.Tensor) -> StepOutput:
        """Predicts the next word, as in the tutorial.

        Args:
            token: (B,) or (B, 1), the previous word.
            images: encoded images, or their encoded features (B, L, 256).
            state: (B, 512).
        """
        images = self.attention.encode(images) if tf.is_tensor(images) else images
        token = tf.cast(tf.reshape(token, [-1]), tf.int64)  # (B,); a GPU's int32 would go through the host
        output, state, attention_weights = self.step(self.embedding(token), images, state)
        return StepOutput(self.to_logits(output), state, attention_weights)

    @tf.autograph.to_graph  # which turns the loop over a tensor into a tf.while_loop; Keras does not
    def teacher_force(self, tokens: tf.Tensor, images: EncodedImages, training: bool = False) -> TeacherForcingOutput:
        """Teacher forcing: step t is given the true word t and predicts word t + 1, as in the tutorial's train_step.

        Args:
            tokens: (B, T + 1) int32, captions from <start> to <end>, padded with <pad>.
            images: the encoded images, one for each caption.
            training: whether dropout takes place.
        """
        num_captions, num_steps = tf.shape(tokens)[0], tf.shape(tokens)[1] - 1
        dec_input = self.dropout(self.embedding(tf.transpose(tokens[:, :-1])), training=training)  # (T, B, 256)
        state = self.initial_state(images)  # (B, 512)
        outputs = tf.TensorArray(state.dtype, num_steps)
        attention_weights = tf.TensorArray(state.dtype, num_steps)
        for t in tf.range(num_steps):
            output, state, weights = self.step(dec_input[t], images, state)
            outputs = outputs.write(t, output)
            attention_weights = attention_weights.write(t, weights)

        row = tf.range(num_steps * num_captions)  # step after step, as `concat` packs them
        return TeacherForcingOutput(
            logits=self.to_logits(outputs.concat(), training),  # of all words at once, in two large products
            attention_weights=attention_weights.concat(),
            positions=tf.stack([row % num_captions, row // num_captions], axis=1),
            targets=tf.reshape(tf.transpose(tokens[:, 1:]), [-1]),
        )

    def teacher_force_fused(
        self,
        tokens: tf.Tensor,
        images: EncodedImages,
        image_index: tf.Tensor | None = None,
        training: bool = False,
        order: WordOrder | None = None,
    ) -> TeacherForcingOutput:
        """Computes the same faster and without rows for padding; see captioning/decoder/fused_decoder.py."""
        with tf.device("CPU:0"):  # where the batch comes from: integers would go to a GPU and back
            order = fused_decoder.order_tensors(tokens) if order is None else order
            words = tf.gather_nd(tokens, order.positions)  # (N,)
            targets = tf.gather_nd(tokens, order.positions + tf.constant([0, 1]))  # (N,)
            index = order.longest_first if image_index is None else tf.gather(image_index, order.longest_first)
        images = images.for_captions(index)
        dec_input = self.dropout(self.embedding(words), training=training)  # (N, 256)
        state = self.initial_state(images)  # (B, 512)
        outputs, attention_weights = fused_decoder.run(dec_input, images, order, self.attention, self.gru, state)
        return TeacherForcingOutput(self.to_logits(outputs, training), attention_weights, order.positions, targets)


# All of it.


class CaptionModel(tf.keras.Model):
    """Encoder and decoder: what is trained, saved, and asked for captions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.encoder = CNNEncoder(config.embedding_dim, config.feature_dropout)
        guest = find_model_guest(config.decoder, config.attention)  # None for the tutorial's decoder and attention
        self.decoder = guest.build_decoder(config) if guest else RNNDecoder(config)
        self.cnn: tf.keras.layers.Layer | None = None  # computes features of pixels, where it is trained, too

    def encode(self, features: tf.Tensor, training: bool = False) -> EncodedImages:
        """Encodes cached features (B, L, 2048), float16 or float32; or with a CNN pixels (B, size, size, 3) uint8."""
        features = self.cnn(features) if self.cnn else features  # (B, L, 2048)
        encoded = self.encoder(tf.cast(features, self.compute_dtype), training=training)  # (B, L, 256)
        return self.decoder.attention.encode(encoded)

    def initial_state(self, images: EncodedImages) -> tf.Tensor:
        """Returns the decoder's state before the first word, (B, 512) float32, as `step` returns those after it."""
        return tf.cast(self.decoder.initial_state(images), tf.float32)

    def step(self, token: tf.Tensor, images: EncodedImages, state: tf.Tensor) -> StepOutput:
        """Predicts the next word of captions; all results are float32.

        Args:
            token: (B,), the previous word.
            images: the encoded images, one for each caption.
            state: (B, 512).
        """
        return StepOutput(*(tf.cast(output, tf.float32) for output in self.decoder(token, images, state)))

    def call(
        self,
        features: tf.Tensor,
        tokens: tf.Tensor,
        image_index: tf.Tensor | None = None,
        training: bool = False,
        order: WordOrder | None = None,
    ) -> TeacherForcingOutput:
        """Runs teacher forcing.

        Args:
            features: (images, L, 2048).
            tokens: (B, T + 1) int32, captions from <start> to <end>, padded with <pad>.
            image_index: (B,), the image of each caption; None if every caption has its own.
            training: whether dropout takes place.
            order: the order of the words in fused_decoder.py, if already computed.
        """
        images = self.encode(features, training)
        if self.decoder.fused:
            return self.decoder.teacher_force_fused(tokens, images, image_index, training, order)
        return self.decoder.teacher_force(tokens, images.for_captions(image_index), training)


def build(
    config: ModelConfig, features_shape: tuple[int, int] = INCEPTION_V3.features_shape, mixed_precision: bool = False
) -> CaptionModel:
    """Builds a model whose weights exist, which restoring a checkpoint needs.

    Args:
        config: its sizes.
        features_shape: locations and channels of the CNN's features.
        mixed_precision: whether to compute in float16; the weights stay float32.
    """
    devices.check_gpus()
    policy = tf.keras.config.dtype_policy()
    tf.keras.config.set_dtype_policy("mixed_float16" if mixed_precision else "float32")
    try:
        model = CaptionModel(config)
    finally:
        tf.keras.config.set_dtype_policy(policy)
    images = model.encode(tf.zeros((1, *features_shape)))
    model.step(tf.zeros(1, tf.int32), images, model.initial_state(images))
    model.built = True
    return model


def fused_decoder_matches(config: ModelConfig) -> bool:
    """Returns whether fused_decoder.py has the values and gradients of the decoder's `step`, tried on a small model."""
    small = dataclasses.replace(config, vocab_size=8, embedding_dim=5, units=6, dropout=0.0)
    return fused_decoder.matches(build(small, features_shape=(4, 7)))


def main(argv: list[str] | None = None) -> None:
    """Prints the shapes of a batch of 16 on its way through the model."""
    parser = make_parser(__doc__)
    add_options(parser.add_argument_group("model"), ModelConfig)
    model = build(ModelConfig.from_args(parser.parse_args(argv)))
    features = tf.zeros((16, *INCEPTION_V3.features_shape))
    images = model.encode(features)
    output = model.step(tf.zeros(16, tf.int32), images, model.initial_state(images))
    shapes = {
        "features": features.shape,
        "encoded features": images.features.shape,
        "attention keys": images.keys.shape,
        "decoder logits": output.logits.shape,
        "decoder state": output.state.shape,
        "attention weights": output.attention_weights.shape,
    }
    for name, shape in shapes.items():
        print(f"{name:18} {tuple(shape)}")
    print(f"{model.count_params():,} weights")


if __name__ == "__main__":
    run_main(main)
