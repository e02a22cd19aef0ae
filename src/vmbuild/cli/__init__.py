"""The edge: what people type, and what becomes of it.

Heavy modules (paramiko, requests, rich, qemu) are imported inside the commands: `vmbuild --help` is quick.
"""

from vmbuild.cli.program import main as main
