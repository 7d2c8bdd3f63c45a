#!/usr/bin/env python3
"""``symbiotic show-parallel`` under its old name."""

import sys

from symbiotic_titan.cli import main

if __name__ == "__main__":
    sys.exit(main(["show-parallel", *sys.argv[1:]]))
