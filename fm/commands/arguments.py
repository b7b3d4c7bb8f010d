"""What the command modules share.

A command module has `add(commands)`, which declares its arguments, and imports what it needs when it runs: `--help`
answers at once.
"""

import argparse
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
