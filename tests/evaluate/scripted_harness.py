"""Stands in for the command line of lm-evaluation-harness: each task says what becomes of the run."""

import json
import sys
import time
from pathlib import Path
from typing import Any

RESULTS: dict[str, Any] = {
    "results": {
        "gsm8k": {
            "name": "gsm8k",
            "alias": "gsm8k",
            "sample_len": 8,
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": 0.125,
            "exact_match,flexible-extract": 0.5,
            "exact_match_stderr,flexible-extract": "N/A",
        },
        "mmlu": {"alias": "mmlu", "acc,none": 0.75, "acc_stderr,none": 0.0625},
        "mmlu_law": {"alias": " - law", "acc,none": 0.75, "acc_stderr,none": float("nan")},
    },
    "groups": {"mmlu": {"alias": "mmlu", "acc,none": 0.75, "acc_stderr,none": 0.0625}},
    "versions": {"gsm8k": 3.0, "mmlu": 2, "mmlu_law": 1.0},
    "n-shot": {"gsm8k": 5, "mmlu_law": 0},
    "n-samples": {"gsm8k": {"original": 1319, "effective": 8}, "mmlu_law": {"original": 20, "effective": 8}},
    "lm_eval_version": "0.4.13",
}
"""As version 0.4.13 writes them, in part."""


def main(action: str, *options: str) -> int:
    values = dict(option.removeprefix("--").partition("=")[::2] for option in options)
    tasks = values["tasks"].split(",")
    if action == "validate":
        print("Tasks not found: absent" if "absent" in tasks else "All tasks found and valid")
        return int(bool({"absent", "broken"} & set(tasks)))
    print(f"asking for {tasks}")
    folder = Path(values["output_path"]) / json.loads(values["model_args"])["model"]
    folder.mkdir(parents=True, exist_ok=True)
    if "hangs" in tasks:
        (folder / "started").touch()
        time.sleep(600)
    if "fails" in tasks:
        return 3
    if "silent" not in tasks:
        (folder / f"results_{time.time_ns()}.json").write_text("{" if "garbled" in tasks else json.dumps(RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
