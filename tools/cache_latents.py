#!/usr/bin/env python3
"""``symbiotic cache-latents`` under its old name."""

import sys

from symbiotic_titan.cli import main

if __name__ == "__main__":
    sys.exit(main(["cache-latents", *sys.argv[1:]]))
