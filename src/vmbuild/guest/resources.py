"""What a guest uses of its machine, and how much of it that it may: CPUs, file system, space that it gives back."""

from __future__ import annotations

from dataclasses import dataclass

from vmbuild.deadline import Deadline
from vmbuild.guest.session import Session, capture
from vmbuild.model import KIB, MIB

ANSWER_S = 30.0

SET_CPUS = """
for cpu in /sys/devices/system/cpu/cpu[0-9]*; do
    number=${cpu##*/cpu}
    [ -e "$cpu/online" ] || continue # the first cannot be taken away
    want=$((number < $1))
    [ "$(cat "$cpu/online")" = "$want" ] || echo "$want" >"$cpu/online" || exit 1
done
"""

# What /proc and df tell, a word each: the numbers of /proc/loadavg, the CPUs, the memory in KiB, the disk in KiB.
READ_USAGE = """
read -r load _ </proc/loadavg
read -r uptime _ </proc/uptime
awk '/^(MemTotal|MemAvailable):/ { print $1, $2 }' /proc/meminfo
echo load: $load
echo uptime: $uptime
echo cpus: $(grep -c ^processor /proc/cpuinfo)
df -k /disk | awk 'END { print "disk:", $3 }'
"""

# Free pages go back to the host by themselves, what is cached of files does not. Some of it is worth more to the next
# build: Docker's own programs, which QEMU has to translate again when they lie in other pages. So the coldest goes,
# where Linux takes that order (6.12 does; 6.1 does not know `swappiness` there, and would swap without it). Compaction
# because only whole pieces go back (page_reporting_order in the guest image's row).
GIVE_BACK = """
renice -n 19 -p $$
sync
cached_mib() { awk '/^(Active|Inactive).file/ { sum += $2 } END { print int(sum / 1024) }' /proc/meminfo; }
if [ "$(cached_mib)" -gt 384 ] && ! pidof docker-buildx; then # a build that runs now gives back at its own end
    echo "$(($(cached_mib) - 128))M swappiness=0" >/sys/fs/cgroup/memory.reclaim
    [ "$(cached_mib)" -le 384 ] || echo 3 >/proc/sys/vm/drop_caches
    echo 1 >/proc/sys/vm/compact_memory
fi
fstrim /disk
"""


@dataclass(frozen=True)
class Usage:
    """What a guest uses now: CPUs that are on, load average of a minute, memory, disk, seconds since its boot."""

    cpus_online: int
    load: float
    memory_mib: int
    memory_used_mib: int
    disk_used_bytes: int
    uptime_s: float


def read_usage(session: Session) -> Usage:
    """Return what the guest uses now. Raises GuestError."""
    text = capture(session, ["sh", "-c", READ_USAGE], deadline=Deadline.after(ANSWER_S / 3))
    found = {name: float(value) for name, _, value in (line.partition(": ") for line in text.splitlines()) if value}
    total, available = (round(found[name]) * KIB // MIB for name in ("MemTotal", "MemAvailable"))
    return Usage(
        cpus_online=round(found["cpus"]),
        load=found["load"],
        memory_mib=total,
        memory_used_mib=total - available,
        disk_used_bytes=round(found["disk"]) * KIB,
        uptime_s=found["uptime"],
    )


def set_cpus(session: Session, count: int) -> None:
    """Turn the guest's first `count` CPUs on and the others off. Raises GuestError."""
    capture(session, ["sh", "-c", SET_CPUS, "cpus", str(count)], deadline=Deadline.after(ANSWER_S))


def grow_file_system(session: Session) -> None:
    """Let the file system of the machine's disk fill a disk that has grown. Raises GuestError."""
    grow = "/usr/lib/vmbuild/grow"  # of a disk that has partitions
    script = f"[ ! -x {grow} ] || exec {grow}; resize2fs $(grep ' /disk ' /proc/mounts | cut -d ' ' -f 1)"
    capture(session, ["sh", "-c", script], deadline=Deadline.after(ANSWER_S * 10))


def trim(session: Session) -> None:
    """Give the host back what the file system does not use any more. Raises GuestError."""
    capture(session, ["sh", "-c", "sync; fstrim /disk"], deadline=Deadline.after(ANSWER_S * 10))


def drop_cache(session: Session) -> None:
    """Have the guest forget what it keeps of files, which then goes back to the host. Raises GuestError."""
    script = "sync; echo 3 >/proc/sys/vm/drop_caches; echo 1 >/proc/sys/vm/compact_memory"
    capture(session, ["sh", "-c", script], deadline=Deadline.after(ANSWER_S * 10))


def give_back_later(session: Session) -> None:
    """Give back disk and memory when the guest has nothing better to do, without waiting. Raises GuestError."""
    script = 'setsid sh -c "$1" </dev/null >/dev/null 2>&1 &'
    capture(session, ["sh", "-c", script, "later", GIVE_BACK], deadline=Deadline.after(ANSWER_S))
