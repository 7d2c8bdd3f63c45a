#!/usr/bin/env python3
"""``symbiotic run-study`` under its old name."""

import sys

from symbiotic_titan.cli import main

if __name__ == "__main__":
    sys.exit(main(["run-study", *sys.argv[1:]]))
