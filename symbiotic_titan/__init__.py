"""symbiotic_titan: a native-PyTorch trainer for unified multimodal Mixture-of-Experts models."""

from symbiotic_titan import device, moved

__version__ = "0.1.0"

# Before anything of ours imports torchtitan, which needs to be told of a machine without an accelerator.
device.prepare()
moved.install()
