"""``maskattn doctor``: checks what runs on this machine."""

from __future__ import annotations

from maskattn.cli.options import Debug
from maskattn.cli.reporting import errors_in_one_line, say

__all__ = ["doctor"]


def doctor(debug: Debug = False) -> None:
    """Check what runs on this machine.

    Everything is tested by running it; missing components are listed with the way to install them.
    """
    with errors_in_one_line(debug):
        from maskattn.doctor import examine

        findings = examine()
    for finding in findings:
        remedy = f"; to get it: {finding.remedy}" if finding.remedy and not finding.works else ""
        say(f"{'ok ' if finding.works else 'no '} {finding.subject:<24} {finding.detail}{remedy}")
