"""`python -m vmbuild`."""

from vmbuild.cli import main

main()
