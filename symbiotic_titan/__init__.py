"""symbiotic_titan: a native-PyTorch trainer for unified multimodal Mixture-of-Experts models."""

from symbiotic_titan.device import stub_triton_kernels

__version__ = "0.1.0"

# Without Triton no module of torchtitan can be imported; with it this does nothing.
stub_triton_kernels()
