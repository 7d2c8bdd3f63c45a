#!/usr/bin/env python3
"""``symbiotic generate`` under its old name."""

import sys

from symbiotic_titan.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
