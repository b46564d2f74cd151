"""`python -m distilfast` is the command `distilfast`."""

from distilfast.cli import script

if __name__ == "__main__":
    script()
