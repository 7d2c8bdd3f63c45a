"""Several modules for one run: experimental.custom_import names one module, which imports the others."""

from docs.examples import cosine_shield, sgd_builder, softplus_score, text_first

__all__ = ["cosine_shield", "sgd_builder", "softplus_score", "text_first"]
