"""Everything below imports this first, processes that a test starts included: it prepares torchtitan for a machine without an
accelerator, so that no test depends on the order of its imports."""

import symbiotic_titan

__all__ = ["symbiotic_titan"]
