"""`python -m fm` is the command `fm`, so that `accelerate launch -m fm evaluate RUN` works."""

import sys

from fm.cli import main

if __name__ == "__main__":
    code = main()
    if code:
        from fm.distributed import explain_launcher_traceback

        explain_launcher_traceback(code)
    sys.exit(code)
