"""A plan as text, or as plain data."""

from collections.abc import Mapping
from typing import Any

from launch.planning.figures import GIB, HELD
from launch.planning.planned import Plan, Setting

ASSUMED = ("memory as the compiler lays it out. Step time: the least that peaks allow, instruction by instruction; "
           "vector work outside kernels, latencies and part-filled matrix units are not in it: a run is slower")


def describe(plan: Plan, setting: Setting) -> str:
    """The whole report of one plan."""
    lines = [f"{setting.machine.describe()}; {setting.compiler}", what(plan, setting), *map(str, plan.undivided)]
    if plan.result["status"] == "too large":
        return "\n".join([*lines, too_large(plan)])
    if plan.numbers is None:
        without = "; --config.model.attention.implementation=blocked needs no such library (fam, bswa: xla)"
        return "\n".join([*lines, f"{plan.result['status']}: {plan.result['reason']}"
                                  f"{without if 'cudnn' in plan.result['reason'].lower() else ''}"])
    lines += memory_lines(plan, setting)
    if setting.machine.chip is None:
        return "\n".join([*lines, f"a step: {plan.numbers['flops']:.4g} FLOPs of matrix products, "
                                  f"{plan.numbers['bytes']:.4g} bytes to and from memory"])
    return "\n".join([*lines, *work_lines(plan.numbers, setting), *time_lines(plan.numbers, setting),
                      f"assumed: {ASSUMED}"])


def what(plan: Plan, setting: Setting) -> str:
    """The mesh and the program."""
    axes = ", ".join(f"{axis} {n}" for axis, n in plan.mesh.items() if n > 1) or "one device"
    remat = f"remat {plan.config.model.get('remat', 'none')}"
    if setting.decode:
        return f"mesh {axes}; one token for each of {setting.decode[0]} rows with room for {setting.decode[1]}"
    train = plan.config.train
    return (f"mesh {axes}; train step of {train.batch_size} x {train.seq_len} tokens in {train.microbatches} "
            f"microbatch{'es' if train.microbatches > 1 else ''}, {remat}")


def too_large(plan: Plan) -> str:
    """What the compiler said that it needs."""
    result = plan.result
    return (f"does not fit: the compiler needs {result['used'] / GIB:.2f} GiB of a device and can use "
            f"{result['usable'] / GIB:.2f}; of this {result['params'] / GIB:.3f} parameters, "
            f"{result['optimizer'] / GIB:.3f} optimizer state")


def memory_lines(plan: Plan, setting: Setting) -> list[str]:
    """GiB of a device by kind, and whether it fits."""
    numbers = plan.numbers
    lines = [f"  {name:<42}{numbers['memory'][key] / GIB:9.3f} GiB" for key, name in HELD.items()
             if numbers["memory"][key] or key in ("params", "optimizer", "activations", "temporaries")]
    seconds = numbers["seconds"]
    verdict = "fits" if plan.fits else "does not fit"
    took = "kept from before, when it " if numbers["cached"] else ""
    return [*lines, f"  {'in all, of ' + format(setting.machine.gib, '.4g'):<42}{numbers['total'] / GIB:9.3f} GiB: "
                    f"{verdict}, {took}compiled in {seconds['compile']:.0f} s ({seconds['trace']:.0f} s to trace, "
                    f"{seconds['lower']:.0f} s to lower), not run"]


def work_lines(numbers: Mapping[str, Any], setting: Setting) -> list[str]:
    """What a device does in a step."""
    chip, share = setting.machine.chip, setting.machine.chip.devices
    lines = ["a device, a step:",
             f"  matrix products {numbers['flops'] / 1e12:.4g} TFLOP: {milli(numbers['matrix_seconds'])} at "
             f"{chip.peak / share / 1e12:g} TFLOP/s",
             f"  memory {numbers['bytes'] / 1e9:.4g} GB: {milli(numbers['memory_seconds'])} at "
             f"{chip.bandwidth / share / 1e9:g} GB/s"]
    for one in numbers["kernels"]:
        own = one["binding"] if one["known"] else f"{one['binding']} (no work is written down for this call)"
        lines.append(f"  kernel {one['name']} x {one['count']:.4g}: {milli(one['seconds'])} by {own}")
    for one in numbers["collectives"]:
        lines.append(f"  {one['kind']} x {one['count']:.4g} among {one['size']}: {one['bytes'] / 1e9:.4g} GB, sends "
                     f"{one['sent'] / 1e9:.4g} GB, {milli(one['seconds'])} of {one['link']}, "
                     f"{one['beside'] / one['count']:.0%} of them started beside other work")
    if numbers["unknown_loops"]:
        lines.append(f"  {len(numbers['unknown_loops'])} loop(s) run as often as the program decides; taken at the "
                     f"mean of what the model draws, else once")
    if numbers["xla"].get("optimal_seconds", 0) > 0:
        lines.append(f"  XLA's own estimate, loops counted once, blind in kernels and to links: "
                     f"{milli(numbers['xla']['optimal_seconds'])}")
    return lines


def time_lines(numbers: Mapping[str, Any], setting: Setting) -> list[str]:
    """Step time, MFU, tokens a second, and what the run costs at least."""
    machine = setting.machine
    lines = []
    for key, name in (("overlapped", "links hidden"), ("apart", "links apart")):
        one = numbers[key]
        run = "" if setting.decode else f", {one['days']:.4g} days, {one['chip_hours']:,.0f} chip-hours"
        lines.append(f"step at least {milli(one['seconds'])} ({name}): MFU at most {one['mfu']:.1%}, "
                     f"{one['tokens_per_second']:,.0f} tokens/s{run}")
    formula = "passes x F x tokens / (step x peak x chips)" if not setting.decode else \
        "F x rows / (step x peak x chips)"
    return [*lines, f"MFU = {formula}, F forward FLOPs a token (docs/flops.md), peak "
                    f"{machine.chip.peak / 1e12:g} TFLOP/s a chip of bf16, {machine.chips} chips"]


def milli(seconds: float) -> str:
    """Seconds, or milliseconds where that is shorter."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def data(plan: Plan, setting: Setting) -> dict[str, Any]:
    """Everything above as JSON."""
    machine = setting.machine
    keep = {k: v for k, v in plan.result.items() if k not in ("granules", "program")}
    return dict(target=machine.name, chips=machine.chips, cores=machine.cores, devices=machine.devices,
                compiler=setting.compiler, mesh=dict(plan.mesh), flags=list(plan.flags), fits=plan.fits, result=keep,
                numbers=plan.numbers)
