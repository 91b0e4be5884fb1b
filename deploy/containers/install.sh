#!/bin/sh
# Install fedsp from a wheelhouse into PREFIX, without a network: what the images do, and what can be done by hand on a
# machine that has none. Every file is held against its digest in the wheelhouse's requirements.txt.
#
#     install.sh WHEELHOUSE PREFIX        (make wheelhouse makes WHEELHOUSE)
set -eu
wheelhouse=${1:?usage: install.sh WHEELHOUSE PREFIX}
prefix=${2:?usage: install.sh WHEELHOUSE PREFIX}
"${PYTHON:-python3}" -m venv "$prefix"
"$prefix/bin/python" -m pip --isolated --disable-pip-version-check install --no-index --find-links "$wheelhouse" \
    --require-hashes --only-binary :all: -r "$wheelhouse/requirements.txt"
"$prefix/bin/fedsp" --version
