"""The guest's clock: right at boot, and late by all the time that the machine then stood still."""

from __future__ import annotations

SCRIPT = 'late=$(($1 - $(date +%s))); [ "${late#-}" -le 1 ] || date -u -s "@$1"'


def setting_to(now: float) -> list[str]:
    """Return the command that sets the guest's clock, `now` in POSIX seconds, where it is more than a second off.

    A host that slept, a machine that was paused, leave it late: certificates and package lists are not valid then.
    """
    return ["sh", "-c", SCRIPT, "clock", str(round(now))]
