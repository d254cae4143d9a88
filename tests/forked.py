"""Commands in processes forked from one that has imported everything.

Imports take 6 s of CPU in each process, most runs of these tests less, and with Lightning's launcher the second rank
begins to import when the first has finished. The code that runs is that of the command. What forking would hide is
tested by real starts: Lightning's launcher in test_cli.py, torchrun in test_two_hosts.py, the commands of README and
docs.

    python tests/forked.py SOCKET     the process that forks, until its standard input is closed
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only

ROOT = Path(__file__).parents[1]
SHARED = "STTS_TEST_FORKS"
"""Environment variable with the socket of a process that forks for several test processes."""
EVERYTHING = (  # `stts` before Lightning
    "stts", "lightning.pytorch", "deepspeed", "torch._inductor.compile_fx", "torch.utils.cpp_extension", "stts.cli",
    "stts.eval.compare", "stts.eval.evaluate", "stts_train.cli", "stts_train.data_module", "stts_train.module",
    "stts_train.start", "tests.train.fits",
)  # fmt: skip


class Forked:
    """What `subprocess.Popen` would be: `pid` is that of rank 0, which leads the process group of all ranks."""

    def __init__(self, call: str, argv: Sequence[str], ranks: int = 1, errors_apart: bool = False, **env: str) -> None:
        """
        Args:
            call: "module:function" that takes `argv` and returns an exit code.
            argv: What follows the name of the command.
            ranks: Processes; where they are several, each finds in its environment what torchrun would put there.
            errors_apart: Whether `stderr` is a pipe of its own, rather than part of `stdout`.
            env: Further environment variables.
        """
        given = {"call": call, "argv": list(argv), "ranks": ranks, "cwd": os.getcwd()}
        given["env"] = {**os.environ, **env, **(_torchrun(ranks) if ranks > 1 else {})}
        pipes = [os.pipe() for _ in range(1 + errors_apart)]
        self._link = _connect()
        ends = [write for _, write in pipes]
        text = json.dumps(given).encode()
        socket.send_fds(self._link, [len(text).to_bytes(8, "big")], ends)
        self._link.sendall(text)
        for end in ends:
            os.close(end)
        files = [os.fdopen(read, encoding="utf-8", errors="replace") for read, _ in pipes]
        self.stdout, self.stderr = files[0], files[1] if errors_apart else None
        self.pid = int.from_bytes(_receive(self._link, 8), "big")
        self.returncode: int | None = None
        self._read: dict[Any, str] = {}
        self._readers: list[threading.Thread] = []

    def wait(self, timeout: float | None = None) -> int:
        """Exit code: of the first rank, by number, that failed."""
        if self.returncode is None:
            self._link.settimeout(timeout)
            self.returncode = int.from_bytes(_receive(self._link, 8), "big", signed=True)
            self._link.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """The rest of the output, and of the errors where they are apart.

        Raises:
            subprocess.TimeoutExpired: it is still open after `timeout` seconds; may be called again.
        """
        if not self._readers:
            files = [file for file in (self.stdout, self.stderr) if file is not None]
            self._readers = [threading.Thread(target=self._drain, args=(file,), daemon=True) for file in files]
            for reader in self._readers:
                reader.start()
        for reader in self._readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired("a forked run", timeout or 0)
        self.wait()
        return self._read[self.stdout], self._read.get(self.stderr, "")

    def _drain(self, file: Any) -> None:
        self._read[file] = file.read()


def _torchrun(ranks: int) -> dict[str, str]:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        port = door.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
    return {**where, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}


def _receive(link: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        if not (more := link.recv(size - len(data))):
            raise RuntimeError("the process that forks has ended; its error is above")
        data += more
    return data


def _connect(timeout_s: float = 300) -> socket.socket:
    """To the process that forks; waits until it has imported everything."""
    server, path = _server()
    until = time.monotonic() + timeout_s
    while True:
        link = socket.socket(socket.AF_UNIX)
        try:
            link.connect(path)
            return link
        except (FileNotFoundError, ConnectionRefusedError):
            link.close()
            if server is not None and server.poll() is not None:
                raise RuntimeError(f"the process that forks ended with exit code {server.returncode}") from None
            if time.monotonic() > until:
                raise RuntimeError(f"the process that forks is not there after {timeout_s} s") from None
            time.sleep(0.1)


@cache
def _server() -> tuple[subprocess.Popen[bytes] | None, str]:
    """The process that forks, if it is this one's, and its socket; started at first use, ended with the tests."""
    if SHARED in os.environ:
        return None, os.environ[SHARED]
    path = str(Path(tempfile.mkdtemp(prefix="stts-fork-")) / "door")
    return start_server(path), path


def start_server(path: str) -> subprocess.Popen[bytes]:
    """One that ends with this process."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, __file__, path], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=env
    )
    assert server.stdin is not None
    atexit.register(server.stdin.close)
    return server


def serve(path: str) -> tuple[dict[str, Any], int, list[int]]:
    """Fork what is asked for. Returns in the forked processes only: what to run, as which rank, and its outputs."""
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(path)
        door.listen()
        while True:
            ready, _, _ = select.select([door.fileno(), 0], [], [])
            if 0 in ready:
                sys.exit()
            link, _ = door.accept()
            size, outputs, _, _ = socket.recv_fds(link, 8, 2)
            given = json.loads(_receive(link, int.from_bytes(size, "big")))
            if os.fork() == 0:
                door.close()
                rank = _fork_ranks(link, given["ranks"])
                return given, rank, outputs
            link.close()
            for output in outputs:
                os.close(output)


def _fork_ranks(link: socket.socket, ranks: int) -> int:
    """Returns in each rank; the process that forked them waits for their ends, and says how they ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pids: list[int] = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, pids[0] if pids else 0)
            link.close()
            return rank
        os.setpgid(pid, pids[0] if pids else pid)  # whichever of the two is first
        pids.append(pid)
    os.closerange(3, link.fileno())  # the outputs, whose end the test waits for
    os.closerange(link.fileno() + 1, 256)
    link.sendall(pids[0].to_bytes(8, "big"))
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    link.sendall(next((code for code in codes if code), 0).to_bytes(8, "big", signed=True))
    os._exit(0)


def become(given: dict[str, Any], rank: int, outputs: list[int]) -> int:
    """Run it as if this process had been started for it."""
    for number, output in zip((1, 2), (outputs[0], outputs[-1]), strict=True):
        os.dup2(output, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(given["env"])
    if given["ranks"] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        setattr(rank_zero_only, "rank", rank)  # noqa: B010  (else read from the environment at import)
    os.chdir(given["cwd"])
    module, _, function = given["call"].partition(":")
    sys.path[1:1] = [x for x in os.environ.get("PYTHONPATH", "").split(os.pathsep) if x]
    sys.argv = [module, *given["argv"]]
    return int(getattr(importlib.import_module(module), function)(given["argv"]))


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those who wait for ranks are waited for by nobody
    for name in EVERYTHING:
        if find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    sys.exit(become(*serve(sys.argv[1])))
