"""The networks that the benchmarks measure beside the standard ones are the same in both frameworks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dptrain_tf
import dptrain_torch
from benchmarks import networks
from benchmarks.run import OTHERS, STANDARD

NETWORKS = {"mobilenet": (16, 16, 3), "wide_resnet": (16, 16, 3), "text_cnn": (12,), "lstm": (12,), "gru": (12,)}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_the_same_in_both_frameworks(name: str) -> None:
    shape, make = NETWORKS[name], getattr(networks, name)
    rng = np.random.default_rng(0)
    ids = len(shape) == 1
    x = rng.integers(0, 50, (2, *shape)) if ids else rng.normal(size=(2, *shape)).astype("float32")
    ours, theirs = make("torch", shape, 5), make("tensorflow", shape, 5)
    assert tuple(ours(torch.from_numpy(x)).shape) == tuple(theirs(x).shape) == (2, 5)
    # torch's recurrent layers have a bias for each of their two maps, Keras' LSTM one for both
    extra = 4 * 128 if name == "lstm" else 0
    assert sum(p.numel() for p in ours.parameters()) == theirs.count_params() + extra
    plans = [dptrain_torch.describe(ours, torch.from_numpy(x)), dptrain_tf.describe(theirs, x)]
    facts = [sorted((layer.kind, layer.positions, layer.fan_in, layer.fan_out) for layer in plan.layers) for plan in plans]
    assert facts[0] == facts[1]
    assert not any(kind == "generic" for kind, *_ in facts[0])


def test_every_case_of_the_benchmarks_has_its_own_name() -> None:
    names = [case.name for case in (*STANDARD, *OTHERS)]
    assert len(set(names)) == len(names)
    assert set(NETWORKS) < set(names)
