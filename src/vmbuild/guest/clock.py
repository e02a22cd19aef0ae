"""The guest's clock: right at boot, and late by all the time that the machine then stood still."""

from __future__ import annotations

from vmbuild.guest.session import Session

SCRIPT = 'late=$(($1 - $(date +%s))); [ "${late#-}" -le 1 ] || date -u -s "@$1"'


def set_clock(session: Session, now: float) -> None:
    """Set the guest's clock, `now` in POSIX seconds, where it is more than a second off.

    A host that slept, a machine that was paused, leave it late: certificates and package lists are not valid then.
    """
    session.run(["sh", "-c", SCRIPT, "clock", str(round(now))])
