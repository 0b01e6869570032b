"""TensorFlow Privacy. https://github.com/tensorflow/privacy (Keras 2, an environment of its own)."""

from benchmarks.peers.elsewhere import Elsewhere

INSTALL = (
    "python3.11 -m venv tfp; tfp/bin/pip install tensorflow==2.15.1 tensorflow-privacy==0.9.0; then set "
    "TFPRIVACY_PYTHON=$PWD/tfp/bin/python"
)

# Its Jacobian takes a whole backward pass for every example: many times slower than the model below, and not a standard case.
vectorized = Elsewhere("tfprivacy", "vectorized", "TFPRIVACY_PYTHON", INSTALL)
dp_model = Elsewhere("tfprivacy", "dp_model", "TFPRIVACY_PYTHON", INSTALL)  # DPSequential, with fast gradient clipping where it can
