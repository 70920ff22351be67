"""Compile one direction of one case for a device that is not here, and say in JSON what came of it.

    python -m pallas_kernels.aot.compilation 'linear_scan reset' backward v5e pallas_tpu [FOLDER]

A process of its own for each, because compilers read their settings once and may crash or hang. It needs libtpu or, for
GPUs, the CUDA plugin, no device, and, before jax is imported, the environment that `launch.kernels.process` sets.
FOLDER is where that environment tells the GPU compilers to write what they made.
"""

import json
import pathlib
import sys
import traceback
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.aot import gpu_compilation
from pallas_kernels.aot.case import Case, find_case
from pallas_kernels.aot.targets import Target, find_target
from pallas_kernels.testing import compile_for_tpu, kernels_in

REASON_LENGTH = 600


def function_of(case: Case, direction: str, kernel: str):
    """(function, abstract arguments): one call of the operation, or its vjp from given cotangents."""
    def forward(inputs):
        return case.op(**inputs, **case.options, implementation=kernel)

    def backward(inputs, cotangents):
        leaves, tree = jax.tree.flatten(inputs)
        floats = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]

        def of_floats(given):
            return forward(tree.unflatten([given[floats.index(i)] if i in floats else x for i, x in enumerate(leaves)]))

        outputs, vjp = jax.vjp(of_floats, [leaves[i] for i in floats])
        return vjp(jax.tree.map(lambda y, g: g if jnp.issubdtype(y.dtype, jnp.floating)
                                else jnp.zeros(y.shape, jax.dtypes.float0), outputs, cotangents))

    inputs = dict(case.inputs)
    if direction == "forward":
        return forward, (inputs,)
    # The shapes do not depend on the implementation, and the reference serves on every platform.
    outputs = jax.eval_shape(lambda inputs: case.op(**inputs, **case.options, implementation="reference"), inputs)
    return backward, (inputs, outputs)


def compile_cell(case: Case, direction: str, target: Target, kernel: str, folder: str | None = None) -> dict[str, Any]:
    """Status "ok" with the facts of the compiled program, or "no kernel" with the reason; compilers raise theirs."""
    function, arguments = function_of(case, direction, kernel)
    if target.gpu is None:
        compiled = compile_for_tpu(target.topology, function, *arguments)
        calls = kernels_in(compiled)
    else:
        compiled = gpu_compilation.compile_for_gpu(target.gpu, function, *arguments)
        calls = gpu_compilation.kernels_in(compiled)
    facts = dict(status="ok", calls=calls, temporaries=compiled.memory_analysis().temp_size_in_bytes)
    if target.gpu is None:
        facts["bytes"] = int(compiled.cost_analysis().get("bytes accessed", 0))
    elif folder:
        facts["ptxas"] = gpu_compilation.resources(pathlib.Path(folder), list(dict.fromkeys(calls)))
    missing = [name for name in case.expected_calls(direction) if not any(call.startswith(name) for call in calls)]
    if missing:
        facts.update(status="no kernel", reason=f"the program does not call {', '.join(missing)}; it calls "
                                                f"{', '.join(calls) or 'no kernel'}")
    return facts


def short_reason(error: BaseException) -> str:
    """The last lines that say something of an error's message, without the frames between."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(("File ", "^", "---", "For simplicity", "at "))]
    return (f"{type(error).__name__}: " + " ".join(said))[:REASON_LENGTH]


def main(arguments: list[str]) -> int:
    """Prints the result as the last line of the standard output."""
    name, direction, target, kernel, *folder = arguments
    try:
        result = compile_cell(find_case(name), direction, find_target(target), kernel, *folder)
    except Exception as error:  # whatever a compiler raises is the answer that was asked for
        traceback.print_exc()
        result = dict(status="refused", reason=short_reason(error))
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
