"""LipDP: Clipless DP-SGD on Lipschitz networks. https://github.com/deel-ai/lipdp (not on PyPI; Keras 2, an environment of its own)."""

from benchmarks.peers.elsewhere import Elsewhere

INSTALL = (
    "git clone https://github.com/deel-ai/lipdp; python3.11 -m venv lip; lip/bin/pip install tensorflow==2.15.1 deel-lip==1.5.0 "
    "autodp==0.2.3.1 tensorflow-datasets 'tensorflow-metadata<1.16' pandas matplotlib; then set LIPDP=$PWD/lipdp and "
    "LIPDP_PYTHON=$PWD/lip/bin/python"
)

quick = Elsewhere("lipdp", "quick", "LIPDP_PYTHON", INSTALL, "LIPDP")  # constraints after each step, as in its README
spectral = Elsewhere("lipdp", "spectral", "LIPDP_PYTHON", INSTALL, "LIPDP")  # normalised in the forward pass
