"""The connection to a Ray cluster, and the nodes that can take part."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from maskattn.cli.ray_engine.actor import look_around
from maskattn.cli.ray_engine.placement import Node
from maskattn.cli.reporting import in_one_line

__all__ = ["connected", "living_nodes", "on_node", "problem_of", "usable_nodes"]

_CONNECT_WITHIN_S, _LOOK_WITHIN_S = 5.0, 120.0
# Slides and reports are no objects of the store; what goes there is the list of slides.
_STORE_BYTES = 100 * 2**20
_REMEDY = (
    "start Ray there with `ray start --head`, on this machine with `ray start --address=HOST:PORT`, or leave it out"
)


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Join a cluster, or start one on this machine that ends with the context.

    Args:
        address: HOST:PORT, or "auto" for the cluster that this machine belongs to; None is that of the environment
            variable RAY_ADDRESS, or else a cluster of this machine alone.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: the address cannot be reached.
    """
    import ray

    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address not in ("local", "auto"):
        _check_reachable(address)
    # Of slides and patients nothing is to be told to anyone.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own: dict[str, Any] = (
        {"object_store_memory": _STORE_BYTES, "include_dashboard": False} if address == "local" else {}
    )
    # Ray replaces the handlers that end a command.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # Ray prints its own messages between the results, the last at its end; what concerns the run is reported here.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False, **own)
            _restore(handlers)
        except (ray.exceptions.RayError, RuntimeError, ValueError, OSError) as error:
            raise ValueError(
                f"--ray-address must be that of a running cluster which this machine has joined, got {address!r}: "
                f"{' '.join(str(error).split())[:300]}; {_REMEDY}"
            ) from error
        else:
            yield
        finally:
            ray.shutdown()
            _restore(handlers)


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    with contextlib.suppress(ValueError):  # handlers can only be set in the main thread
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _check_reachable(address: str) -> None:
    """Fail within seconds where Ray itself tries for a minute.

    Raises:
        ValueError: nothing answers there.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise ValueError(
            f"--ray-address takes HOST:PORT of the cluster's head, or auto, got {address!r}; run the command on a "
            "machine of the cluster"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_WITHIN_S).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--ray-address must be that of a running cluster, got {address!r}, where nothing answers "
            f"({error}); {_REMEDY}"
        ) from error


def living_nodes() -> list[Node]:
    """Return the nodes that are alive and have cores or GPUs to give."""
    import ray

    found = []
    for one in ray.nodes():
        resources = one["Resources"]
        node = Node(
            one["NodeID"],
            f"{one['NodeManagerHostname']} ({one['NodeManagerAddress']})",
            resources.get("CPU", 0.0),
            int(resources.get("GPU", 0.0)),
        )
        if one["Alive"] and (node.cpus or node.gpus):
            found.append(node)
    return found


def usable_nodes(
    nodes: Sequence[Node], out_dir: Path, paths: Sequence[str], ask_gpus: bool, tell: Callable[[str], None]
) -> list[Node]:
    """Return the nodes that see the output folder and the slides; the others are named to ``tell``.

    Args:
        nodes: the nodes to look at.
        out_dir: the output folder.
        paths: other files and folders that each node must see.
        ask_gpus: whether to find out the memory of their GPUs.
        tell: takes a line for each node that cannot be used.
    """
    import ray

    look = ray.remote(look_around)
    with tempfile.NamedTemporaryFile(dir=out_dir, prefix=".seen-by-all-") as mark:
        looks = {
            node: look.options(num_cpus=0, max_retries=0, scheduling_strategy=on_node(node)).remote(
                list(paths), os.path.abspath(mark.name), ask_gpus
            )
            for node in nodes
        }
        ray.wait(list(looks.values()), num_returns=len(looks), timeout=_LOOK_WITHIN_S) if looks else None
        usable = []
        for node, answer in looks.items():
            problem, gib = problem_of(answer)
            if problem:
                tell(f"node {node.name} is left out: {problem}")
            else:
                usable.append(Node(node.node_id, node.name, node.cpus, node.gpus, gib))
    return usable


def on_node(node: Node) -> Any:
    """Return Ray's strategy that places a task or an actor on this node alone."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node.node_id, soft=False)


def problem_of(answer: Any) -> tuple[str, float | None]:
    """Return why a node cannot be used, "" for no reason, and the memory of its smallest GPU."""
    import ray

    from maskattn import __version__

    try:
        version, missing, gib = ray.get(answer, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return f"it must answer within {_LOOK_WITHIN_S:.0f} s, got no answer; see its logs", None
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        text = in_one_line(cause if isinstance(cause, Exception) else error)[0]
        return f"maskattn must be installed there, as here, got {text[:300]}; install the same version", None
    if version != __version__:
        return (
            f"all nodes must have one version of maskattn, got {version} there and {__version__} here; install it",
            None,
        )
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        return (
            f"each node must see the slides and the output folder under the same path, got none at "
            f"{', '.join(missing[:3])}{more}; mount the drive there"
        ), None
    return "", gib
