# What the launch scripts share; sourced, not run.
# shellcheck shell=bash

# Exit statuses after which a run is started again: 75 (preempted, checkpoint written) and those of
# signals. Others are mistakes that another try would only repeat.
should_restart() {
  [ "$1" -eq 75 ] || [ "$1" -ge 128 ]
}

die() {
  echo "$(basename "$0"): error: $*" >&2
  exit 2
}

# Prints a command as a shell would read it.
show() {
  local text
  printf -v text '%q ' "$@"
  echo "${text% }"
}

# Runs a command, or with DRY_RUN=1 prints it.
run() {
  if [ "${DRY_RUN:-0}" = 1 ]; then
    show "$@"
  else
    "$@"
  fi
}

# Refuses what is no whole number of at least 1: need_count NAME VALUE
need_count() {
  case "$2" in
    '' | *[!0-9]* | 0*) die "$1 must be a whole number of at least 1, got '$2'" ;;
  esac
}
