"""A Hugging Face folder or GGUF file to a Megatron checkpoint.

`python tools/import_hf.py SOURCE OUTPUT` is the same as `megatron-r1 import`.
"""

import sys

from megatron_r1.cli import main

if __name__ == "__main__":
    sys.exit(main(["import", *sys.argv[1:]]))
