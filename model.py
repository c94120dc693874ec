"""The model: a CNN encoder, Bahdanau attention, and a GRU decoder that is trained by teacher forcing.

Tutorial section: "Model".

    python model.py                                # the shapes of everything, for a batch of 16
    python model.py --units 1024 --vocab-size 10000

After "Show, Attend and Tell" (Xu et al. 2015, https://arxiv.org/abs/1502.03044). In the comments B is the number
of captions in a batch, T the number of steps, L that of the CNN's locations; the sizes are the defaults.
"""

import dataclasses

from captioning.base import devices
from captioning.base.cli import make_parser, run_main
from captioning.base.quiet_tensorflow import tf
from captioning.config.cnns import INCEPTION_V3
from captioning.config.options import add_options
from captioning.config.settings import ModelConfig
from captioning.decoder import fused_decoder
from captioning.decoder.decoder_tensors import EncodedImages, SamplingNoise, TeacherForcingOutput, project_locations
from captioning.decoder.fused_decoder import WordOrder

layers = tf.keras.layers


class CNNEncoder(tf.keras.Model):
    """Passes the CNN's features, which are computed beforehand, through one fully connected layer with ReLU."""

    def __init__(self, embedding_dim: int, dropout: float = 0.0):
        super().__init__()
        self.fc = layers.Dense(embedding_dim, activation="relu")
        self.dropout = layers.Dropout(dropout)

    def call(self, features: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Encodes features (B, L, 2048) as (B, L, 256)."""
        return self.dropout(project_locations(self.fc, features), training=training)


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

    def initial_state(self, images: EncodedImages) -> tf.Tensor:
        """Returns the GRU's state before the first word: zeros, (B, 512)."""
        return tf.zeros((tf.shape(images.features)[0], self.units), self.compute_dtype)

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

    def to_logits(self, states: tf.Tensor, dec_input: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Maps the states (N, 512) after N words to logits (N, vocab_size); `PaperDecoder` needs dec_input (N, 256)."""
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
        return self.to_logits(state, dec_input), state, location_weights

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

        state = self.initial_state(images)  # (B, 512)
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
            # For all words at once, in two large products.
            logits=self.to_logits(states.concat(), tf.reshape(dec_input, (-1, dec_input.shape[2])), training),
            attention_weights=attention_weights.concat(),
            location_weights=location_weights.concat(),
            is_sampled=tf.tile(is_sampled, [num_steps, 1]),
            positions=tf.stack([row % num_captions, row // num_captions], axis=1),
            targets=tf.reshape(tf.transpose(tokens[:, 1:]), [-1]),
        )

    def _teacher_force_fused(self, tokens, images, image_index, training, order) -> TeacherForcingOutput:
        """Does the same for soft attention, faster, and without rows for padding; see fused_decoder.py."""
        with tf.device("CPU:0"):  # where the batch comes from: integers would go to a GPU and back
            order = fused_decoder.order_tensors(tokens) if order is None else order
            words = tf.gather_nd(tokens, order.positions)  # (N,)
            targets = tf.gather_nd(tokens, order.positions + tf.constant([0, 1]))  # (N,)
            index = order.longest_first if image_index is None else tf.gather(image_index, order.longest_first)
        images = images.for_captions(index)
        dec_input = self.dropout(self.embedding(words), training=training)  # (N, 256)
        states, attention_weights = self.run_fused(dec_input, images, order)
        is_sampled = tf.zeros((tf.shape(words)[0], 1), tf.bool)
        logits = self.to_logits(states, dec_input, training)
        return TeacherForcingOutput(logits, attention_weights, attention_weights, is_sampled, order.positions, targets)

    def run_fused(self, dec_input: tf.Tensor, images: EncodedImages, order: WordOrder) -> tuple[tf.Tensor, tf.Tensor]:
        """Runs all steps: the states (N, 512) and the attention weights (N, L) after the words dec_input (N, 256)."""
        return fused_decoder.run(dec_input, images, order, self.attention, self.gru, self.initial_state(images))


class PaperDecoder(RNNDecoder):
    """The decoder of the paper, which uses the image in three more places than the tutorial's (Xu et al. 2015).

    The first state is made from the mean of all locations (section 3.1.2). The context vector is scaled by a gate, one
    number for each word (4.2.1). The next word's logits depend on the previous word and the context vector, too (3.1.2,
    equation 7). All that outlasts a step is one row: h, the LSTM's memory if it is one, the context vector, the gate.
    """

    def __init__(self, config: ModelConfig):
        tf.keras.Model.__init__(self)  # without the layers of the tutorial
        is_lstm = config.cell == "lstm"
        self.units = config.units
        self.embedding = layers.Embedding(config.vocab_size, config.embedding_dim)
        self.f_init_h = layers.Dense(config.units, activation="tanh")
        self.f_init_c = layers.Dense(config.units, activation="tanh") if is_lstm else None
        self.attention = BahdanauAttention(config.units, config.attention == "hard")
        self.f_beta = layers.Dense(1, activation="sigmoid")
        cell_class = layers.LSTMCell if is_lstm else layers.GRUCell
        self.cell = cell_class(config.units, recurrent_initializer="glorot_uniform")
        self.L_h = layers.Dense(config.embedding_dim)
        self.L_z = layers.Dense(config.embedding_dim, use_bias=False)  # L_h has one
        self.L_o = layers.Dense(config.vocab_size)
        self.dropout = layers.Dropout(config.dropout)
        self.fused = False
        self.state_sizes = [config.units] * (1 + is_lstm) + [config.embedding_dim, 1]

    def initial_state(self, images: EncodedImages) -> tf.Tensor:
        """Returns the state before the first word (B, 769), of an LSTM (B, 1281); no context vector and gate yet."""
        mean = tf.reduce_mean(images.features, axis=1)  # (B, 256)
        cell_states = [f_init(mean) for f_init in (self.f_init_h, self.f_init_c) if f_init]
        return tf.concat([*cell_states, tf.zeros_like(mean), tf.zeros_like(mean[:, :1])], axis=1)  # (B, 769)

    def step(
        self, dec_input: tf.Tensor, images: EncodedImages, state: tf.Tensor, noise: SamplingNoise | None = None
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Runs one step, as `RNNDecoder.step` does; the context vector and the gate in `state` are not read."""
        *cell_states, _, _ = tf.split(state, self.state_sizes, axis=1)  # (B, 512)
        h = cell_states[0]
        context_vector, attention_weights, location_weights = self.attention(images.features, h, images.keys, noise)
        gate = self.f_beta(h)  # (B, 1)
        context_vector *= gate
        _, cell_states = self.cell(tf.concat([context_vector, dec_input], axis=-1), cell_states)  # (B, 512)
        state = tf.concat([*cell_states, context_vector, gate], axis=1)  # (B, 769)
        return state, attention_weights, location_weights

    def to_logits(self, states: tf.Tensor, dec_input: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Maps the states (N, 769) after N words with embeddings dec_input (N, 256) to logits (N, vocab_size)."""
        h, *_, context_vector, _ = tf.split(states, self.state_sizes, axis=1)  # (N, 512), (N, 256)
        h = self.dropout(h, training=training)
        hidden = tf.tanh(dec_input + self.L_h(h) + self.L_z(context_vector))  # (N, 256)
        return self.L_o(self.dropout(hidden, training=training))

    def run_fused(self, dec_input: tf.Tensor, images: EncodedImages, order: WordOrder) -> tuple[tf.Tensor, tf.Tensor]:
        """Runs all steps, as `RNNDecoder.run_fused`; only with a GRU."""
        h = self.initial_state(images)[:, : self.units]  # (B, 512)
        h, weights, *others = fused_decoder.run(dec_input, images, order, self.attention, self.cell, h, self.f_beta)
        return tf.concat([h, *others], axis=1), weights  # (N, 769), (N, 64)

    def call(self, token: tf.Tensor, images: EncodedImages | tf.Tensor, state: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Predicts the next word, as `RNNDecoder.call` does; the gate stands after the location weights, (B, L + 1)."""
        logits, state, location_weights = super().call(token, images, state)
        return logits, state, tf.concat([location_weights, state[:, -1:]], axis=1)  # (B, L + 1)


class CaptionModel(tf.keras.Model):
    """Encoder and decoder: what is trained, saved, and asked for captions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.encoder = CNNEncoder(config.embedding_dim, config.feature_dropout)
        self.decoder = PaperDecoder(config) if config.decoder == "paper" else RNNDecoder(config)
        self.cnn: tf.keras.layers.Layer | None = None  # if it is trained too: beyond/finetune/cnn_training.py

    @property
    def has_gate(self) -> bool:
        """Whether `step` returns a gate, too."""
        return self.config.decoder == "paper"

    def encode(self, features: tf.Tensor, training: bool = False) -> EncodedImages:
        """Encodes cached features (B, L, 2048), float16 or float32; or with a CNN pixels (B, size, size, 3) uint8."""
        features = self.cnn(features) if self.cnn else features  # (B, L, 2048)
        return self.decoder.encode(self.encoder(tf.cast(features, self.compute_dtype), training=training))

    def initial_state(self, images: EncodedImages) -> tf.Tensor:
        """Returns the decoder's state before the first word, (B, 512) float32, as `step` returns those after it."""
        return tf.cast(self.decoder.initial_state(images), tf.float32)

    def step(self, token: tf.Tensor, images: EncodedImages, state: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Predicts the next word of captions.

        Args:
            token: (B,), the previous word.
            images: those of the captions.
            state: (B, 512).

        Returns:
            logits (B, vocab_size), the new state (B, 512), and the location weights (B, L), or (B, L + 1) with the
            paper's decoder, the gate last; all float32.
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
        return self.decoder.teacher_force(tokens, self.encode(features, training), image_index, training, order)


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
    """Tells, by a small random model, whether fused_decoder.py has the values and gradients of the decoder's `step`."""
    small = dataclasses.replace(config, vocab_size=8, embedding_dim=5, units=6, dropout=0.0)
    return fused_decoder.matches(build(small, features_shape=(4, 7)))


def main(argv: list[str] | None = None) -> None:
    """Prints the shapes of a batch of 16 on its way through the model."""
    parser = make_parser(__doc__)
    add_options(parser.add_argument_group("model"), ModelConfig)
    model = build(ModelConfig.from_args(parser.parse_args(argv)))
    features = tf.zeros((16, *INCEPTION_V3.features_shape))
    images = model.encode(features)
    logits, state, attention_weights = model.step(tf.zeros(16, tf.int32), images, model.initial_state(images))
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
