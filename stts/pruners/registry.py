"""Every pruner by name; no decorators, no import side effects: the whole zoo on one screen."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from stts.pruners.adatp import AdaTP
from stts.pruners.base import HostInfo, Pruner
from stts.pruners.cacovid import CaCoVID
from stts.pruners.cdpruner import CDPruner
from stts.pruners.chain import Chain
from stts.pruners.dart import DART
from stts.pruners.divprune import DivPrune
from stts.pruners.dycoke import DyCoke
from stts.pruners.earlytom import EarlyTom
from stts.pruners.evs import EVS
from stts.pruners.fastv import FastV
from stts.pruners.fastvid import FastVID
from stts.pruners.flashvid import FlashVID, FlashVIDInner
from stts.pruners.framefusion import FrameFusion, FrameFusionInner
from stts.pruners.holitom import HoliTom, HoliTomInner
from stts.pruners.in_vit import Easy, Heuristic, RandomVit
from stts.pruners.novelty import Novelty
from stts.pruners.own import is_own, load_own
from stts.pruners.prunevid import PruneVid, PruneVidInner
from stts.pruners.simple import Dense, Random, Uniform
from stts.pruners.stop import SToP
from stts.pruners.stts import STTS
from stts.pruners.tango import Tango, TangoInner
from stts.pruners.tome import ToMe
from stts.pruners.vcast import VCAST
from stts.pruners.vidcom2 import VidCom2
from stts.pruners.visionselector import VisionSelector
from stts.pruners.visionzip import VisionZip


def _chain(*methods: Any) -> Callable[..., Pruner]:
    """One method after another; an option goes to every one of them that has it."""

    def make(host: HostInfo, **options: Any) -> Pruner:
        parts = [method.for_host(host, **_known(method, options)) for method in methods]
        if unknown := {name for name in options if not any(_known(method, {name: 0}) for method in methods)}:
            raise TypeError(f"none of {[method.__name__ for method in methods]} has {sorted(unknown)}")
        return Chain(parts)

    return make


def _stop(preset: Callable[..., Pruner], method: Any, **values: Any) -> Callable[..., Pruner]:
    """SToP on a method with these values; options of the method go to it, the others and shared ones to SToP."""

    def make(host: HostInfo, **options: Any) -> Pruner:
        for_method = _known(method, options)
        rest = {name: value for name, value in options.items() if name not in for_method} | _known(SToP, options)
        return preset(host, method.for_host(host, **values | for_method), **rest)

    return make


def _known(method: Any, options: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(method)}
    return {name: value for name, value in options.items() if name in names}


PRUNERS: dict[str, Callable[..., Pruner]] = {  # called with the host and the options of the method
    "none": lambda host: Dense(),
    "random": lambda host, **options: Random(**options),
    "uniform": lambda host: Uniform(),
    "novelty": lambda host: Novelty(),
    "random-vit": RandomVit.for_host,
    "easy": Easy.for_host,
    "heuristic": Heuristic.for_host,
    "stts": STTS.for_host,
    "visionzip": VisionZip.for_host,
    "fastvid": FastVID.for_host,
    "holitom": HoliTom.for_host,
    "holitom+inner": _chain(HoliTom, HoliTomInner),
    "stop-visionzip": _stop(SToP.for_visionzip, VisionZip),
    "stop-fastvid": _stop(SToP.for_fastvid, FastVID, variant="ov"),
    "stop-holitom": _stop(SToP.for_holitom, HoliTom, tau=0.8, static_tau=0.8),
    "tango": Tango.for_host,
    "tango+inner": _chain(Tango, TangoInner),
    "adatp": AdaTP.for_host,
    "fastv": FastV.for_host,
    "dart": DART.for_host,
    "vidcom2": VidCom2.for_host,
    "evs": EVS.for_host,
    "divprune": DivPrune.for_host,
    "cdpruner": CDPruner.for_host,
    "prunevid": PruneVid.for_host,
    "prunevid+inner": _chain(PruneVid, PruneVidInner),
    "dycoke": DyCoke.for_host,
    "vcast": VCAST.for_host,
    "framefusion": FrameFusion.for_host,
    "framefusion+inner": FrameFusionInner.for_host,
    "flashvid": FlashVID.for_host,
    "flashvid+inner": _chain(FlashVID, FlashVIDInner),
    "stop-flashvid": _stop(SToP.for_flashvid, FlashVID),
    "tome": ToMe.for_host,
    "earlytom": EarlyTom.for_host,
    "visionselector": VisionSelector.for_host,
    "cacovid": CaCoVID.for_host,
}


def check_name(name: str) -> None:
    """ValueError unless `name` is in the registry or has the form of one's own; says which name comes near."""
    if name in PRUNERS or is_own(name):
        return
    close = difflib.get_close_matches(name, PRUNERS, n=1)
    near = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(
        f"unknown pruner {name!r}; {near}known: {', '.join(PRUNERS)}; your own: 'file.py:Class' or 'module:Class'"
    )


def make_pruner(name: str, host: HostInfo, **options: Any) -> Pruner:
    """A pruner for this host by registry name, or your own as `file.py:Class` or `package.module:Class`; `options` go
    to it.

    ValueError for a name that is neither, and for an option the method does not have."""
    check_name(name)
    if name in PRUNERS:
        try:
            return PRUNERS[name](host, **options)
        except TypeError as error:
            raise ValueError(f"pruner {name!r} does not take the options {sorted(options)}: {error}") from error
    method = load_own(name)
    try:
        pruner = method.for_host(host, **options) if hasattr(method, "for_host") else method(**options)
    except TypeError as error:
        raise ValueError(f"pruner {name!r} does not take the options {sorted(options)}: {error}") from error
    if not isinstance(pruner, Pruner):
        raise ValueError(f"{name!r} made a {type(pruner).__name__} without `stages`; see stts.pruners.base.Pruner")
    return pruner


# --- listings ------------------------------------------------------------------------------------------------------
