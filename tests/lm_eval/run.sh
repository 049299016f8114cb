#!/usr/bin/env bash
# Do our tasks in lm-eval's format decide every item as lm-evaluation-harness does, with the same model object?
# Makes the harness's environment (.venv-lm-eval, or $QQUANT_LM_EVAL_VENV) unless it is there; arguments go to check.py.
set -euo pipefail
cd "$(dirname "$0")/../.."

ours=${QQUANT_PYTHON:-.venv/bin/python}
theirs=${QQUANT_LM_EVAL_VENV:-.venv-lm-eval}
here=tests/lm_eval

# The mark is written last, so an install that was cut off is done again. The wheel index for CPUs would save a
# gigabyte; pip takes it from PIP_EXTRA_INDEX_URL where that is set.
mark="$theirs/qquant-lm-eval-ready"
wanted=$(cat "$here/constraints.txt" "$here/requirements.txt")
if [ -z "${QQUANT_LM_EVAL_VENV:-}" ] && [ "$(cat "$mark" 2>/dev/null)" != "$wanted" ]; then
    if [ ! -x "$ours" ]; then
        echo "lm-eval: $ours is missing; make our own environment first (make install) or set QQUANT_PYTHON" >&2
        exit 2
    fi
    echo "lm-eval: making $theirs (about 1.8 GB)" >&2
    rm -rf "$theirs"
    "$ours" -m venv "$theirs"
    "$theirs/bin/pip" install --quiet torch==2.13.0 numpy
    "$theirs/bin/pip" install --quiet -c "$here/constraints.txt" -r "$here/requirements.txt"
    printf '%s\n' "$wanted" >"$mark"
fi

# Nothing is fetched: the harness gets our local files for data, and a model that is already in memory.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 PYTHONPATH="$PWD"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$theirs/bin/python" "$here/check.py" "$@"
