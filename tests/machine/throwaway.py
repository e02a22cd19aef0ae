"""A program that uses Testcontainers as tests do: a container, its port on this host, and files in it.

`python throwaway.py IMAGE leave` ends without having removed its container, as tests that are killed do.
"""

from __future__ import annotations

import os
import sys
from urllib.request import urlopen

from testcontainers.core import utils
from testcontainers.core.container import DockerContainer
from testcontainers.core.wait_strategies import HttpWaitStrategy


def main(image: str, *rest: str) -> None:
    utils.inside_container = lambda: True  # as jobs of CI often are: then it has its own idea of where ports are
    server = DockerContainer(image).with_command(["httpd", "-f", "-p", "80", "-h", "/srv"]).with_exposed_ports(80)
    server.with_copy_into_container(b"from a test", "/srv/page").waiting_for(HttpWaitStrategy(80, "/page"))
    server.start()
    url = f"http://{server.get_container_host_ip()}:{server.get_exposed_port(80)}/page"
    with urlopen(url, timeout=10) as answer:
        print(answer.read().decode(), server.exec(["uname", "-m"]).output.decode().strip(), flush=True)
    if rest == ("leave",):
        os._exit(0)
    server.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
