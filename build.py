"""`python build.py CHECKPOINT --out BUNDLE` in a checkout is `latentrt build CHECKPOINT --out BUNDLE`."""

import sys

from latentrt.cli import main

if __name__ == "__main__":
    sys.exit(main(["build", *sys.argv[1:]]))
