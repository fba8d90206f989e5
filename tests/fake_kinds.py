"""Kinds of cells that take no time, for tests of what measures them; other processes import this module."""

import os
import signal
import time

from dipper.errors import ConfigError
from dipper.kinds import Kind


def measure(options, context):
    """The square of `x`; whatever goes wrong on the way goes wrong `times` times, counted in the work folder."""
    log(context, f"{options['x']} {os.getpid()} {where()}")
    time.sleep(options.get("sleep", 0))
    tried = sum(line.split()[0] == str(options["x"]) for line in read_log(context.workdir))
    if tried <= options.get("times", 0):
        goes_wrong(options["how"])
    words = [] if context.data is None else (context.data / "words.txt").read_text().split()
    return {"square": options["x"] ** 2, "words": words, "model": context.name, "seconds": time.perf_counter()}


def goes_wrong(how):
    if how == "raise":
        raise RuntimeError("the roof\n fell in")
    if how == "config":
        raise ConfigError("x is wrong: give another")
    if how == "exit":
        raise SystemExit(3)
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError(how)


def clock(options, context):
    """A timed kind: who measured it, and of what it may use."""
    log(context, f"clock {os.getpid()} {where()}")
    return {"speed": options["speed"], "threads": context.threads}


def graphic(options, context):
    """The GPUs that its process sees."""
    time.sleep(0.2)
    return {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "device": context.device}


def infinite(options, context):
    return {"value": float("inf")}


def log(context, line):
    with open(context.workdir / "log", "a") as file:  # a short line is written at once
        file.write(line + "\n")


def read_log(workdir):
    path = workdir / "log"
    return path.read_text().splitlines() if path.exists() else []


def where():
    """The machine of a cluster that this process belongs to."""
    return os.environ.get("RAY_NODE_ID") or ray_node() or "here"


def ray_node():
    import sys

    ray = sys.modules.get("ray")
    return ray.get_runtime_context().get_node_id() if ray is not None and ray.is_initialized() else None


def words(options):
    return ("words.txt",) if options.get("reads") else ()


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            name="fake", measure=measure, options=frozenset(("x", "how", "times", "sleep", "reads")),
            sources=("errors",), needs_data=words, varies=("seconds",),
        ),
        Kind(
            name="clock", measure=clock, options=frozenset(("speed",)), sources=("errors", "files"), timed=True,
            varies=("speed",), within=("speed",),
        ),
        Kind(name="infinite", measure=infinite, options=frozenset(), sources=("errors",)),
        Kind(name="graphic", measure=graphic, options=frozenset(("x",)), sources=("errors",), gpu=True),
    )
}  # fmt: skip
