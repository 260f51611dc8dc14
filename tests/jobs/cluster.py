"""A Ray cluster of two nodes on this machine, whose workers are forks of the tests' process: cold ones take seconds.

`python cluster.py SOCKET` holds the cluster, as ray's threads outlive no fork: it prints the address; at each line of
its input it kills the second node, begins another and prints a line; it ends with its input.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NODE = {"num_cpus": 2, "object_store_memory": 80 * 2**20}  # bytes: about the least that ray takes
SETUP = ("setup_worker.py", "--serialized-runtime-env-context", "--language")  # not of the worker's own words
SHIM = """#!{python} -ISs
import json, os, socket, sys
if not any(word.endswith("default_worker.py") for word in sys.argv[:3]):
    os.execv("{python}", ["{python}", *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as ours:
    ours.connect("{address}")
    ours.sendall(json.dumps([sys.argv[1:], dict(os.environ)]).encode())
    ours.shutdown(socket.SHUT_WR)
    ours.recv(1)  # until the worker ends
"""


def serve(listener: socket.socket) -> None:
    """Fork one of Ray's workers for each caller, by its words and environment."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(quiet, stream)
    parent = os.getppid()
    listener.settimeout(5)
    while os.getppid() == parent:
        try:
            caller, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork():
            caller.close()
            continue
        listener.close()
        try:
            become(caller)
        finally:
            os._exit(0)


def become(caller: socket.socket) -> None:
    """Be the worker that a caller asks for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)  # ray kills a worker with its whole group
    with caller.makefile("rb") as words:
        told, environment = json.load(words)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [word for word in told if not any(own in word for own in SETUP)]
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, mode, closefd=False) for fd, mode in enumerate("rww"))
    runpy.run_path(sys.argv[0], run_name="__main__")


def hold(address: str) -> None:
    """The process that holds the cluster."""
    out, sys.stdout = sys.stdout, sys.stderr  # ray prints
    from ray.cluster_utils import Cluster

    shim = Path(address).with_name("python")
    shim.write_text(SHIM.format(python=sys.executable, address=address))
    shim.chmod(0o755)
    sys.executable = str(shim)
    cluster = patiently(Cluster, True, head_node_args={**NODE, "include_dashboard": False})
    try:
        node = patiently(cluster.add_node, **NODE)
        print(cluster.address, file=out, flush=True)
        for _ in sys.stdin:
            cluster.remove_node(node, allow_graceful=False)
            node = patiently(cluster.add_node, **NODE)
            print(file=out, flush=True)
    finally:
        cluster.shutdown()


def patiently(begin: Callable[..., Any], *words: Any, **options: Any) -> Any:
    """Begin a node: ray gives one 30 seconds, which on a machine that is busy are too few."""
    for _ in range(9):
        with suppress(Exception):
            return begin(*words, **options)
    return begin(*words, **options)


class Nodes:
    """A cluster that lives: its address, and the session of its workers' processes."""

    def __init__(self, process: subprocess.Popen, warm: int, log: Path) -> None:
        self.process, self.warm, self.log = process, warm, log
        self.address = self._heard().strip()

    def kill(self) -> None:
        """Kill a node; another takes its place."""
        print(file=self.process.stdin, flush=True)
        self._heard()

    def _heard(self) -> str:
        line = self.process.stdout.readline() if self.process.stdout else ""
        assert line, self.log.read_text()
        return line


@contextmanager
def clustered() -> Iterator[Nodes]:
    """A cluster that ends with the block."""
    listener = socket.socket(socket.AF_UNIX)
    with tempfile.TemporaryDirectory() as folder, listener, open(os.path.join(folder, "log"), "w") as log:
        address = os.path.join(folder, "warm")
        listener.bind(address)
        listener.listen(64)
        warm = os.fork()
        if not warm:
            serve(listener)
            os._exit(0)
        path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        environment = {**os.environ, "PYTHONPATH": path}
        process = subprocess.Popen([sys.executable, __file__, address], env=environment, text=True, **pipes)
        try:
            yield Nodes(process, warm, Path(log.name))
        finally:
            process.stdin.close()
            process.wait()
            os.kill(warm, signal.SIGKILL)
            os.waitpid(warm, 0)


if __name__ == "__main__":
    hold(sys.argv[1])
