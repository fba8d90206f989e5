#!/usr/bin/env bash
# Runs a command on a held disk: its reads are limited by the block-I/O controller of a control group.
#
#   benchmarks/held_disk.sh [--bps BYTES] [--iops READS] [--device MAJ:MIN | --path PATH] [--] CMD...
#
#   --bps      bytes read per second             (default 500000000: 0.5 GB/s)
#   --iops     reads per second                  (default 40000)
#   --path     hold the disk that holds PATH     (default: the current directory)
#   --device   hold this whole disk, MAJ:MIN
#
# The stand-in for a slower device: a disk's own speed moves by the hour, a limit does not. It holds only what reaches
# the block layer (O_DIRECT, or a cold page cache). Needs root and a cgroup v1 blkio or v2 io controller. Exits as CMD.
set -euo pipefail

fail() {
  echo "held_disk: $*" >&2
  exit 2
}

bps=500000000
iops=40000
path=.
device=
while [[ $# -gt 0 ]]; do
  case $1 in
    --bps | --iops | --path | --device)
      [[ $# -ge 2 ]] || fail "$1 wants a value."
      declare "${1#--}=$2"
      shift 2
      ;;
    -h | --help)
      sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
      exit 0
      ;;
    --)
      shift
      break
      ;;
    -*) fail "unknown option $1; see --help." ;;
    *) break ;;
  esac
done
[[ $# -gt 0 ]] || fail "no command given; see --help."
for limit in "$bps" "$iops"; do
  [[ $limit =~ ^[1-9][0-9]*$ ]] || fail "limit $limit is not a positive integer (bytes or reads per second)."
done
[[ $EUID -eq 0 ]] || fail "control groups are changed by root only, this is user $(id -un): run it with sudo."

# Limits act on whole disks: a partition stands for its disk.
disk_of() {
  local number source
  number=$(stat -c '%Hd:%Ld' "$1") || fail "no such path: $1"
  if [[ ! -e /sys/dev/block/$number ]]; then # btrfs, overlay: the number is not a device's
    source=$(findmnt -no SOURCE -T "$1" | sed 's/\[.*//')
    [[ -b $source ]] || fail "$1 lies on \"$source\", no block device: give --device MAJ:MIN or a --path on a disk."
    number=$(stat -c '%Hr:%Lr' "$source")
  fi
  if [[ -e /sys/dev/block/$number/partition ]]; then
    number=$(cat "$(readlink -f "/sys/dev/block/$number")/../dev")
  fi
  echo "$number"
}
if [[ -z $device ]]; then
  device=$(disk_of "$path")
fi
[[ -e /sys/dev/block/$device ]] || fail "there is no block device $device (see lsblk)."

v1=$(awk '{ for (i = 1; i <= NF; i++) if ($i == "-" && $(i + 1) == "cgroup" && $NF ~ /(^|,)blkio(,|$)/) print $5 }' /proc/self/mountinfo | head -1)
v2=$(awk '{ for (i = 1; i <= NF; i++) if ($i == "-" && $(i + 1) == "cgroup2") print $5 }' /proc/self/mountinfo | head -1)
group=
# In a function of a trap, so that the group goes away however the command ends.
remove_group() {
  [[ -z $group ]] || rmdir "$group" 2>/dev/null || echo "held_disk: $group is still in use; remove it with rmdir." >&2
}
trap remove_group EXIT

make_group() {
  mkdir "$1" 2>/dev/null || fail "cannot create $1: the control groups are read-only here (a container?)."
  group=$1
}
if [[ -n $v1 && -e $v1/blkio.throttle.read_bps_device ]]; then
  make_group "$v1/held_disk.$$"
  echo "$device $bps" >"$group/blkio.throttle.read_bps_device"
  echo "$device $iops" >"$group/blkio.throttle.read_iops_device"
elif [[ -n $v2 ]] && grep -qw io "$v2/cgroup.controllers"; then
  echo +io >"$v2/cgroup.subtree_control" || fail "cannot enable the io controller in $v2/cgroup.subtree_control."
  make_group "$v2/held_disk.$$"
  echo "$device rbps=$bps riops=$iops" >"$group/io.max" || fail "$group/io.max refuses device $device: give the whole disk."
else
  fail "neither a cgroup v1 blkio controller (with throttling) nor a cgroup v2 io controller is mounted; limits cannot be set."
fi

status=0
bash -c 'echo $$ >"$0/cgroup.procs" && exec "$@"' "$group" "$@" || status=$?
exit "$status"
