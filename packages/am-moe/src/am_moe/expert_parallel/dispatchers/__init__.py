"""The dispatchers, one to a file, by name; `am_moe.dispatch` has their contract."""

from __future__ import annotations

from am_moe.expert_parallel.dispatch import Dispatcher
from am_moe.expert_parallel.dispatchers import all_gather, all_to_all, local


def get_dispatcher(name: str | Dispatcher, ranks: int) -> Dispatcher:
    """The dispatcher of a name, or the given one itself.

    Args:
        name: `all_to_all`, `all_gather` or `local`, or an object that is a `Dispatcher`.
        ranks: the size of the expert axis; on one rank nothing needs to move, and `local` takes the others' place.

    Raises:
        ValueError: an unknown name; `local` on several ranks; `deepep`, which is not on the package index and needs
            devices on one fabric: wrap its `Buffer` in a `Dispatcher` of your own.
    """
    if not isinstance(name, str):
        if callable(getattr(name, "dispatch", None)) and callable(getattr(name, "combine", None)):
            return name
        raise ValueError(f"dispatcher={name!r} has no dispatch and combine; see am_moe.Dispatcher")
    if name == "deepep":
        raise ValueError(
            "dispatcher='deepep' does not come with am-moe: DeepEP is not on the package index; build it, wrap its "
            "Buffer in an object with the dispatch and combine of am_moe.Dispatcher, and pass that"
        )
    known: dict[str, Dispatcher] = {
        "all_to_all": all_to_all.AllToAll(),
        "all_gather": all_gather.AllGather(),
        "local": local.Local(),
    }
    if name not in known:
        raise ValueError(f"dispatcher={name!r} is unknown; use one of {[*known]} or an object of your own")
    if name == "local" and ranks > 1:
        raise ValueError(f"dispatcher='local' moves nothing, but the experts are on {ranks} ranks; use 'all_to_all'")
    return known["local"] if ranks == 1 else known[name]
