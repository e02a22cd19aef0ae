"""`python -m vmbuild`."""

from vmbuild.cli.program import main

main()
