"""From a resolved config to what the compiling process is asked for, checked before anything is started."""

from typing import Any

from launch.planning.machines import Machine


def ask(config: Any, machine: Machine, *, vocab_size: int, special: tuple[int, ...] = (), teacher_k: int | None = None,
        decode: tuple[int, int] | None = None) -> dict[str, Any]:
    """What `launch.planning.compile_step` reads, all of it JSON, but for `program`. Raises ValueError for a mesh or
    batch that the machine cannot split, with the nearest that it can."""
    from launch import config as configs
    from lm.models.build import build_model, check_mesh
    mesh, options = full_mesh(config, machine), configs.options(config, "mesh")
    check_mesh(build_model(config.model.to_dict(), vocab_size), mesh)
    _check_rows(config, machine, mesh, decode)
    groups = {group: configs.plain(config[group], group) for group in ("model", "loss", "optimizer", "train")}
    return dict(target=machine.name, mesh=options.sizes, dcn=across(config, machine), vocab_size=vocab_size,
                special=list(special), teacher_k=teacher_k, decode=None if decode is None else list(decode), **groups)


def across(config: Any, machine: Machine) -> dict[str, int]:
    """Factors of the mesh axes across slices: the config's, else all slices on `data`."""
    from launch import config as configs
    given = configs.options(config, "mesh").dcn
    if given is not None:
        return dict(given)
    return {"data": machine.slices} if machine.slices > 1 and machine.kind.gpu is None else {}


def full_mesh(config: Any, machine: Machine) -> dict[str, int]:
    """Size of every mesh axis over all slices. Raises ValueError where the devices do not fit."""
    import math

    from launch import config as configs
    from lm.core.sharding import resolve_mesh_shape
    factors = across(config, machine)
    count = math.prod(factors.values())
    if count > 1 and machine.kind.gpu is None and count != machine.slices:
        raise ValueError(f"config.mesh.dcn={factors} is about {count} slices and --target {machine.name} has "
                         f"{machine.slices}; write {count}x in front of the slice's name, or change mesh.dcn")
    if machine.devices % count:
        raise ValueError(f"config.mesh.dcn={factors} needs a multiple of {count} devices; {machine.name} has "
                         f"{machine.devices}")
    within = resolve_mesh_shape(configs.options(config, "mesh").sizes, machine.devices // count)
    return {axis: size * factors.get(axis, 1) for axis, size in within.items()}


def _check_rows(config: Any, machine: Machine, mesh: dict[str, int], decode: tuple[int, int] | None) -> None:
    from lm.core.axes import BATCH_AXES
    rows = 1 if decode is not None else config.train.microbatches
    for axis in BATCH_AXES:
        rows *= mesh[axis]
    given, what = (config.train.batch_size, "config.train.batch_size=") if decode is None else (decode[0], "--decode ")
    if given % rows:
        near = max(1, round(given / rows)) * rows
        pieces = "" if decode is not None else " x microbatches"
        raise ValueError(f"{what}{given} must be divisible by data x fsdp{pieces} = {rows} on {machine.name}; nearest: "
                         f"{near}")
    if decode is None and config.train.seq_len % mesh["context"]:
        near = max(1, round(config.train.seq_len / mesh["context"])) * mesh["context"]
        raise ValueError(f"config.train.seq_len={config.train.seq_len} must be divisible by config.mesh.context="
                         f"{mesh['context']}; nearest: {near}")
