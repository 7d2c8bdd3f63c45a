#!/usr/bin/env python3
"""``symbiotic show-config`` under its old name."""

import sys

from symbiotic_titan.cli import main

if __name__ == "__main__":
    sys.exit(main(["show-config", *sys.argv[1:]]))
