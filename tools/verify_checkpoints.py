"""Compare two checkpoints.

`python tools/verify_checkpoints.py A B` is the same as `megatron-r1 verify`.
"""

import sys

from megatron_r1.cli import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
