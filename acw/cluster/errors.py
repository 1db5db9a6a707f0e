"""What befell the cluster, and the user's error inside an exception of Ray's."""

from __future__ import annotations

import sys

from acw.storage.errors import UserError


def trouble(error: BaseException) -> UserError | None:
    """What befell the cluster, in a line, where Ray has tried again in vain, or a GPU; None for any other error."""
    if "torch" in sys.modules and isinstance(error, sys.modules["torch"].OutOfMemoryError):
        reason = str(error).strip().partition("\n")[0][:200]
        return UserError(
            f"a GPU has not enough memory for one image; take a larger one, or --accelerator cpu ({reason})"
        )
    if "ray" not in sys.modules:
        return None
    from ray import exceptions

    known = {
        exceptions.OutOfMemoryError: "a node ran out of memory; give fewer --workers, or nodes with more",
        exceptions.OutOfDiskError: "the disk of a node's temporary folder is full; free it",
        exceptions.ObjectStoreFullError: "a node's object store is full; end other jobs, or give nodes more memory",
        exceptions.ObjectLostError: "results were lost with their nodes",
        exceptions.NodeDiedError: "nodes were lost again and again",
        exceptions.RayActorError: "workers were lost again and again; give fewer --workers if memory ran out",
        exceptions.WorkerCrashedError: "workers were lost again and again; give fewer --workers if memory ran out",
    }
    for kind, what in known.items():
        if isinstance(error, kind):
            reason = str(error).strip().partition("\n")[0][:200]
            return UserError(f"the cluster: {what}, and run the same command again: it goes on ({reason})")
    return None


def user_error(error: BaseException | None) -> UserError | None:
    """The UserError inside an exception, which Ray may have wrapped on its way from a worker, or what it says of the
    cluster."""

    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        inner = waiting.pop()
        if inner is None or inner in seen:
            continue
        # Ray's own classes inherit from those that they wrap.
        if isinstance(inner, UserError) and type(inner).__module__.startswith("acw."):
            return inner
        seen.append(inner)
        waiting += [getattr(inner, "cause", None), inner.__cause__]
        waiting += list(getattr(inner, "worker_failures", {}).values())
    return next((known for inner in seen if (known := trouble(inner))), None)
