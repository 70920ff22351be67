"""The report of `lm doctor` as text."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

MIN_WIDTH = 100  # of lines that are not shown in a terminal: wide enough to be searched with grep


def print_report(report: dict[str, Any]) -> None:
    """Prints the report to stdout: plain text, coloured only in a terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(MIN_WIDTH, console.width))
    _section(console, "versions", report["versions"])
    machine = dict(report["machine"])
    _section(console, "machine", {
        "device files": ", ".join(machine["device_files"]) or "no TPU, no GPU",
        **({"jax runs on": f"{machine['count']} x {machine['kind']} ({machine['platform']})",
            "processes": machine["processes"],
            "peak, bf16": _flops(machine["peak_bf16_flops"])} if "platform" in machine else {}),
        **({"platform": machine["platform_note"]} if machine["platform_note"] else {}),
        "lm train starts as": machine["start"],
        **machine["variables"],
    })
    _section(console, "what would run", report["runs_as"])
    cache, disk = report["compile_cache"], report["disk"]
    _section(console, "storage", {
        "compile cache": "off" if cache["folder"] is None else
        f"{cache['folder']} ({cache['programs']} programs, {_size(cache['bytes'])})" if "bytes" in cache else
        cache["folder"],
        "workdir": f"{disk['folder']} ({_size(disk['free_bytes'])} free)" if "free_bytes" in disk else disk["folder"],
    })
    if not report["problems"]:
        console.print("no known problem", style="green")
    for problem in report["problems"]:
        style = {"broken": "bold red"}.get(problem["level"], "yellow")
        console.print(Text(f"{problem['level']}: ", style).append(problem["what"], "default"))
        console.print(Text(f"    {problem['remedy']}"))


def _section(console: Console, title: str, rows: dict[str, Any]) -> None:
    if not rows:
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(str(name)), Text(str(value)))
    console.print(table)
    console.print()


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _flops(peak: float | None) -> str:
    return "unknown device" if peak is None else f"{peak / 1e12:,.0f} TFLOP/s a device"
