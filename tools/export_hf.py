"""A Megatron checkpoint to a Hugging Face folder.

`python tools/export_hf.py SOURCE OUTPUT` is the same as `megatron-r1 export`.
"""

import sys

from megatron_r1.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
