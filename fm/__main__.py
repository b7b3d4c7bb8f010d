"""`python -m fm` is the command `fm`, so that `accelerate launch -m fm evaluate RUN` works."""

import sys

from fm.cli import main

if __name__ == "__main__":
    sys.exit(main())
