# Sourced by the scripts here: makes .venv once and installs the package into it, again only when its needs change.

# The interpreter to build the environment with.
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "$candidate"
            return
        fi
    done
    echo "rewarm: no Python 3.11 or newer found; install one, or set PYTHON to it" >&2
    return 1
}

# prepare_environment [EXTRA]: activate .venv with the package (and an extra of it) installed.
prepare_environment() {
    local extra="${1:+[$1]}" wanted stamp python
    # The interpreter that is active now, with everything installed, is used as it is.
    if [ -n "${REWARM_USE_ACTIVE_PYTHON:-}" ]; then
        return
    fi
    wanted=$(cat setup.py framework/rewarm/versions.py csrc/cpu/* | cksum)
    stamp=".venv/.rewarm-installed${1:+-$1}"
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        python=$(find_python)
        echo "installing into .venv (one to three minutes the first time) ..."
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        # One word for each package, so that a slow network looks different from a hang.
        .venv/bin/python -m pip install --disable-pip-version-check --no-warn-script-location --editable ".$extra" |
            sed -un -e 's/^ *Collecting \([A-Za-z0-9_.-]*\).*/  \1/p' -e 's/^Installing collected.*/  installing .../p'
        echo "$wanted" > "$stamp"
    fi
    source .venv/bin/activate
}

# prepare_slurm: Debian's SLURM for the tests that start one of their own, where this may be installed. Its daemons are
# not started by the installation; without it those tests are skipped and say so.
prepare_slurm() {
    if command -v sbatch >/dev/null || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        return
    fi
    echo "installing slurm-wlm and munge for the tests of job submission ..."
    # What apt has to say matters only if it fails; an image may come without package lists.
    if ! { apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends slurm-wlm munge; } >/tmp/rewarm-apt.log 2>&1; then
        echo "SLURM could not be installed (see /tmp/rewarm-apt.log): its tests are skipped" >&2
    fi
}
