#!/usr/bin/env python3
"""``symbiotic check-data`` under its old name."""

import sys

from symbiotic_titan.cli import main

if __name__ == "__main__":
    sys.exit(main(["check-data", *sys.argv[1:]]))
