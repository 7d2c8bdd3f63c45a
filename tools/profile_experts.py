#!/usr/bin/env python3
"""``symbiotic profile-experts`` under its old name."""

import sys

from symbiotic_titan.cli import main

if __name__ == "__main__":
    sys.exit(main(["profile-experts", *sys.argv[1:]]))
