"""`python -m runtime COMMAND ...` in a checkout is `latentrt COMMAND ...`."""

from latentrt.cli import run

if __name__ == "__main__":
    run()
