"""`python -m latentrt` is the command `latentrt`."""

import sys

from latentrt.cli import main

if __name__ == "__main__":
    sys.exit(main())
