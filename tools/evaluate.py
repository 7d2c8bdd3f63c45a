#!/usr/bin/env python3
"""``symbiotic evaluate`` under its old name."""

import sys

from symbiotic_titan.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
