"""Real states of single ranks, in a process of their own: a fake process group does not go with a true one.

``python -m tests.plan.proof_program CASES`` takes a JSON list of ``[[model], [parallel], gpus, [ranks]]`` and prints
for each a list of what `real_state` gives.
"""

import json
import sys

from megatron_r1.config.sections import ModelSection, ParallelSection
from megatron_r1.plan.proof import real_state


def main() -> None:
    print(
        json.dumps(
            [
                [real_state(ModelSection(**model), ParallelSection(**parallel), gpus, rank) for rank in ranks]
                for model, parallel, gpus, ranks in json.loads(sys.argv[1])
            ]
        )
    )


if __name__ == "__main__":
    main()
