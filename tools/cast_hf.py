"""A Hugging Face folder or GGUF file to another dtype.

`python tools/cast_hf.py SOURCE OUTPUT` is the same as `megatron-r1 cast`.
"""

import sys

from megatron_r1.cli import main

if __name__ == "__main__":
    sys.exit(main(["cast", *sys.argv[1:]]))
