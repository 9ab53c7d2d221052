"""What a checkpoint is.

`python tools/inspect_checkpoint.py PATH` is the same as `megatron-r1 inspect`.
"""

import sys

from megatron_r1.cli import main

if __name__ == "__main__":
    sys.exit(main(["inspect", *sys.argv[1:]]))
