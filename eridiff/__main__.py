"""`python -m eridiff`, and so `torchrun ... -m eridiff`, is the command line."""

import sys

from eridiff.cli import main

if __name__ == "__main__":
    sys.exit(main())
