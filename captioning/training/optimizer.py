"""Adam with fewer passes over the weights than Keras's, and the moving average of the weights."""

import contextlib
from collections.abc import Iterator
from typing import Any

from captioning.base.cli import defer_interrupts
from captioning.base.devices import has_gpu
from captioning.base.quiet_tensorflow import tf


class FusedAdam(tf.keras.optimizers.Adam):
    """Keras's Adam with its arithmetic in TensorFlow's one operation for it: one pass over the weights, not ten."""

    slow: frozenset[int] = frozenset()  # the indices of the variables with a learning rate of their own
    slow_factor = 1.0  # theirs is `learning_rate` times this

    def _backend_update_step(self, gradients: list[tf.Tensor], variables: list[Any], learning_rate: tf.Tensor) -> None:
        """Computes what depends only on the step once, and not for each variable."""
        step = tf.cast(self.iterations + 1, tf.float32)
        rates = tf.cast(learning_rate, tf.float32), self.beta_1**step, self.beta_2**step
        super()._backend_update_step(gradients, variables, rates)

    def update_step(self, gradient: tf.Tensor, variable: Any, rates: tuple[tf.Tensor, tf.Tensor, tf.Tensor]) -> None:
        """Updates a variable and its moments; `rates` are the learning rate and the powers of both betas."""
        index = self._get_variable_index(variable)
        learning_rate, beta1_power, beta2_power = rates
        if index in self.slow:
            learning_rate *= self.slow_factor
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].handle,
            v=self._velocities[index].handle,
            beta1_power=beta1_power,
            beta2_power=beta2_power,
            lr=learning_rate,
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )

    def _clip_gradients(self, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        """Clips as Keras does, without storing squares; on a CPU also without a copy where there is nothing to clip."""
        norm = tf.linalg.global_norm(gradients)

        def clip() -> list[tf.Tensor]:
            return tf.clip_by_global_norm(gradients, self.global_clipnorm, norm)[0]

        if has_gpu():  # which a branch would wait for
            return clip()
        return tf.cond(norm <= self.global_clipnorm, lambda: gradients, clip)

    def _all_reduce_sum_gradients(self, grads_and_vars: list[tuple]) -> list[tuple]:
        """Returns the gradients as they are: train_step has summed them over the replicas, before they are clipped."""
        return grads_and_vars


def make_optimizer(learning_rate: float, clip_norm: float, mixed_precision: bool) -> tf.keras.optimizers.Optimizer:
    """Makes Adam; in mixed precision it scales the loss, so that small gradients are not lost in float16."""
    adam = FusedAdam(learning_rate, global_clipnorm=clip_norm)
    return tf.keras.optimizers.LossScaleOptimizer(adam) if mixed_precision else adam


def slow_down(optimizer: tf.keras.optimizers.Optimizer, variables: list[Any], factor: float) -> None:
    """Multiplies the learning rate of some of the variables with which an optimizer was built by a factor."""
    adam = getattr(optimizer, "inner_optimizer", optimizer)
    adam.slow, adam.slow_factor = frozenset(map(adam._get_variable_index, variables)), factor


class WeightEMA(tf.Module):
    """An exponential moving average of the weights (Polyak and Juditsky 1992).

    Its captions and scores change less from epoch to epoch than those of the weights of any one step.
    """

    def __init__(self, variables: list[tf.Variable], decay: float):
        super().__init__()
        self.decay = decay
        self.variables_to_average = variables if decay else []  # without a decay there is no average
        self.shadow = [tf.Variable(variable, trainable=False) for variable in self.variables_to_average]
        self.num_updates = tf.Variable(0.0)

    def update(self, is_applied: tf.Tensor | float = 1.0) -> None:
        """Moves the average towards the weights; quickly at first, so that the random start is soon forgotten.

        `is_applied` is 0 after a step that the optimizer has skipped, which changes nothing here.
        """
        self.num_updates.assign_add(is_applied)
        decay = tf.minimum(self.decay, (1.0 + self.num_updates) / (10.0 + self.num_updates))
        for shadow, variable in zip(self.shadow, self.variables_to_average, strict=True):
            shadow.assign_add(is_applied * (1.0 - decay) * (variable - shadow))

    def restart(self) -> None:
        """Begins anew with the weights as they are."""
        for shadow, variable in zip(self.shadow, self.variables_to_average, strict=True):
            shadow.assign(variable)
        self.num_updates.assign(0)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Replaces the weights by their average while the block runs."""
        weights = [variable.numpy() for variable in self.variables_to_average]
        try:
            for shadow, variable in zip(self.shadow, self.variables_to_average, strict=True):
                variable.assign(shadow)
            yield
        finally:  # also at Ctrl-C, which saves the weights; a second one must not leave half of them
            with defer_interrupts():
                for value, variable in zip(weights, self.variables_to_average, strict=True):
                    variable.assign(value)
