#!/bin/sh
# Make .venv with the packages of requirements.txt and requirements-dev.txt: `make venv` calls this. POSIX sh, so that it runs where
# nothing is installed yet.     ./install.sh [PYTHON]       a .venv of another version than a PYTHON that is named is replaced
set -u
cd "$(dirname "$0")" || exit 2
named=${1:-}
python=${named:-${PYTHON:-python3}}
needed_mib=${NEEDED_MIB:-7000} # torch's CUDA build with its libraries; with the CPU build all takes 2900

fail() { # two lines: what, and how to fix it
  printf 'error: %s\nfix: %s\n' "$1" "$2" >&2
  exit 2
}

version_of() { # MAJOR.MINOR of a Python, nothing if it does not run
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

if [ -z "$named" ] && [ -x .venv/bin/python ]; then
  python=.venv/bin/python # the environment that is there stays, whatever python3 is
fi
version=$(version_of "$python")
[ -n "$version" ] || fail "$python is not a Python that runs." \
  "install Python 3.11 (Debian: apt install python3 python3-venv), or name one: make venv PYTHON=/path/to/python3.11"
case $version in
  3.11 | 3.12 | 3.13) ;;
  *) fail "$python is Python $version; this project runs with 3.11, 3.12 and 3.13." \
    "name another: make venv PYTHON=python3.11" ;;
esac
touch .venv-probe 2>/dev/null || fail "$(pwd) cannot be written to, so .venv cannot be made in it." \
  "copy the checkout to a directory of yours: cp -r '$(pwd)' ~/minilmv2 && cd ~/minilmv2"
rm -f .venv-probe

old=$(version_of .venv/bin/python)
if [ -e .venv ] && [ "$old" != "$version" ]; then
  [ -L .venv ] && fail ".venv is a link to an environment of Python ${old:-that does not run}." \
    "remove the link (rm .venv) or name its Python: make venv PYTHON=python${old:-3.11}"
  echo "replacing .venv (Python ${old:-that does not run}) by one of Python $version"
  rm -rf .venv
fi
if [ ! -e .venv ]; then
  free_mib=$(df -Pk . | awk 'NR == 2 {print int($4 / 1024)}')
  [ "$free_mib" -ge "$needed_mib" ] || fail "there are $free_mib MiB free in $(pwd), and the packages need $needed_mib." \
    "free some space; or install torch's CPU build, with half of that: NEEDED_MIB=3300 PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make venv"
  if ! "$python" -m venv .venv; then
    rm -rf .venv
    fail "$python cannot make a virtual environment (its message is above)." \
      "install its module venv (Debian: apt install python$version-venv), or name another Python: make venv PYTHON=python3.11"
  fi
fi
quiet='--quiet --progress-bar off'
case ${MINILMV2_VERBOSE:-0} in 0) ;; *) quiet='' ;; esac
# shellcheck disable=SC2086 # two options, or none
if ! .venv/bin/python -m pip install --disable-pip-version-check $quiet -r requirements.txt -r requirements-dev.txt; then
  fail "the packages could not be installed (pip's messages are above)." \
    "without a network: pip download -r requirements.txt -r requirements-dev.txt -d wheels elsewhere, copy wheels/ here, and PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels make venv; with one, run the same command again"
fi
touch .venv/.installed
