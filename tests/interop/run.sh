#!/usr/bin/env bash
# Check against optimum + gptqmodel, both ways: they load what we write, we load what they write, same logits.
# Makes their environment (.venv-interop, or $QQUANT_INTEROP_VENV) unless it is there; arguments go to check.py.
set -euo pipefail
cd "$(dirname "$0")/../.."

ours=${QQUANT_PYTHON:-.venv/bin/python}
theirs=${QQUANT_INTEROP_VENV:-.venv-interop}
here=tests/interop

if [ ! -x "$ours" ]; then
    echo "interop: $ours is missing; make our own environment first (make install) or set QQUANT_PYTHON" >&2
    exit 2
fi

# The mark is written last, so an install that was cut off is done again.
mark="$theirs/qquant-interop-ready"
wanted=$(cat "$here/constraints.txt" "$here/requirements.txt")
if [ -z "${QQUANT_INTEROP_VENV:-}" ] && [ "$(cat "$mark" 2>/dev/null)" != "$wanted" ]; then
    echo "interop: making $theirs (about 1.6 GB)" >&2
    rm -rf "$theirs"
    "$ours" -m venv "$theirs"
    "$theirs/bin/pip" install --quiet torch==2.13.0 numpy
    "$theirs/bin/pip" install --quiet -c "$here/constraints.txt" -r "$here/requirements.txt"
    printf '%s\n' "$wanted" >"$mark"
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$ours" "$here/check.py" --their-python "$theirs/bin/python" "$@"
