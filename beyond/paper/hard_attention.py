"""Hard attention (Xu et al. 2015, section 4.1): the decoder sees one location for each word, not a mean of all.

In training it is sampled with the attention weights as probabilities, for half of the captions; the others get the
expectation, which is soft attention. In captioning it is the most probable location.
"""

from typing import Any, NamedTuple

from captioning.base.quiet_tensorflow import tf
from model import BahdanauAttention, EncodedImages, RNNDecoder


class SampledImages(NamedTuple):
    """Encoded images with the random numbers of a training step, or of all steps."""

    features: tf.Tensor  # (B, L, 256)
    keys: tf.Tensor  # (B, L, 512), W1 features
    gumbel: tf.Tensor  # (B, L) of one step, or (T, B, L) of all
    is_sampled: tf.Tensor  # (B, 1) bool: the captions whose locations are sampled


class HardWeights(NamedTuple):
    """What hard attention returns in training, instead of the attention weights alone."""

    attention: tf.Tensor  # (B, L), the probabilities of the locations
    location: tf.Tensor  # (B, L), the weights of the context vector: a one-hot row where the location was sampled


class HardOutput(NamedTuple):
    """The fields of `model.TeacherForcingOutput`, and what was sampled."""

    logits: tf.Tensor  # (N, vocab_size), of the next word
    attention_weights: tf.Tensor  # (N, L), which sum to 1
    positions: tf.Tensor  # (N, 2) int32
    targets: tf.Tensor  # (N,) int32, the true next words
    location_weights: tf.Tensor  # (N, L), the weights of the context vector
    is_sampled: tf.Tensor  # (N, 1) bool, whether that is one location, which in training is sampled


class HardAttention(BahdanauAttention):
    """Bahdanau's scores, of which one location is chosen."""

    def __init__(self, units: int):
        super().__init__(units)
        self.autocast = False  # in mixed precision Keras would round the noise; all else has its dtype
        self.seed_generator = tf.keras.random.SeedGenerator()

    def call(self, images: EncodedImages | SampledImages, state: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Computes the context vector (B, 256) of one step; and its one-hot rows (B, L), or in training `HardWeights`.

        In training the images come with the noise of the step.
        """
        scores = self.score(images.keys, state)  # (B, L)
        attention_weights = tf.nn.softmax(scores)
        scores = tf.cast(scores, tf.float32)
        sampled = images if isinstance(images, SampledImages) else None
        if sampled:
            scores += sampled.gumbel  # the largest of scores + Gumbel noise is a sample of their softmax (Gumbel 1954)
        location_weights = tf.one_hot(tf.argmax(scores, axis=1), tf.shape(scores)[1], dtype=attention_weights.dtype)
        if sampled:
            location_weights = tf.where(sampled.is_sampled, location_weights, attention_weights)
        context_vector = tf.squeeze(tf.matmul(location_weights[:, tf.newaxis], images.features), axis=1)  # (B, 256)
        return context_vector, HardWeights(attention_weights, location_weights) if sampled else location_weights

    def sample_noise(self, images: EncodedImages, num_steps: tf.Tensor) -> SampledImages:
        """Adds the noise of all steps to images; half of the captions get the expectation."""
        num_captions, num_locations = tf.shape(images.keys)[0], images.keys.shape[1]
        shape = (num_steps, num_captions, num_locations)
        uniform = tf.keras.random.uniform(shape, minval=1e-30, seed=self.seed_generator)
        is_sampled = tf.keras.random.uniform((num_captions, 1), seed=self.seed_generator) < 0.5
        return SampledImages(*images, -tf.math.log(-tf.math.log(uniform)), is_sampled)


class HardTeacherForcing(RNNDecoder):
    """A decoder with hard attention; a subclass inherits the rest from a decoder with soft attention."""

    attention_class = HardAttention

    @tf.autograph.to_graph
    def teacher_force(self, tokens: tf.Tensor, images: EncodedImages, training: bool = False) -> HardOutput:
        """Runs teacher forcing as `RNNDecoder.teacher_force`; in training with sampled locations."""
        num_captions, num_steps = tf.shape(tokens)[0], tf.shape(tokens)[1] - 1
        dec_input = self.dropout(self.embedding(tf.transpose(tokens[:, :-1])), training=training)  # (T, B, 256)
        # Outside training the noise is 0, so that the "sampled" location is the most probable one.
        if training:
            noise = self.attention.sample_noise(images, num_steps)
        else:
            no_noise = tf.zeros((num_steps, num_captions, images.keys.shape[1]))
            noise = SampledImages(*images, no_noise, tf.fill((num_captions, 1), True))
        state = self.initial_state(images)
        outputs, attention_weights, location_weights = (tf.TensorArray(state.dtype, num_steps) for _ in range(3))
        for t in tf.range(num_steps):
            output, state, weights = self.step(dec_input[t], noise._replace(gumbel=noise.gumbel[t]), state)
            outputs = outputs.write(t, output)
            attention_weights = attention_weights.write(t, weights.attention)
            location_weights = location_weights.write(t, weights.location)

        row = tf.range(num_steps * num_captions)  # step after step, as `concat` packs them
        return HardOutput(
            logits=self.to_logits(outputs.concat(), training),
            attention_weights=attention_weights.concat(),
            positions=tf.stack([row % num_captions, row // num_captions], axis=1),
            targets=tf.reshape(tf.transpose(tokens[:, 1:]), [-1]),
            location_weights=location_weights.concat(),
            is_sampled=tf.tile(noise.is_sampled, [num_steps, 1]),
        )
