"""`python -m validation BUNDLE ...` in a checkout is `latentrt validate BUNDLE ...`."""

import sys

from latentrt.cli import main

if __name__ == "__main__":
    sys.exit(main(["validate", *sys.argv[1:]]))
