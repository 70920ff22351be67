"""Choose the implementation of an operation, loudly: nothing falls back in silence.

An operation offers its implementations as a mapping from name to check, best first. A check takes the platform and
returns None, or the reason why this implementation cannot serve here.
"""

import contextlib
import contextvars
import difflib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping

import jax

log = logging.getLogger(__name__)

Check = Callable[[str], str | None]
_stated: contextvars.ContextVar[str | None] = contextvars.ContextVar("pallas_kernels_platform", default=None)


def choose(op: str, implementation: str | tuple[str, ...] | None, available: Mapping[str, Check],
           platform: str | None = None) -> str:
    """Name of the implementation of `op` that serves.

    implementation: None takes the first of `available` that serves; a name is that one or an error; a tuple is tried in
    turn. What is chosen is logged once at INFO, with the reasons against those passed over. platform: what
    `current_platform` says when it is not given.

    Raises ValueError for an unknown name, and with every reason when none of the names serves.
    """
    platform = platform or current_platform()
    if implementation is None:
        names = tuple(available)
    else:
        names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not names:
        raise ValueError(f"{op}: implementation=() names none; pass None for the best of {', '.join(available)}")
    for name in names:
        if name not in available:
            near = difflib.get_close_matches(str(name), available, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{op} has no implementation {name!r}{hint}; implementations: {', '.join(available)}")
    reasons = []
    for name in names:
        reason = available[name](platform)
        if reason is None:
            _announce(op, name, platform, tuple(reasons))
            return name
        reasons.append(f"not {name!r}: {reason}")
    raise ValueError(f"{op} cannot run on {platform} as {' or '.join(map(repr, names))}: {'; '.join(reasons)}; "
                     "implementation=None takes the best one that can")


@functools.cache
def _announce(op: str, name: str, platform: str, reasons: tuple[str, ...]) -> None:
    log.info("%s runs as %r on %s%s", op, name, platform, f" ({'; '.join(reasons)})" if reasons else "")


def current_platform() -> str:
    """"cpu", "gpu" or "tpu": what the computation being traced will run on.

    That is the platform of the set mesh (`jax.set_mesh`, or `jax.sharding.use_abstract_mesh` for a device that is not
    here), else of the default backend. Arrays that were put elsewhere by hand are not seen while tracing.
    """
    stated = _stated.get()
    if stated is not None:
        return stated
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = str(getattr(device, "platform", None) or jax.default_backend()).lower()
    return "gpu" if name in ("cuda", "rocm") else name


@contextlib.contextmanager
def stated_platform(name: str) -> Iterator[None]:
    """Within it, implementations are chosen as if on this platform: for interpreters that simulate one."""
    token = _stated.set(name)
    try:
        yield
    finally:
        _stated.reset(token)


def automatic_axes() -> str | None:
    """The reason why a device kernel cannot serve under the set mesh, or None.

    The compiler cannot split a kernel over mesh axes: each device has to be given its part by `jax.shard_map`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    split = [f"{name}={size}" for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types,
                                                          strict=True)
             if size > 1 and kind != jax.sharding.AxisType.Manual]
    return f"mesh axes {', '.join(split)} are not manual: call it inside jax.shard_map" if split else None
