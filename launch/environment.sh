#!/bin/sh
# usage: environment.sh FOLDER REQUIREMENT
# Makes a virtual environment with Python 3.12 in FOLDER, unless one is there, and installs this project into it,
# with the versions in constraints.txt.
set -eu
folder=$1
requirement=$2

find_python() {
    for candidate in python3.12 "${HOME:-/}"/.pyenv/versions/3.12.*/bin/python3.12 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

if [ ! -x "$folder/bin/python" ]; then
    if python=$(find_python); then
        "$python" -m venv "$folder" || {
            echo "error: $python has no working venv module (Debian: apt install python3.12-venv)" >&2
            exit 1
        }
    elif command -v uv >/dev/null 2>&1 && uv --version >/dev/null 2>&1; then
        uv venv --quiet --seed --python 3.12 "$folder"
    else
        echo "error: no Python 3.12 found (looked for python3.12, pyenv's versions, and uv): install one of them" >&2
        exit 1
    fi
fi

# uv resolves and unpacks several times faster than pip.
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'
echo "installing $requirement into $folder" >&2
# Compiled at once, as pip does: where Python may not write, each start would compile jax again (5 s).
"$folder/bin/python" -m uv pip install --quiet --compile-bytecode --python "$folder/bin/python" -c constraints.txt -e "$requirement"
