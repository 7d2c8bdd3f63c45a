"""symbiotic_titan: a native-PyTorch trainer for unified multimodal Mixture-of-Experts models."""

__version__ = "0.1.0"
