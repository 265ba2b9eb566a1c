#!/usr/bin/env bash
# Everything that a machine with a GPU can show, in steps that can be taken in several calls; gpu/run.py has the options:
#
#     bench/gpu.sh [tests] [sanitize] [bench] [models] [--out FOLDER] [--seconds N]
cd "$(dirname "$0")/.." || exit 2
[[ -z ${PYTHON:-} && -x .venv/bin/python ]] && PYTHON=.venv/bin/python
exec "${PYTHON:-python3}" -m bench.gpu.run "$@"
