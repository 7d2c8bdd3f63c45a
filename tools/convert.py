#!/usr/bin/env python3
"""``symbiotic convert`` under its old name."""

import sys

from symbiotic_titan.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
