"""`python -m gllm.sim`."""

import sys

from gllm.sim.cli import main

if __name__ == "__main__":
    sys.exit(main())
