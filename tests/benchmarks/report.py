"""What the benchmarks showed, as a section of the README with a chart, from results/*.json.

    python -m tests.benchmarks report

`python -m tests.benchmarks all` measures and then does this.
"""

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cyclopts import App

from erniem_batch.budget import cpu_name

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CHART = RESULTS / "forward.svg"
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
# Instructions that decide how fast a CPU multiplies.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")
KINDS = ("short", "mixed")
NAMES = {
    "ours-ner-float32": "erniem_batch, NER",
    "ours-classify-float32": "erniem_batch, classification",
    "ours-ner-float32-shared": "erniem_batch, NER, weights as in the file",
    "ours-ner-int8": "erniem_batch int8, NER",
    "ours-classify-int8": "erniem_batch int8, classification",
    "ctranslate2-float32": "CTranslate2 4.8.5",
    "ctranslate2-int8": "CTranslate2 4.8.5 int8",
    "onnxruntime-float32": "ONNX Runtime 1.32",
    "onnxruntime-int8": "ONNX Runtime 1.32 int8",
    "openvino-float32": "OpenVINO 2026.4.1",
    "hf5-sdpa": "transformers 5.23 XLM-R, SDPA, sorted",
    "hf4-loop": "transformers 4.40.2 ErnieM, sorted",
    "hf4-pipeline": "transformers 4.40.2 pipeline",
    "gemm-ner": "products alone, NER",
    "gemm-classify": "products alone, classification",
}

app = App(help=__doc__)


@app.default
def main() -> None:
    """Writes the chart and the section."""
    write()


def save(name: str, results: Any) -> None:
    """Keeps what a benchmark showed, and on which machine."""
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": machine(), "results": results}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def write() -> None:
    """The section, from what is there."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    sections = {
        "forward": forward, "layer": layer, "job": job, "memory": memory, "stages": stages,
        "scaling": scaling, "accuracy": told, "tokenizer": told,
    }  # fmt: skip
    lines = [BEGIN]
    for name, section in sections.items():
        if name in found:
            lines += ["", *section(found[name]["results"], found[name]["machine"])]
    text = "\n".join([*lines, "", END])
    readme = README.read_text()
    before, _, rest = readme.partition(BEGIN)
    README.write_text(before + text + rest.partition(END)[2])
    if "forward" in found:
        draw(found["forward"]["results"])


def machine() -> str:
    """This one, in a line."""
    info = Path("/proc/cpuinfo").read_text()
    flags = [flag for flag in FLAGS if f" {flag} " in f"{info} ".replace("\n", " ")]
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{cpu_name()} of a virtual machine ({', '.join(flags)}), "
        f"{memory_gb:.0f} GB, Python {platform.python_version()}, torch {version('torch')}, "
        f"{date.today():%B %Y}"
    )


# ---- sections -----------------------------------------------------------------------------------


def forward(results: Sequence[Mapping[str, Any]], where: str) -> Iterator[str]:
    by = {(r["engine"], r["kind"], r["threads"]): r for r in results}
    columns = sorted(
        {(r["threads"], r["kind"]) for r in results}, key=lambda c: (c[0], c[1] != "short")
    )
    yield (
        "Forward passes, same weights (ErnieM-base with random numbers, 250,002 words) and token "
        "ids, in turn: real tokens a second, medians; in brackets how many times as fast NER "
        f"is here (int8 by int8). {where}."
    )
    yield ""
    yield "![tokens a second](tests/benchmarks/results/forward.svg)"
    yield ""
    heads = [f"{kind}, {threads} thread{'s' * (threads > 1)}" for threads, kind in columns]
    yield f"| | {' | '.join(heads)} | largest difference | same labels | memory MB |"
    yield f"|---|{'---|' * (len(columns) + 3)}"
    for name, label in NAMES.items():
        rows = [by.get((name, kind, threads)) for threads, kind in columns]
        if not any(rows):
            continue
        cells = [_speed(row) for row in rows]
        some = next(row for row in rows if row)
        same = some.get("same_labels")
        yield (
            f"| {label} | {' | '.join(cells)} | {some.get('max_difference', '')} | "
            f"{'' if same is None else f'{same:.1%}'} | {some['peak_mb']} |"
        )
    shares = [
        f"{r['share_of_gemm']:.0%} ({NAMES[r['engine']].rpartition(', ')[2]}, {r['kind']}, "
        f"{r['threads']} thread{'s' * (r['threads'] > 1)})"
        for r in results
        if r["engine"].startswith("ours") and "share_of_gemm" in r
    ]
    if shares:
        yield ""
        yield (
            "Of what the products of the linear layers alone reach for the same batches, those of "
            f"attention counted as work: {', '.join(shares)}."
        )


def _speed(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    mine = "ours-ner-int8" if row["engine"].endswith("int8") else "ours-ner-float32"
    times = row.get(f"{mine}_by_it")
    return f"{row['tokens_per_s']:.0f}" + (
        f" ({times:.2f})" if times and row["engine"] != mine else ""
    )


def layer(rows: Sequence[Mapping[str, Any]], where: str) -> Iterator[str]:
    names = list(rows[0]["share"])
    yield (
        "Where the time of a layer goes, one thread, float32, each step by itself; and what a pass "
        "made of these steps can reach at most, with attention's products counted as work:"
    )
    yield ""
    yield f"| batch | {' | '.join(names)} | at most |"
    yield f"|---|{'---|' * (len(names) + 1)}"
    for row in rows:
        cells = [f"{row['share'][name]:.1%}" for name in names]
        yield (
            f"| {row['kind']}, {row['tokens']} tokens | {' | '.join(cells)} | "
            f"{row['most_possible']:.0%} |"
        )


def job(found: Mapping[str, Any], where: str) -> Iterator[str]:
    speeds = found["tokens_per_s"]
    by = found["ours_by"]
    yield (
        f"NER from Parquet to Parquet through Ray, {found['threads']} threads, {found['tokens']} "
        f"tokens of sentences, start left out: {speeds['ours']} tokens/s, {by['bare']:.0%} of the "
        f"bare predictor ({speeds['bare']})"
        + (
            f" and {by['naive']:.1f} times Ray Data with transformers' pipeline, as tutorials have "
            f"it ({speeds['naive']}, batches of {found['naive_batch']})."
            if "naive" in by
            else "."
        )
    )


def memory(rows: Sequence[Mapping[str, Any]], where: str) -> Iterator[str]:
    yield f"Memory in MB, the highest seen, with a model of {rows[0]['weights_mb']} MB:"
    yield ""
    yield "| actors | all actors | an actor, shared pages counted | an actor, its own | driver |"
    yield "|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row['actors']} | {row['all_actors_pss_mb']} | {row['actor_rss_mb']} | "
            f"{row['actor_anonymous_mb']} | {row['driver_rss_mb']} |"
        )


def stages(rows: Sequence[Mapping[str, Any]], where: str) -> Iterator[str]:
    names = list(rows[0]["ms_per_1000_rows"])
    yield "Where the time of an actor goes, in ms for 1,000 sentences, one thread:"
    yield ""
    yield f"| model | {' | '.join(names)} |"
    yield f"|---|{'---|' * len(names)}"
    for row in rows:
        cells = [f"{row['ms_per_1000_rows'][n]:,.0f} ({row['share'][n]:.1%})" for n in names]
        yield f"| {row['model']} | {' | '.join(cells)} |"


def scaling(rows: Sequence[Mapping[str, Any]], where: str) -> Iterator[str]:
    yield "How cost grows, with a tiny model (two layers of 64), one actor of one thread:"
    yield ""
    yield "| what | value | rows | tokens | s in all | s in units | driver MB | actor MB |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        what, value = next(iter(row.items()))
        yield (
            f"| {what} | {value:,} | {row['rows']:,} | {row['tokens']:,} | "
            f"{row['seconds_in_all']} | {row['seconds_in_units']} | "
            f"{row['driver_mb']} | {row['actor_mb']} |"
        )


def told(found: Mapping[str, Any], where: str) -> Iterator[str]:
    yield found["text"]


# ---- chart --------------------------------------------------------------------------------------


def draw(results: Sequence[Mapping[str, Any]]) -> None:
    """Bars for one thread, that can be read on white and on black."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    grey = "#808080"
    settings = {"svg.hashsalt": "0", "font.size": 9, "text.color": grey, "axes.labelcolor": grey,
                "xtick.color": grey, "ytick.color": grey}  # fmt: skip
    with pyplot.rc_context(settings):
        figure, axes = pyplot.subplots(1, len(KINDS), figsize=(10, 3.6), sharey=True)
        for axis, kind in zip(axes, KINDS, strict=True):
            rows = [
                next(
                    (
                        r
                        for r in results
                        if (r["engine"], r["kind"], r["threads"]) == (name, kind, 1)
                    ),
                    None,
                )
                for name in reversed(NAMES)
            ]
            bars = [row for row in rows if row and not row["engine"].startswith("gemm")]
            colors = ["#2a7de1" if row["engine"].startswith("ours") else "#b0b0b0" for row in bars]
            axis.barh(
                [NAMES[r["engine"]] for r in bars], [r["tokens_per_s"] for r in bars], color=colors
            )
            for place, row in enumerate(bars):
                axis.text(row["tokens_per_s"], place, f" {row['tokens_per_s']:.0f}", va="center")
            axis.set_title(f"{kind} texts, one thread", color=grey)
            axis.set_xlabel("real tokens a second")
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(x=0.15)
        figure.tight_layout()
        figure.savefig(CHART, transparent=True, metadata={"Date": None})
        pyplot.close(figure)
