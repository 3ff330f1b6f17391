#!/usr/bin/env bash
# One process of a job: launch/run.sh COMMAND... A container begins here, and so does each task of the other scripts.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$@"
