#!/bin/sh
# Makes the virtual environment and installs Exactune in it, editable; an argument names extras: install.sh test,check
# Where there is no NVIDIA GPU torch is pinned to 2.13.0, of which there is a CPU build: a bare `torch` would fetch
# gigabytes of CUDA packages.
set -eu
extras=${1:+[$1]}
: "${PYTHON:=python3}" "${VENV:=.venv}"

say() { echo "exactune: $*"; }
fail() {
  for line in "$@"; do say "$line" >&2; done
  exit 1
}
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
pip() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

make_venv() {
  # The plain python3 may be an old one beside a newer: macOS has such a one. A Python that was named is taken or refused.
  candidates=$PYTHON
  [ "$PYTHON" != python3 ] || candidates="python3 python3.14 python3.13 python3.12 python3.11 python3.10"
  for python in $candidates; do
    recent "$python" && break
    python=
  done
  [ -n "$python" ] || fail "Python 3.10 or later is needed; here is $("$PYTHON" --version 2>/dev/null || echo "no $PYTHON")." \
    "Install one, or name it: make PYTHON=/path/to/python3.12 …"
  # Debian and Ubuntu ship Python without these two, and a venv made without them has no pip.
  "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python cannot make virtual environments: its venv module is missing." \
    "On Debian and Ubuntu: sudo apt-get install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
  say "making $VENV with $("$python" --version)"
  "$python" -m venv --clear "$VENV"
}

# Also made anew where an earlier attempt broke off before it had pip.
"$VENV/bin/python" -m pip --version >/dev/null 2>&1 || make_venv

if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
  if command -v nvidia-smi >/dev/null 2>&1; then
    say "installing torch for the NVIDIA GPU (some gigabytes)"
    pip torch
  else
    say "installing torch 2.13.0 (no NVIDIA GPU here)"
    pip torch==2.13.0
  fi
fi
say "installing exactune$extras and what it stands on"
pip --editable ".$extras"
