"""Digits with Keras' own compile and fit: epsilon 3 in ten epochs.

python examples/keras_fit.py [--strategy ghost] [--epochs 10] [--epsilon 3]
"""

from __future__ import annotations

import argparse

import keras

import dptrain
from dptrain.data import load
from dptrain_tf import PrivacyCallback, make_private


def network(shape: tuple[int, ...], classes: int) -> keras.Model:
    """A small convolutional network without batch normalisation."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Conv2D(16, 5, strides=2, padding="same", activation="relu"),
            layers.GroupNormalization(4),
            layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(32, activation="relu"),
            layers.Dense(classes),
        ]
    )


def main() -> None:
    """Train, print the promise, save the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="mnist_5k", help="a data set of dptrain.data, such as mnist_5k or fashion_mnist")
    parser.add_argument("--strategy", default="mixed_ghost", choices=["mixed_ghost", "ghost", "per_sample", "non_private"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--out", default="private.keras")
    options = parser.parse_args()

    data = load(options.data)
    model = network(data.input_shape, data.num_classes or 10)
    clipping = {} if options.strategy == "non_private" else {"max_grad_norm": 0.5}
    make_private(
        model,
        privacy=dptrain.Privacy(target_epsilon=options.epsilon, target_delta=1e-5),
        strategy=options.strategy,
        expected_batch_size=200,
        epochs=options.epochs,
        **clipping,
    )
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    held_out = (data.x_test, data.y_test)
    model.fit(data.x_train, data.y_train, epochs=options.epochs, validation_data=held_out, callbacks=[PrivacyCallback()], verbose=2)
    model.save(options.out)


if __name__ == "__main__":
    main()
