#!/usr/bin/env bash
# Installs the flight stack on a lab PC: Ubuntu 24.04 with ROS 2 Jazzy or Kilted from apt. docs/install_lab_pc.md
# explains each step. Run it as the user who will fly, from anywhere; it asks for sudo where it needs it.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: scripts/install_lab_pc.sh [--distro jazzy|kilted] [--dry-run]
  --distro   ROS 2 distribution (default: the one in /opt/ros)
  --dry-run  print the commands, change nothing
exit status: 0 installed and checked, 1 a step failed or the PC is not fit, 2 wrong usage
TEXT
}

fail() { echo "install_lab_pc: $*" >&2; exit 1; }
step() { echo "== $*"; }

run() {
    printf '+'; printf ' %q' "$@"; echo
    if [ "$dry_run" = false ]; then "$@"; fi
}

distro='' dry_run=false
while [ $# -gt 0 ]; do
    case "$1" in
        --distro) [ $# -ge 2 ] || { usage >&2; exit 2; }; distro=$2; shift 2 ;;
        --dry-run) dry_run=true; shift ;;
        -h|--help) usage; exit 0 ;;
        *) echo "install_lab_pc: unknown argument '$1'" >&2; usage >&2; exit 2 ;;
    esac
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
[ "$dry_run" = true ] || [ "$(id -u)" -ne 0 ] || fail "run it as the user who will fly, not as root"

step "the PC"
# shellcheck source=/dev/null
system=$(. /etc/os-release && echo "$ID $VERSION_ID")
if [ "$system" != 'ubuntu 24.04' ]; then
    [ "$dry_run" = true ] || fail "this is $system; expected ubuntu 24.04 (ROS 2 Jazzy and Kilted, Python 3.12)"
    echo "(this is $system, not ubuntu 24.04: only a dry run)"
fi
if [ -z "$distro" ]; then
    for d in kilted jazzy; do [ -d "/opt/ros/$d" ] && distro=$d && break; done
    distro=${distro:-jazzy}
fi
case "$distro" in jazzy|kilted) ;; *) fail "--distro $distro; expected jazzy or kilted" ;; esac
if [ "$dry_run" = false ] && ! apt-cache show "ros-$distro-ros-base" >/dev/null 2>&1; then
    fail "apt knows no ros-$distro-ros-base: add the ROS 2 apt source as docs.ros.org/en/$distro/Installation says"
fi
if [ "$dry_run" = false ] && [ -n "${VIRTUAL_ENV:-}" ]; then
    fail "a virtual environment is active ($VIRTUAL_ENV): deactivate it first"
fi

step "ROS 2 $distro, tools and libusb from apt"
run sudo apt-get update
run sudo apt-get install -y "ros-$distro-ros-base" "ros-$distro-rmw-fastrtps-cpp" "ros-$distro-rviz2" \
    "ros-$distro-launch-testing-ros" "ros-$distro-sros2" python3-colcon-common-extensions python3-rosdep \
    python3-venv python3-numpy python3-pytest gcc make libusb-1.0-0

step "dependencies of package.xml by rosdep"
if [ ! -e /etc/ros/rosdep/sources.list.d/20-default.list ]; then run sudo rosdep init; fi
run rosdep update --rosdistro "$distro"
# What apt does not have (torch, cflib, ...) is no rosdep key in package.xml; it comes from PyPI below.
run rosdep install --rosdistro "$distro" --from-paths src --ignore-src -y

step "Python packages beside ROS 2, in .venv"
# --system-site-packages shows apt's packages; /opt/ros comes by PYTHONPATH from setup.bash and wins over both.
run /usr/bin/python3 -m venv --system-site-packages .venv
run .venv/bin/python -m pip install --quiet --constraint scripts/lab_constraints.txt setuptools wheel
run .venv/bin/python -m pip install --quiet --constraint scripts/lab_constraints.txt \
    torch==2.13.0 safetensors pyyaml tqdm sympy matplotlib 'rosbags>=0.11' 'mcap>=1.6' lz4 'plotly>=6' 'natnet>=0.3,<0.4' \
    pyusb libusb-package packaging scipy
# cflib asks for NumPy 2 but runs on 1.26 (its tests here do); with its dependencies pip would shadow apt's NumPy.
run .venv/bin/python -m pip install --quiet --no-deps cflib==0.1.34
packages=()
for setup in src/*/setup.py; do packages+=(-e "$(dirname "$setup")"); done
run .venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --use-pep517 "${packages[@]}"

step "colcon build with the Python of .venv, so that the nodes find its packages"
if [ "$dry_run" = false ]; then
    set +u
    # shellcheck source=/dev/null
    . "/opt/ros/$distro/setup.bash"
    set -u
fi
run .venv/bin/python /usr/bin/colcon --log-base log build --base-paths src

step "Crazyradio: udev rule, group plugdev"
run sudo install -m 0644 config/udev/70-crazyflie.rules /etc/udev/rules.d/70-crazyflie.rules
run sudo udevadm control --reload-rules
run sudo udevadm trigger --subsystem-match=usb
run sudo usermod -a -G plugdev "$(id -un)"

step "checks"
if [ "$dry_run" = false ]; then
    .venv/bin/python scripts/check_lab_pc.py "/opt/ros/$distro"
else
    echo "+ .venv/bin/python scripts/check_lab_pc.py /opt/ros/$distro"
fi
echo "done. In each new terminal:"
echo "  cd $root && . /opt/ros/$distro/setup.bash && . .venv/bin/activate && . install/setup.bash"
echo "Log out and in once, so that the group plugdev holds."
