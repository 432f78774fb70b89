# Sourced by every finding with the packages that it pins. It gives two functions: `observe` runs the Python on its
# standard input with these packages, and shows and keeps what that prints; `expect` compares it with its own input.
set -euo pipefail
unset PYTHONPATH

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" 2> "$folder/pip" || {
    cat "$folder/pip" >&2
    echo "cannot install $*: this says nothing about the finding" >&2
    exit 2
}

observe() {
    cat > "$folder/observe.py"
    (cd "$folder" && "$venv/bin/python" -I observe.py) | tee "$folder/seen"
}

expect() {
    cat > "$folder/expected"
    diff "$folder/expected" "$folder/seen" > "$folder/changes" && return
    cat "$folder/changes"
    echo "CHANGED: $(basename "$0" .sh) is no longer what was recorded (< recorded, > seen)" >&2
    exit 1
}
