#!/bin/sh
# Makes the virtual environment and installs Exactune in it, editable; an argument names extras: install.sh test,check
# Where there is no NVIDIA GPU torch is pinned to 2.13.0, of which there is a CPU build: a bare `torch` would fetch
# gigabytes of CUDA packages.
set -eu
extras=${1:+[$1]}
: "${PYTHON:=python3}" "${VENV:=.venv}"

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "Exactune needs Python 3.10 or later; $("$PYTHON" --version) was found. Name another: make PYTHON=python3.12 …" >&2
  exit 1
}
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
say() { echo "exactune: $*"; }

if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
  if command -v nvidia-smi >/dev/null 2>&1; then
    say "installing torch for the NVIDIA GPU"
    pip torch
  else
    say "installing torch 2.13.0 (no NVIDIA GPU here)"
    pip torch==2.13.0
  fi
fi
say "installing exactune$extras"
pip --editable ".$extras"
