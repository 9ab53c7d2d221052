"""Stock vLLM, without anything of ours: `python greedy_program.py RESULT.json DTYPE FOLDER...`

Serves each folder in turn, and writes by folder the greedy answers to `PROMPTS`: text and token ids.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_MLA_DISABLE": "1",  # vLLM's CPU backend has no kernel of multi-latent attention
    "VLLM_NO_USAGE_STATS": "1",
}

PROMPTS = ["What is 3 + 4?", "abc", "The quick brown fox", "0"]
TOKENS = 16


def serve(folder: str, dtype: str) -> list[dict[str, Any]]:
    """Greedy answers of one model."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=len(PROMPTS),
        kv_cache_memory_bytes=2**25,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        # Upstream bug (vLLM 0.32): the CPU rotary kernel misreads the strided queries of latent attention.
        compilation_config={"custom_ops": ["all", "-rotary_embedding"]},
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    answers = engine.generate(PROMPTS, greedy, use_tqdm=False)
    return [{"text": each.outputs[0].text, "ids": list(each.outputs[0].token_ids)} for each in answers]


def main() -> None:
    """One engine after another in this process."""
    result, dtype, *folders = sys.argv[1:]
    Path(result).write_text(json.dumps({folder: serve(folder, dtype) for folder in folders}))


if __name__ == "__main__":
    main()
