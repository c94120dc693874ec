"""The model: a CNN encoder, Bahdanau attention, and a GRU decoder that is trained by teacher forcing.

Tutorial section: "Model".

    python model.py                                # the shapes of everything, for a batch of 16
    python model.py --units 1024 --vocab-size 10000

After "Show, Attend and Tell" (Xu et al. 2015, https://arxiv.org/abs/1502.03044). In the comments B is the number
of captions in a batch, T the number of steps, L that of the CNN's locations; the sizes are the defaults.
"""

from typing import NamedTuple

import numpy as np

from captioning import devices, fused_decoder
from captioning.cli import make_parser, run_main
from captioning.cnns import INCEPTION_V3
from captioning.config import ModelConfig
from captioning.fused_decoder import WordOrder
from captioning.quiet_tensorflow import tf
from captioning.settings import add_options

layers = tf.keras.layers


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


def project_locations(dense: tf.keras.layers.Dense, tensor: tf.Tensor) -> tf.Tensor:
    """Applies a Dense layer at every location of a tensor (B, L, C), as one product: (B, L, units of the layer).

    Keras does so too, but asks a GPU for the shape, and waits for it.
    """
    return tf.reshape(dense(tf.reshape(tensor, (-1, tensor.shape[2]))), (-1, tensor.shape[1], dense.units))


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


class CNNEncoder(tf.keras.Model):
    """Passes the CNN's features, which are computed beforehand, through one fully connected layer with ReLU."""

    def __init__(self, embedding_dim: int):
        super().__init__()
        self.fc = layers.Dense(embedding_dim, activation="relu")

    def call(self, features: tf.Tensor) -> tf.Tensor:
        """Encodes features (B, L, 2048) as (B, L, 256)."""
        return project_locations(self.fc, features)


class BahdanauAttention(tf.keras.Model):
    """Additive attention: score = V tanh(W1 features + W2 state) (Bahdanau et al. 2014, section A.1.2).

    In soft attention (Xu et al. 2015, section 4.2) the context vector is the mean of all locations, weighted by the
    softmax of the scores. In hard attention (section 4.1) it is one location: in training one that is sampled with
    these weights as probabilities, otherwise the most probable one.
    """

    def __init__(self, units: int, hard: bool = False):
        super().__init__(autocast=False)  # in mixed precision Keras would round the noise; all else has its dtype
        self.W1 = layers.Dense(units)
        self.W2 = layers.Dense(units)
        self.V = layers.Dense(1)
        self.hard = hard
        if hard:
            self.seed_generator = tf.keras.random.SeedGenerator()

    def call(
        self, features: tf.Tensor, state: tf.Tensor, keys: tf.Tensor | None = None, noise: SamplingNoise | None = None
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Computes the context vector of one step.

        Args:
            features: (B, L, 256).
            state: (B, 512), the GRU's state before this step.
            keys: (B, L, 512), W1 features, if already computed: they are the same at all steps.
            noise: for hard attention in training, that of this step.

        Returns:
            The context vector (B, 256); the attention weights (B, L), which sum to 1; and the location weights (B, L)
            of the context vector: the attention weights, or a one-hot row in hard attention.
        """
        keys = project_locations(self.W1, features) if keys is None else keys  # (B, L, 512)
        query = self.W2(state)[:, tf.newaxis]  # (B, 1, 512)
        scores = tf.squeeze(project_locations(self.V, tf.nn.tanh(keys + query)), axis=2)  # (B, L)
        attention_weights = tf.nn.softmax(scores)  # (B, L)
        location_weights = self.select_location(scores, attention_weights, noise) if self.hard else attention_weights
        # A matrix product sums over the locations without storing the weighted features, (B, L, 256).
        context_vector = tf.matmul(location_weights[:, tf.newaxis], features)  # (B, 1, 256)
        return tf.squeeze(context_vector, axis=1), attention_weights, location_weights

    def select_location(
        self, scores: tf.Tensor, attention_weights: tf.Tensor, noise: SamplingNoise | None
    ) -> tf.Tensor:
        """Returns one-hot rows (B, L), of the best location or of a sampled one; or the weights, as `noise` says."""
        scores = tf.cast(scores, tf.float32)
        if noise is not None:
            scores += noise.gumbel  # the largest of scores + Gumbel noise is a sample of their softmax (Gumbel 1954)
        one_hot = tf.one_hot(tf.argmax(scores, axis=1), tf.shape(scores)[1], dtype=attention_weights.dtype)
        return one_hot if noise is None else tf.where(noise.is_sampled, one_hot, attention_weights)

    def sample_noise(self, num_steps: tf.Tensor, num_captions: tf.Tensor, num_locations: int) -> SamplingNoise:
        """Samples the noise of a batch; half of the captions get the expectation (Xu et al. 2015, section 4.1)."""
        shape = (num_steps, num_captions, num_locations)
        uniform = tf.keras.random.uniform(shape, minval=1e-30, seed=self.seed_generator)
        is_sampled = tf.keras.random.uniform((num_captions, 1), seed=self.seed_generator) < 0.5
        return SamplingNoise(-tf.math.log(-tf.math.log(uniform)), is_sampled)


class RNNDecoder(tf.keras.Model):
    """Attention, word embedding, GRU, and two Dense layers that give the logits of the next word.

    The GRU's state is carried from word to word. (The tutorial's code never passes it back to the GRU, which starts
    each word from zeros: https://github.com/tensorflow/tensorflow/issues/38248.)
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.units = config.units
        self.embedding = layers.Embedding(config.vocab_size, config.embedding_dim)
        # The cell of the tutorial's GRU. Its input is the context vector and the word, 512 numbers.
        self.gru = layers.GRUCell(config.units, recurrent_initializer="glorot_uniform")
        self.fc1 = layers.Dense(config.units)
        self.fc2 = layers.Dense(config.vocab_size)
        self.attention = BahdanauAttention(config.units, config.attention == "hard")
        self.dropout = layers.Dropout(config.dropout)
        self.fused = False  # whether teacher forcing takes fused_decoder.py; train.py sets it

    def initial_state(self, batch_size: int | tf.Tensor) -> tf.Tensor:
        """Returns the GRU's state before the first word: zeros, (B, 512)."""
        return tf.zeros((batch_size, self.units), self.compute_dtype)

    def encode(self, features: tf.Tensor) -> EncodedImages:
        """Adds the attention's keys to encoded features (B, L, 256)."""
        return EncodedImages(features, project_locations(self.attention.W1, features))

    def step(
        self, dec_input: tf.Tensor, images: EncodedImages, state: tf.Tensor, noise: SamplingNoise | None = None
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Runs one step. Training, validation and captioning all use it, so that they cannot differ.

        To try another decoder, change this function.

        Args:
            dec_input: (B, 256), the embedding of the previous word.
            images: those of the captions.
            state: (B, 512), the state after the previous word.
            noise: for hard attention in training.

        Returns:
            The new state (B, 512), which is also the GRU's output; the attention weights (B, L); and the location
            weights (B, L).
        """
        context_vector, attention_weights, location_weights = self.attention(images.features, state, images.keys, noise)
        gru_input = tf.concat([context_vector, dec_input], axis=-1)  # (B, 512)
        state, _ = self.gru(gru_input, [state])  # (B, 512)
        return state, attention_weights, location_weights

    def to_logits(self, states: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Maps the GRU's outputs (..., 512) to logits (..., vocab_size)."""
        return self.fc2(self.fc1(self.dropout(states, training=training)))

    def call(self, token: tf.Tensor, images: EncodedImages | tf.Tensor, state: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Predicts the next word, as in the tutorial.

        Args:
            token: (B,) or (B, 1), the previous word.
            images: encoded images, or their encoded features (B, L, 256).
            state: (B, 512).

        Returns:
            logits (B, vocab_size), the new state (B, 512), and the location weights (B, L).
        """
        images = images if isinstance(images, EncodedImages) else self.encode(images)
        token = tf.cast(tf.reshape(token, [-1]), tf.int64)  # (B,); a GPU's int32 would go through the host
        dec_input = self.embedding(token)  # (B, 256)
        state, _, location_weights = self.step(dec_input, images, state)
        return self.to_logits(state), state, location_weights

    @tf.autograph.to_graph  # which turns the loop over a tensor into a tf.while_loop; Keras does not
    def teacher_force(
        self,
        tokens: tf.Tensor,
        images: EncodedImages,
        image_index: tf.Tensor | None = None,
        training: bool = False,
        order: WordOrder | None = None,
    ) -> TeacherForcingOutput:
        """Teacher forcing: step t is given the true word t and predicts word t + 1, as in the tutorial's train_step.

        Args:
            tokens: (B, T + 1) int32, captions from <start> to <end>, padded with <pad>.
            images: the encoded images.
            image_index: (B,), the image of each caption; None if every caption has its own.
            training: whether dropout, and the sampling of hard attention, take place.
            order: that of the words in fused_decoder.py, if already computed.
        """
        if self.fused:
            return self._teacher_force_fused(tokens, images, image_index, training, order)
        num_captions, num_steps = tf.shape(tokens)[0], tf.shape(tokens)[1] - 1
        images = images.for_captions(image_index)
        dec_input = self.dropout(self.embedding(tf.transpose(tokens[:, :-1])), training=training)  # (T, B, 256)
        noise = None
        if self.attention.hard and training:
            noise = self.attention.sample_noise(num_steps, num_captions, images.keys.shape[1])

        state = self.initial_state(num_captions)  # (B, 512)
        states, attention_weights, location_weights = (tf.TensorArray(state.dtype, num_steps) for _ in range(3))
        for t in tf.range(num_steps):
            step_noise = None if noise is None else SamplingNoise(noise.gumbel[t], noise.is_sampled)
            state, weights_t, location_weights_t = self.step(dec_input[t], images, state, step_noise)
            states = states.write(t, state)
            attention_weights = attention_weights.write(t, weights_t)
            location_weights = location_weights.write(t, location_weights_t)

        is_sampled = tf.zeros((num_captions, 1), tf.bool) if noise is None else noise.is_sampled
        row = tf.range(num_steps * num_captions)  # step after step, as `concat` packs them
        return TeacherForcingOutput(
            logits=self.to_logits(states.concat(), training),  # for all words at once, in two large products
            attention_weights=attention_weights.concat(),
            location_weights=location_weights.concat(),
            is_sampled=tf.tile(is_sampled, [num_steps, 1]),
            positions=tf.stack([row % num_captions, row // num_captions], axis=1),
            targets=tf.reshape(tf.transpose(tokens[:, 1:]), [-1]),
        )

    def _teacher_force_fused(self, tokens, images, image_index, training, order) -> TeacherForcingOutput:
        """Does the same for soft attention, faster, and without rows for padding; see captioning/fused_decoder.py."""
        with tf.device("CPU:0"):  # where the batch comes from: integers would go to a GPU and back
            order = fused_decoder.order_tensors(tokens) if order is None else order
            words = tf.gather_nd(tokens, order.positions)  # (N,)
            targets = tf.gather_nd(tokens, order.positions + tf.constant([0, 1]))  # (N,)
            index = order.longest_first if image_index is None else tf.gather(image_index, order.longest_first)
        images = images.for_captions(index)
        dec_input = self.dropout(self.embedding(words), training=training)  # (N, 256)
        states, attention_weights = fused_decoder.run(dec_input, images, order, self.attention, self.gru)
        is_sampled = tf.zeros((tf.shape(words)[0], 1), tf.bool)
        logits = self.to_logits(states, training)
        return TeacherForcingOutput(logits, attention_weights, attention_weights, is_sampled, order.positions, targets)


class CaptionModel(tf.keras.Model):
    """Encoder and decoder: what is trained, saved, and asked for captions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.encoder = CNNEncoder(config.embedding_dim)
        self.decoder = RNNDecoder(config)

    def encode(self, features: tf.Tensor) -> EncodedImages:
        """Encodes cached features (B, L, 2048), float16 or float32, for `step` and teacher forcing."""
        return self.decoder.encode(self.encoder(tf.cast(features, self.compute_dtype)))

    def initial_state(self, batch_size: int | tf.Tensor) -> tf.Tensor:
        """Returns the decoder's state before the first word, (B, 512) float32, as `step` returns those after it."""
        return tf.cast(self.decoder.initial_state(batch_size), tf.float32)

    def step(self, token: tf.Tensor, images: EncodedImages, state: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Predicts the next word of captions.

        Args:
            token: (B,), the previous word.
            images: those of the captions.
            state: (B, 512).

        Returns:
            logits (B, vocab_size), the new state (B, 512), and the location weights (B, L), all float32.
        """
        return tuple(tf.cast(output, tf.float32) for output in self.decoder(token, images, state))

    def call(
        self,
        features: tf.Tensor,
        tokens: tf.Tensor,
        image_index: tf.Tensor | None = None,
        training: bool = False,
        order: WordOrder | None = None,
    ) -> TeacherForcingOutput:
        """Runs teacher forcing on features (images, L, 2048) and captions (B, T + 1); see `teacher_force`."""
        return self.decoder.teacher_force(tokens, self.encode(features), image_index, training, order)


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
    model.step(tf.zeros(1, tf.int32), model.encode(tf.zeros((1, *features_shape))), model.initial_state(1))
    model.built = True
    return model


def fused_decoder_matches() -> bool:
    """Tells whether fused_decoder.py computes what `RNNDecoder.step` does, and its gradient.

    It does not once one of the two is changed. A small model with random weights decides.
    """
    model = build(ModelConfig(vocab_size=8, embedding_dim=5, units=6), features_shape=(4, 7))
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(0, 0.5, variable.shape))  # biases, too: they start from zeros
    features, tokens = rng.normal(size=(2, 4, 7)).astype(np.float32), tf.constant([[2, 5, 4, 6, 3], [2, 7, 6, 5, 3]])

    def compute() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            outputs = model(features, tokens)
            total = tf.reduce_sum(tf.math.log_softmax(outputs.logits)[:, 5]) + tf.nn.l2_loss(outputs.attention_weights)
        variables = model.trainable_variables
        gradients = [  # a layer that only one of the two uses has none (None) in the other
            tf.zeros(variable.shape) if gradient is None else tf.convert_to_tensor(gradient)
            for gradient, variable in zip(tape.gradient(total, variables), variables, strict=True)
        ]
        return [outputs.logits, outputs.attention_weights, *gradients]

    plain = compute()
    model.decoder.fused = True
    try:
        fused = compute()
    except (AttributeError, TypeError, ValueError, tf.errors.OpError):  # the step has other layers, or other shapes
        return False
    return all(
        x.shape == y.shape and np.allclose(x, y, rtol=1e-2, atol=1e-3)  # GPUs round TF32
        for x, y in zip(plain, fused, strict=True)
    )


def main(argv: list[str] | None = None) -> None:
    """Prints the shapes of a batch of 16 on its way through the model."""
    parser = make_parser(__doc__)
    add_options(parser.add_argument_group("model"), ModelConfig)
    model = build(ModelConfig.from_args(parser.parse_args(argv)))
    features = tf.zeros((16, *INCEPTION_V3.features_shape))
    images = model.encode(features)
    logits, state, attention_weights = model.step(tf.zeros(16, tf.int32), images, model.initial_state(16))
    shapes = {
        "features": features.shape,
        "encoded features": images.features.shape,
        "attention keys": images.keys.shape,
        "decoder logits": logits.shape,
        "decoder state": state.shape,
        "attention weights": attention_weights.shape,
    }
    for name, shape in shapes.items():
        print(f"{name:18} {tuple(shape)}")
    print(f"{model.count_params():,} weights")


if __name__ == "__main__":
    run_main(main)
