"""Two hosts, as two network namespaces of this machine with a cable between them: one dies in the middle of a step."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from stts_train.checkpoints import newest
from stts_train.lost_ranks import Place, name_lost
from tests.train.launch import finish, needs_deepspeed, shown, start_module, wait_for
from tests.train.test_resume import STEPS, one_process, settings

CABLE = "stts0"  # in both namespaces
IP = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")  # not on every user's path


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Names of two namespaces whose addresses are 10.77.0.1 and 10.77.0.2."""
    if IP is None:
        pytest.skip("there is no `ip` (package iproute2), which makes network namespaces")
    names = tuple(f"stts-{os.getpid()}-{host}" for host in "ab")
    first, second = names
    steps = [["netns", "add", name] for name in names]
    steps += [["link", "add", CABLE, "netns", first, "type", "veth", "peer", "name", CABLE, "netns", second]]
    for number, name in enumerate(names, 1):
        steps += [["-n", name, "address", "add", f"10.77.0.{number}/24", "dev", CABLE]]
        steps += [["-n", name, "link", "set", device, "up"] for device in ("lo", CABLE)]
    try:
        for step in steps:
            done = subprocess.run([IP, *step], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"network namespaces are not allowed here: ip {' '.join(step)}: {done.stderr.strip()}")
        yield first, second
    finally:
        for name in names:
            kill_host(name)
            subprocess.run([IP, "netns", "delete", name], capture_output=True)


def kill_host(name: str) -> None:
    """kill -9 of every process in this namespace."""
    listed = subprocess.run([str(IP), "netns", "pids", name], capture_output=True, text=True)
    for process in listed.stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


def start_on(host: str, rank: int, argv: list[str], **env: str) -> subprocess.Popen[str]:
    """The same command on each host, but for the host's number, as a scheduler starts it."""
    torchrun = ["torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}"]
    torchrun += ["--master-addr=10.77.0.1", "--master-port=29511", "-m", "stts.cli", "fit"]
    within = [str(IP), "netns", "exec", host]
    return start_module([*torchrun, *argv], within, GLOO_SOCKET_IFNAME=CABLE, **env)


def test_what_is_lost_is_named_by_rank() -> None:
    """Two ranks on this host, one of which has ended, and two on another host."""
    process = subprocess.Popen(["sleep", "60"])
    here = replace(Place.here(), addresses=("10.77.0.1",))
    there = Place("b", (), 1, ("b", "10.77.0.2"))
    places = [here, replace(here, pid=process.pid), there, there]
    assert name_lost("Connection closed by peer [10.77.0.2]:53722", places, 0) == "one of ranks 2, 3 on host b"
    for unknown in ("Connection closed by peer [10.77.0.21]:53722", "Timed out waiting 1800000ms for recv operation"):
        assert name_lost(unknown, places, 0) == "another rank"
    process.kill()  # nobody has waited for it: its number is still there
    assert name_lost("Connection closed by peer [10.77.0.1]:53722", places, 0) == "rank 1"
    process.wait()
    assert name_lost("Connection closed by peer [10.77.0.1]:53722", places, 0) == "rank 1"


@pytest.mark.slow
@needs_deepspeed
def test_a_host_that_dies_ends_the_run_with_a_message_and_the_same_command_goes_on(
    hosts: tuple[str, str], tiny_folder: Path, tmp_path: Path
) -> None:
    """ZeRO-2 over gloo."""
    straight = one_process(tiny_folder, tmp_path / "straight")
    argv = settings(tiny_folder, tmp_path / "out", "--trainer.devices=1", "--trainer.num_nodes=2")
    argv += ["--trainer.strategy=deepspeed_stage_2", "--trainer.callbacks=tests.train.fits.WaitInStep6"]
    first, second = (start_on(host, rank, argv, WAIT_IN_STEP_6="1") for rank, host in enumerate(hosts))
    wait_for(second, "in the middle of step 6")
    kill_host(hosts[1])
    second.communicate()
    died = time.monotonic()
    code, output = finish(first)
    assert code != 0 and time.monotonic() - died < 60
    lost = f"error: rank 0 of 2 lost rank 1 on host {socket.gethostname()} in step 6: "
    assert lost in output and "10.77.0.2" in output, output[-4000:]
    saved = newest(tmp_path / "out")
    assert saved is not None and saved.step == 4

    first, second = (start_on(host, rank, argv) for rank, host in enumerate(hosts))
    (code, output), (other, _) = finish(first), finish(second)
    assert (code, other) == (0, 0) and f"going on from {saved.folder}" in output, output[-4000:]
    steps = {step: [float(word) for word in text.split()[1::2]] for step, text in shown(output).items()}
    assert list(steps) == list(range(5, STEPS + 1))
    for step, losses in steps.items():
        assert losses == pytest.approx(straight[step], abs=1.5e-4), f"step {step}"
