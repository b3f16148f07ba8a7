# SPDX-License-Identifier: Apache-2.0
"""The table of gpu_report.py: what was measured, beside what is aimed at. A cell without a measurement says so."""
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from gpu_results import ConvCase, conv_cases, layer_cases, recipe_config

from dnnlib.util import format_bytes

MISSING = "not measured"
FORMS = ("cuda", "cpu", "matrix", "ref")       # The first that exists is the one that runs.
LAYOUTS = ("contiguous", "channels last")
# The forms of the generator's convolutions, with the headings of their columns.
CONV_FORMS = {"padded": "shared, padded, channels last", "channels_last": "shared, unpadded, channels last",
              "shared": "shared, contiguous", "grouped": "grouped", "per_sample": "per sample", "products": "products"}
OFFICIAL = ("Official: its own code with its CUDA plugins, one iteration of the same recipe with the same networks, "
            "measured on an H200 with torch 2.11 and CUDA 13.0 on 2026-11-27.")
# Milliseconds, forward / forward and backward, contiguous, of the kernels of 2026-11-27 on that H200.
BEFORE = {"148 -> 148, 2/2, 12/12, 861": ("17.9 / 37.7", "8.13 / 19.9"),
          "84 -> 148, 4/2, 24/12, 1024": ("18.0 / 51.6", "7.64 / 17.6"),
          "84 -> 84, 2/2, 12/12, 1024": ("6.92 / 14.8", "2.53 / 6.2"),
          "52 -> 84, 4/2, 24/12, 1024": ("5.77 / 19.2", "2.04 / 5.0"),
          "52 -> 52, 2/2, 12/12, 1024": ("2.71 / 5.9", "0.90 / 2.2"),
          "36 -> 52, 4/2, 24/12, 1024": ("2.20 / 9.0", "0.81 / 2.0"),
          "36 -> 36, 2/2, 12/12, 1024": ("1.58 / 3.5", "0.58 / 1.7")}
LAYER_AIMS = {"148 -> 148, 2/2, 12/12, 861": "1.3 / 3.5"}
PARTS = ("generator, forward and backward", "generator, forward only", "frozen features, forward and backward",
         "frozen features, forward of real and generated", "heads, for G", "heads, for D",
         "classifier guidance, forward and backward", "optimisers", "average of G")


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that the table is made of."""

    quick: bool
    date: str                               # When the last step ran; "" if none has.
    steps: list[tuple[str, str]]            # Name and title, in order.
    outcomes: Mapping[str, Mapping[str, Any]]               # Step -> outcome and seconds.
    results: Mapping[str, Mapping[str, Any]]                # Step -> content of its JSON file.

    def value(self, step: str, key: str) -> Any:
        """A measurement, or None."""
        return self.results.get(step, {}).get("values", {}).get(key)

    def cell(self, step: str, key: str, show: Callable[[Any], str]) -> str:
        """The same as text."""
        value = self.value(step, key)
        return MISSING if value is None else show(value)

#----------------------------------------------------------------------------
# Parts of the table.

def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{1e3 * seconds:.0f} ms"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def seconds(value: float) -> str:
    return f"{value:.1f} s"


def grid(head: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown. A bar inside a cell would end it."""
    lines = [head, ["---"] * len(head), *([str(cell).replace("|", "/") for cell in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def head_lines(report: Report) -> list[str]:
    command = "`python benchmarks/gpu_report.py`"
    if report.value("versions", "device") is None and not report.outcomes:
        return [f"# One GPU\n\n{command} has not run yet: cells say \"{MISSING}\", and aims stand beside them.\n"]
    facts = [report.cell("versions", "device", str), report.cell("versions", "sms", lambda n: f"{n} SMs"),
             report.cell("versions", "memory", format_bytes),
             f"driver {report.cell('versions', 'driver', str)}", f"torch {report.cell('versions', 'torch', str)}",
             f"CUDA {report.cell('versions', 'cuda', str)}", f"Python {report.cell('versions', 'python', str)}",
             "copies at " + report.cell("versions", "copy_bytes_per_s", lambda b: f"{b / 1e12:.3g} TB/s")]
    known = ", ".join(fact for fact in facts if MISSING not in fact)
    quick = " In miniature (`--quick`): sizes are tiny, so that no number means anything." if report.quick else ""
    return [f"# One GPU\n\n{command}, {report.date}: {known}.{quick}\n"]


def step_lines(report: Report) -> list[str]:
    rows = []
    for name, title in report.steps:
        outcome = report.outcomes.get(name)
        rows.append([title, MISSING, "", ""] if outcome is None else
                    [title, outcome["outcome"], f"{outcome['seconds']:.0f}", report.results[name]["found"]])
    return ["## Steps\n", *grid(["step", "outcome", "seconds", "found"], rows)]


def iteration_lines(report: Report) -> list[str]:
    def row(label: str, key: str, show: Callable[[Any], str], official: str = "", aim: str = "") -> list[str]:
        return [label, report.cell("iteration", key, show), official, aim]

    small, large = ("2", "") if report.quick else ("8", "32")
    rows = [row(f"micro-batch {small}, one iteration", f"{small}/iteration", ms, "601 ms", "200 ms"),
            row("the same with the forms that are fastest on this GPU", f"{small}/tuned", ms, "601 ms", "200 ms"),
            row("the iteration in which forms are timed", f"{small}/tuning", seconds),
            row("images per second", f"{small}/images_per_s", number, "13.3", "40"),
            row("peak memory", f"{small}/peak", format_bytes, "27.7 GiB", "27.7 GiB"),
            ["all filtered_lrelu of it, the form that runs",
             next((report.cell("ops", f"iteration/{form}/channels last", ms) for form in FORMS
                   if report.value("ops", f"iteration/{form}/channels last") is not None), MISSING), "", "40 ms"],
            ["all convolutions of G in it, the forms that run", report.cell("convolutions", "iteration", ms), "", ""],
            row("first iteration", f"{small}/first", seconds, "18.3 s"),
            row("until Python has given all work to the GPU", f"{small}/host", ms),
            row("inside kernels (profiler)", f"{small}/kernel_seconds", ms),
            row("kernels", f"{small}/kernels", str),
            row("one iteration with --feature-precision=tf32", f"{small}/tf32", ms)]
    if large:
        rows += [row(f"micro-batch {large}, one iteration", f"{large}/iteration", ms),
                 row("images per second", f"{large}/images_per_s", number),
                 row("peak memory", f"{large}/peak", format_bytes)]
    sizes = [size for size in (small, large) if size]
    parts = [[part, *(report.cell("iteration", f"{size}/part/{part}", ms) for size in sizes)] for part in PARTS]
    return ["## One iteration of the 128 -> 256 stage\n",
            f"Gmain, Dmain and the average of G; random weights; feature networks in fp32, G in fp16. {OFFICIAL}\n",
            *grid(["what", "measured", "official", "aim"], rows),
            *grid(["part, by itself", *(f"micro-batch {size}" for size in sizes)], parts)]


def layer_lines(report: Report) -> list[str]:
    forms = [form for form in FORMS if form in ("cuda", "matrix") or f'/{form}/' in str(report.results.get("ops"))]
    columns = [(form, layout) for form in forms for layout in LAYOUTS]

    def both(name: str, form: str, layout: str) -> str:
        found = [report.value("ops", f"{name}/{form}/{layout}/{what}") for what in ("forward", "both")]
        texts = [MISSING if x is None else f"{1e3 * x:.3g}" for x in found]
        return MISSING if found == [None, None] else " / ".join(texts)

    rows = [[case.name, report.cell("ops", f"{case.name}/floor", lambda x: f"{1e3 * x:.3g}"),
             *(both(case.name, *column) for column in columns), LAYER_AIMS.get(case.name, ""),
             *BEFORE.get(case.name, ("", ""))] for case in layer_cases(recipe_config(report.quick))]
    sums = ["sum of an iteration", "", *(report.cell("ops", f"iteration/{form}/{layout}", lambda x: f"{1e3 * x:.3g}")
                                         for form, layout in columns), "40", "", ""]
    return ["## filtered_lrelu at the layers of this stage\n",
            "Milliseconds, forward / forward and backward, batch 8, fp16. The floor of the forward pass is to read its "
            "input and to write its output once at the speed of a copy. The sum counts every layer of the network: "
            "a forward pass for D, both passes for G. The last two columns were measured on an H200 on 2026-11-27, "
            "with the kernels of that day.\n",
            *grid(["in -> out, up/down, taps, channels", "floor", *(", ".join(column) for column in columns), "aim",
                   "cuda then", "matrix then"], [*rows, sums])]


def conv_lines(report: Report) -> list[str]:
    runs = report.value("convolutions", "runs") or {}

    def cell(case: ConvCase, form: str) -> str:
        if form == "products" and case.kernel > 1:
            return ""
        found = [report.value("convolutions", f"{case.name}/{form}/{what}") for what in ("forward", "both")]
        return MISSING if None in found else " / ".join(f"{1e3 * x:.3g}" for x in found)

    rows = [[case.name, *(cell(case, form) for form in CONV_FORMS), runs.get(case.name, "")]
            for case in conv_cases(recipe_config(report.quick))]
    total = report.cell("convolutions", "iteration", lambda x: f"{1e3 * x:.3g}")
    sums = ["sum of an iteration", *("" if form == "products" else report.cell(
        "convolutions", f"iteration/{form}", lambda x: f"{1e3 * x:.3g}") for form in CONV_FORMS), total]
    return ["## Convolutions of the generator at the layers of this stage\n",
            "Milliseconds, forward / forward and backward, batch 8, fp16, with the changes of type and the scaling of "
            "maps and weights that a form needs. Frozen layers have the gradient of the map, trained ones also those "
            "of weights and styles. The sum counts every layer of the network: a forward pass for D, both passes for "
            "G; the last column has the sum of what runs. 69 TFLOP at 600 TFLOP/s are 116 ms.\n",
            *grid(["size, kernel, channels", *CONV_FORMS.values(), "what runs"], [*rows, sums])]


def simple_lines(report: Report) -> list[str]:
    sizes = ("16 x 32",) if report.quick else ("1024 x 84", "512 x 148")
    form = "cpu" if report.quick and report.value("ops", "bias_act/16 x 32/cuda") is None else "cuda"
    rows = [[f"{op}, {size}", *(report.cell("ops", f"{op}/{size}/{name}", percent) for name in (form, "ref")), "75 %"]
            for op in ("bias_act", "upfirdn2d, 2 times up") for size in sizes]
    return ["## bias_act, upfirdn2d\n", "Share of the speed of a copy, forward, batch 8, fp16, channels x pixels.\n",
            *grid(["operation", form, "ref", "aim"], rows)]


def stem_lines(report: Report) -> list[str]:
    names = ("small", "large")
    rows = [[label, *(report.cell("stem", f"{name}/{key}", show) for name in names)] for label, key, show in (
        ("one iteration", "iteration", ms), ("images per second", "images_per_s", number),
        ("peak memory", "peak", format_bytes), ("until Python has given all work to the GPU", "host", ms),
        ("inside kernels (profiler)", "kernel_seconds", ms), ("kernels", "kernels", str),
        ("share of the time in which no kernel runs", "idle", percent))]
    sampled = [[name, report.cell("sampling", f"{name}/images_per_s", number)]
               for name in (("fp32", "bf16") if report.quick else ("fp16", "fp32"))]
    return ["## The stem at 16 pixels, 10 layers\n",
            "What launching costs is estimated as the time of an iteration less the sum of its kernels' times, which "
            "PyTorch's profiler gives: kernels run one after the other. Where Python needs as long as the iteration "
            "takes, the GPU waits for it.\n",
            *grid(["what", f"micro-batch {2 if report.quick else 8}", "that of --batch-gpu=auto: "
                   + report.cell("stem", "auto", str)], rows),
            "## Sampling at 256 pixels, batch 8\n", *grid(["precision", "images per second"], sampled)]


def other_lines(report: Report) -> list[str]:
    rows = [["compiling: cuda", report.cell("build", "cuda/seconds", seconds)],
            ["compiling: cpu", report.cell("build", "cpu/seconds", seconds)],
            ["self-check: cuda", report.cell("self_check", "cuda/line", str)],
            ["a small training run: the first tick after", report.cell("training", "first_tick", seconds)],
            ["the same: the first iteration", report.cell("training", "first_iteration", seconds)],
            ["the same: one iteration", report.cell("training", "iteration", ms)],
            ["loading 256-pixel images to the device, per second", report.cell("loading", "images_per_s", number)],
            ["two processes on one GPU over gloo, one iteration", report.cell("two_processes", "iteration", ms)],
            ["GPU tests", report.cell("tests", "counts", lambda c: ", ".join(f"{n} {name}" for name, n in c.items()))]]
    return ["## The rest\n", *grid(["what", "measured"], rows)]


def table(report: Report) -> str:
    """Markdown."""
    parts = (head_lines, step_lines, iteration_lines, layer_lines, conv_lines, simple_lines, stem_lines, other_lines)
    return "\n".join(line for part in parts for line in part(report))
