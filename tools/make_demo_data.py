#!/usr/bin/env python3
"""``symbiotic make-demo-data`` under its old name."""

import sys

from symbiotic_titan.cli import main

if __name__ == "__main__":
    sys.exit(main(["make-demo-data", *sys.argv[1:]]))
