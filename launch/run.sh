#!/usr/bin/env bash
# Runs COMMAND with the environment of launch/env.sh: launch/run.sh COMMAND...
# This script is the entry point of the container, and the other scripts start each task with it.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$@"
