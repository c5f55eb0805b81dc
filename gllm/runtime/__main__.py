"""`python -m gllm.runtime`."""

import sys

from gllm.runtime.cli import main

if __name__ == "__main__":
    sys.exit(main())
