"""The plainest loop of each framework, to show that ``non_private`` is not slowed down to make the others look fast."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.peers import mean_loss_step
from dptrain.comparison.measure import Bench


def torch_loop(bench: Bench) -> Callable[[], None]:
    """A loop as in torch's tutorials, with the mean loss and SGD."""
    import torch

    return mean_loss_step(bench, bench.model.train(), torch.optim.SGD(bench.model.parameters(), bench.learning_rate))


def keras_loop(bench: Bench) -> Callable[[], None]:
    """``GradientTape`` in a ``tf.function``, as in Keras' guide to custom loops."""
    import keras
    import tensorflow as tf

    model, optimizer = bench.model, keras.optimizers.SGD(bench.learning_rate)
    optimizer.build(model.trainable_variables)

    @tf.function
    def train() -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(bench.loss(bench.y, model(bench.x, training=True)))
        optimizer.apply(tape.gradient(loss, [v.value for v in model.trainable_variables]), model.trainable_variables)

    return train
