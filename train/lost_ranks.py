"""A rank or a host that dies: what the others say before they end."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

_SIGNS = ("closed by peer", "reset by peer", "timed out waiting", "connection refused", "broken pipe")
_WAIT_S = 2.0
"""A process that dies closes its connections a moment before it counts as ended."""


class RankLost(Exception):
    """Another rank of the run has ended or cannot be reached; the same command goes on from the newest checkpoint."""


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    host: str
    spaces: tuple[str, ...]
    """Namespaces of processes and of the network: containers of one machine are hosts of their own."""
    pid: int
    addresses: tuple[str, ...]
    """As errors of other ranks name this host."""

    @classmethod
    def here(cls) -> Place:
        host = socket.gethostname()
        spaces = tuple(
            str(link.readlink()) for link in map(Path, ("/proc/self/ns/pid", "/proc/self/ns/net")) if link.is_symlink()
        )
        addresses = {host}
        with suppress(OSError):
            addresses.add(socket.gethostbyname(host))
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
            link.connect((os.environ.get("MASTER_ADDR", host), 9))  # sends nothing: asks for the way to rank 0
            addresses.add(link.getsockname()[0])
        return cls(host, spaces, os.getpid(), tuple(sorted(addresses)))

    def is_beside(self, other: Place) -> bool:
        return (self.host, self.spaces) == (other.host, other.spaces)

    def is_named_in(self, text: str) -> bool:
        return any(re.search(rf"(?<![\w.-]){re.escape(address)}(?![\w.-])", text) for address in self.addresses)

    def runs(self) -> bool:
        """Whether the process has not ended. Ask on its own host."""
        with suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True


class Roster(pl.Callback):
    """Tells every rank where the others run, once, before training; says which rank is lost, when one is."""

    def __init__(self) -> None:
        self.places: list[Place] = []
        self.lost = ""
        """What has been said."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            places: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(places, Place.here())
            self.places = places

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Says it before loader processes are ended, which takes seconds: Lightning's launcher may kill this rank."""
        self.lost = lost_rank(exception, trainer, self.places)
        if self.lost:
            print(f"error: {self.lost}", file=sys.stderr, flush=True)


def lost_rank(error: BaseException, trainer: pl.Trainer, places: Sequence[Place]) -> str:
    """What to say of this error; "" where it does not come from the communication between ranks."""
    text = str(error).splitlines()[0] if str(error) else ""
    is_told = isinstance(error, torch.distributed.DistError) or any(sign in text.lower() for sign in _SIGNS)
    if trainer.world_size == 1 or not isinstance(error, RuntimeError) or not is_told:
        return ""
    reason = re.sub(r"^\[[^]]*\] ", "", text).partition(". ")[0]  # without gloo's source file and its advice
    return (
        f"rank {trainer.global_rank} of {trainer.world_size} lost {name_lost(text, places, trainer.global_rank)} in "
        f"step {trainer.global_step + 1}: {reason}; see the output of that rank or host, then start all ranks again "
        "with the same command, which goes on from the newest checkpoint"
    )


def name_lost(text: str, places: Sequence[Place], rank: int) -> str:
    """The ranks that have ended on this host, or those of the host that an error of `rank` names."""
    beside = [other for other, place in enumerate(places) if place.is_beside(places[rank]) and other != rank]
    elsewhere = [other for other, place in enumerate(places) if not place.is_beside(places[rank])]
    if named := [other for other in elsewhere if places[other].is_named_in(text)]:
        return f"{_listed(named, 'one of ranks')} on host {places[named[0]].host}"
    until = time.monotonic() + _WAIT_S
    while beside:
        if ended := [other for other in beside if not places[other].runs()]:
            return _listed(ended, "ranks")
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    return "another rank"


def _listed(ranks: Sequence[int], several: str) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"{several} {', '.join(map(str, ranks))}"
