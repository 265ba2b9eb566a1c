#!/usr/bin/env bash
# Everything that a machine with a GPU can show; gpu/run.sh has the parts and their options.
exec bash "$(dirname "$0")/gpu/run.sh" "$@"
