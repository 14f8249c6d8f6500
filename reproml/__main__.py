"""`python -m reproml VERB`: the same verbs as the invoke tasks."""

import sys

from reproml.cli import main

if __name__ == "__main__":
    sys.exit(main())
