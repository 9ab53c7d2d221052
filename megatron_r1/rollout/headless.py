"""A part of a vLLM engine that spans nodes, on a node where nothing listens for requests.

    python -m megatron_r1.rollout.headless --model=MODEL --headless --nnodes=2 --node-rank=1 --master-addr=... ...

This is `vllm serve --headless`, started below vLLM's own command line: that asks for the version of a distribution
called "vllm", which the one for CPU is not. The module that serves HTTP (`vllm.entrypoints.openai.api_server`) passes
over `--headless`.
"""

import sys
from collections.abc import Sequence

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.logger import configure_logging_from_args
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main(arguments: Sequence[str]) -> None:
    """Run until a worker of this part dies, or SIGTERM.

    Raises:
        SystemExit: arguments that vLLM does not know, or SIGTERM.
        ValueError: arguments that do not go together.
    """
    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="megatron_r1.rollout.headless"))
    parsed = parser.parse_args(list(arguments))
    configure_logging_from_args(parsed)
    command = ServeSubcommand()
    command.validate(parsed)
    command.cmd(parsed)


if __name__ == "__main__":
    main(sys.argv[1:])
