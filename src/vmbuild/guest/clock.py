"""The guest's clock: right at boot, and late by all the time that the machine then stood still."""

from __future__ import annotations

SCRIPT = 'late=$(($1 - ${EPOCHSECONDS:-$(date +%s)})); [ "${late#-}" -le 1 ] || date -u -s "@$1"'


def setting_to(now: float, *, then: str) -> list[str]:
    """Return the command that sets the guest's clock, `now` in POSIX seconds, where it is more than a second off.

    A host that slept, a machine that was paused, leave it late: certificates and package lists are not valid then. Its
    exit code is that of `then`, a shell command that saves its caller another way to the guest.
    """
    return ["sh", "-c", f"{SCRIPT}; {then}", "clock", str(round(now))]
