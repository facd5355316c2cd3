"""A report as a page that needs nothing but itself: what it cost and bought, then the layers that hurt most first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from string import Template
from typing import TYPE_CHECKING

from ptq4cuda._version import __version__

if TYPE_CHECKING:
    from ptq4cuda.artifact.record import Histogram, QuantRecord
    from ptq4cuda.artifact.report import LayerReport, Report

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ptq4cuda report</title>
<style>body { margin: 0; } @media (prefers-color-scheme: dark) { body { background: #14181f; } }</style>
</head>
<body>
$fragment
</body>
</html>
""")

_STYLE = """
.ptq4cuda { --back: #fff; --card: #f6f7f9; --ink: #1a2230; --soft: #5a6575; --line: #d5dae2; --input: #2868c8;
  --weight: #7a55b8; --clip: #b93a2b; color: var(--ink); background: var(--back);
  padding: 20px clamp(14px, 3vw, 48px) 40px; font: 15px/1.45 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
@media (prefers-color-scheme: dark) { .ptq4cuda { --back: #14181f; --card: #1d232d; --ink: #e5e9f0; --soft: #9aa6b6;
  --line: #3a4452; --input: #6ea3f2; --weight: #b395ec; --clip: #f08576; } }
.ptq4cuda h1 { font-size: 1.05rem; font-weight: 600; color: var(--soft); margin: 0 0 4px; }
.ptq4cuda .headline { font-size: 1.35rem; line-height: 1.35; margin: 0 0 6px; max-width: 62em; }
.ptq4cuda h2 { font-size: 1.1rem; margin: 30px 0 4px; }
.ptq4cuda p { margin: 0 0 10px; max-width: 80em; }
.ptq4cuda .soft { color: var(--soft); }
.ptq4cuda svg { display: block; width: 100%; }
.ptq4cuda .course { display: grid; grid-template-columns: auto 1fr; gap: 2px 10px; margin: 14px 4px 0 0;
  font-size: 0.8rem; color: var(--soft); }
.ptq4cuda .course svg { overflow: visible; }
.ptq4cuda .course path { fill: none; vector-effect: non-scaling-stroke; }
.ptq4cuda .axis { display: flex; flex-direction: column; justify-content: space-between; text-align: right;
  line-height: 1; margin: -0.5em 0; height: calc(130px + 1em); }
.ptq4cuda .ends { grid-column: 2; display: flex; justify-content: space-between; gap: 1em; margin-top: 4px; }
.ptq4cuda .ends span { overflow-wrap: anywhere; }
.ptq4cuda .layer { display: grid; grid-template-columns: 1fr; gap: 4px 28px; background: var(--card);
  border-radius: 8px; padding: 12px 14px; margin: 0 0 10px; }
.ptq4cuda .name { font-weight: 600; overflow-wrap: anywhere; }
.ptq4cuda .share { height: 6px; background: var(--line); border-radius: 3px; margin: 6px 0; max-width: 420px; }
.ptq4cuda .share i { display: block; height: 100%; background: var(--clip); border-radius: 3px; }
.ptq4cuda dl { display: grid; grid-template-columns: auto 1fr; gap: 0 12px; margin: 0; }
.ptq4cuda dt { color: var(--soft); }
.ptq4cuda dd { margin: 0; overflow-wrap: anywhere; }
.ptq4cuda .place { position: relative; height: 1.4em; font-size: 0.8rem; color: var(--soft); }
.ptq4cuda .place span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.ptq4cuda figure { margin: 4px 0 0; min-width: 0; }
.ptq4cuda figcaption { font-size: 0.85rem; }
.ptq4cuda .scroll { overflow-x: auto; }
.ptq4cuda table { border-collapse: collapse; }
.ptq4cuda th, .ptq4cuda td { text-align: left; vertical-align: top; padding: 3px 18px 3px 0; border: 0;
  border-bottom: 1px solid var(--line); background: none; overflow-wrap: break-word; }
.ptq4cuda td.number, .ptq4cuda th.number { text-align: right; white-space: nowrap; }
.ptq4cuda pre { font: 12px/1.4 ui-monospace, monospace; color: inherit; background: none; margin: 8px 0; }
@media (min-width: 760px) { .ptq4cuda .layer { grid-template-columns: minmax(230px, 1fr) 1fr 1fr; } }
"""

_FRAGMENT = Template("""<div class="ptq4cuda">
<style>$style</style>
<h1>ptq4cuda report</h1>
<p class="headline">$headline</p>
<p class="soft">$details</p>
$sections
</div>""")

_LAYER = Template("""<section class="layer">
<div class="facts"><div class="name">$name</div>$share<dl>$facts</dl></div>
$figures
</section>""")

_HISTOGRAM = Template("""<figure><figcaption>$caption</figcaption>
<svg viewBox="0 0 48 32" height="72" preserveAspectRatio="none" role="img" aria-label="$label">
<path d="$bars" fill="var(--$colour)"/>
<path d="M8 0V32M40 0V32" stroke="var(--clip)" stroke-width="1.5" vector-effect="non-scaling-stroke"/>
<path d="M0 32H48" stroke="var(--line)" vector-effect="non-scaling-stroke"/></svg>
<div class="place"><span style="left:16.7%">$low</span><span style="left:83.3%">$high</span></div></figure>""")

_HURT = Template("""<h2>Layers, those that hurt most first</h2>
<p class="soft">Order and bar: each layer's share of $noise. SQNR: of the output with all layers before it quantized
too; alone: of this layer's quantization by itself. Histograms show where values lie in the range of their channel,
between the red lines; what is outside is clipped. Heights are square roots of shares, zeros are left out.</p>""")

_AT_OUTPUTS = """the noise at the network's outputs. It was measured with the weights or the input of one layer alone
quantized, quickly and on few samples, and is scaled to the bits that these have now"""

_AT_LAYERS = """the noise that layers add by their own quantization, measured at their own outputs on some of the
calibration data"""


def page(report: Report) -> str:
    """Return a whole document."""
    return _PAGE.substitute(fragment=fragment(report))


def fragment(report: Report) -> str:
    """Return a piece of a document, with its own style, as a notebook shows it."""
    record = report.record
    quantized = [layer for layer in report.layers if layer.execution != "float"]
    left = [layer for layer in report.layers if layer.execution == "float"]
    sections = []
    if quantized:
        worst_first = sorted(quantized, key=lambda layer: -(layer.noise_share or 0.0))
        hurt = _HURT.substitute(noise=_AT_OUTPUTS if record.noise_at_outputs else _AT_LAYERS)
        sections += [_course(quantized), hurt, *map(_layer, worst_first)]
    if left:
        rows = [(layer.name, layer.kind, f"{layer.bytes:,}", layer.reason) for layer in left]
        sections += ["<h2>What stayed in float, and why</h2>", _table(("layer", "kind", "bytes", "reason"), rows)]
    if record.outputs:
        found = [(o.name, _decibels(o.sqnr), _decibels(o.median_sqnr)) for o in record.outputs]
        sections += ["<h2>Outputs</h2>", _table(("output", "SQNR", "of the median sample"), found)]
    sections.append(
        "<h2>All of it</h2><details><summary>as text</summary>"
        f'<div class="scroll"><pre>{escape(str(report))}</pre></div></details>'
    )
    return _FRAGMENT.substitute(
        style=_STYLE, headline=_headline(report), details=_details(record), sections="\n".join(sections)
    )


def _headline(report: Report) -> str:
    """Tell in a line what quantization cost and what it bought."""
    record = report.record
    cost = f"Cost: {_decibels(record.sqnr)} SQNR at the output"
    if record.trade and record.float_value is not None and record.trade[-1].value is not None:
        cost += f", your measure {record.trade[-1].value:.6g} instead of {record.float_value:.6g}"
    before, now = record.float_bytes, report.bytes
    count = len(report.layers)
    quantized = sum(layer.execution != "float" for layer in report.layers)
    integers = sum(layer.execution == "integer" for layer in report.layers)
    smaller = f", {before / now:.1f} times less" if now else ""
    layers = f"all {count} layers compute in integers"
    if integers < count:
        layers = f"{quantized} of {count} layers are quantized, {integers} compute in integers"
    return f"{cost}. Bought: {_bytes(before)} became {_bytes(now)}{smaller}; {layers}."


def _details(record: QuantRecord) -> str:
    samples = f"{record.images:,} calibration samples"
    if record.held_out:
        samples = f"{record.held_out:,} samples held out beside {samples}"
    parts = [f"SQNR on {samples}"]
    if record.worst_sqnr is not None:
        parts[0] += f": median {_decibels(record.median_sqnr)}, worst {_decibels(record.worst_sqnr)}"
    if record.seconds:
        parts.append(f"quantized in {record.seconds:.1f} s")
    parts.append(
        f"{record.folded} BatchNorms folded"
        if record.walked_by == "graph"
        else f"walked by its modules, BatchNorm not folded: {record.reason}"
    )
    parts += filter(
        None, (record.left_out, record.few_samples, record.shortfall and f"not reached: {record.shortfall}")
    )
    return escape(". ".join(part[:1].upper() + part[1:] for part in parts) + f". By ptq4cuda {__version__}.")


def _course(layers: list[LayerReport]) -> str:
    """Draw the SQNR of the layers in their order."""
    widest = 1e4  # dB between floating-point numbers: what a file says may be anything
    found = [(i, s) for i, s in enumerate(layer.sqnr for layer in layers) if s is not None and abs(s) < widest]
    if len(found) < 2:
        return ""
    most = max(10.0, math.ceil(max(sqnr for _, sqnr in found) / 10.0) * 10.0)
    least = min(0.0, math.floor(min(sqnr for _, sqnr in found) / 10.0) * 10.0)
    last = max(1, len(layers) - 1)
    points = [(100.0 * i / last, 100.0 * (most - sqnr) / (most - least)) for i, sqnr in found]
    line = "L".join(f"{x:.2f} {y:.2f}" for x, y in points)
    dots = "".join(
        f'<path d="M{x:.2f} {y:.2f}h0"><title>{escape(layers[i].name)}: {_decibels(sqnr)}</title></path>'
        for (x, y), (i, sqnr) in zip(points, found, strict=True)
    )
    grid = "".join(f"M0 {100.0 * (most - v) / (most - least):.2f}H100" for v in range(int(least), int(most) + 1, 10))
    return (
        "<h2>SQNR from layer to layer</h2>"
        '<p class="soft">In order of execution; lines are 10 dB apart. Point at a fall for the name of the layer.</p>'
        f'<div class="course"><div class="axis"><span>{most:.0f} dB</span><span>{least:.0f} dB</span></div>'
        '<svg viewBox="0 0 100 100" height="130" preserveAspectRatio="none" role="img" '
        f'aria-label="SQNR from {_decibels(found[0][1])} to {_decibels(found[-1][1])}">'
        f'<path d="{grid}" stroke="var(--line)"/>'
        f'<path d="M{line}" stroke="var(--input)" stroke-width="1.5"/>'
        f'<g stroke="var(--input)" stroke-width="6" stroke-linecap="round">{dots}</g></svg>'
        f'<div class="ends"><span>{escape(layers[0].name)}</span><span>{escape(layers[-1].name)}</span></div></div>'
    )


def _layer(layer: LayerReport) -> str:
    share = noise = ""
    if layer.noise_share is not None:
        percent = 100.0 * layer.noise_share
        noise = f"{percent:.1f} % of all layers'" if percent >= 0.05 else "less than 0.1 % of all layers'"
        if layer.weight_damage and layer.input_damage and percent >= 0.05:
            of_weights = 100.0 * layer.weight_damage / (layer.weight_damage + layer.input_damage)
            noise += f", {of_weights:.0f} % of it by the weights"
        share = f'<div class="share"><i style="width:{percent:.1f}%"></i></div>'
    facts = {
        "noise": noise,
        "SQNR": f"{_decibels(layer.sqnr)}, alone {_decibels(layer.own_sqnr)}",
        "bits": f"weights {_bits(layer.weight_bits)}, input {_bits(layer.activation_bits)}",
        "bytes": f"{layer.float_bytes:,} → {layer.bytes:,}",
        "runs as": f"{layer.execution}{', ' + layer.kernel if layer.kernel else ''}",
        "remark": layer.reason,
    }
    pairs = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items() if text)
    figures = [
        _histogram(f"Input, {_bits(layer.activation_bits)} bits, {layer.clip}", layer.input_histogram, "input"),
        _histogram(f"Weights, {_bits(layer.weight_bits)} bits", layer.weight_histogram, "weight"),
    ]
    name = f'{escape(layer.name)} <span class="soft">{escape(layer.kind)}</span>'
    return _LAYER.substitute(name=name, share=share, facts=pairs, figures="\n".join(figures))


def _histogram(title: str, found: Histogram | None, colour: str) -> str:
    if found is None or not any(found.counts):
        return ""
    heights = [math.sqrt(max(0, n) / max(found.counts)) * 31.0 for n in found.counts]
    bars = "".join(f"M{i} 32v-{h:.1f}h1V32z" for i, h in enumerate(heights) if h)
    facts = [title, f"{found.clipped:.2g} % clipped", *([f"{found.zeros:.0f} % zeros"] if found.zeros >= 0.5 else [])]
    caption = escape(", ".join(facts))
    low, high = f"{found.low:.3g}", f"{found.high:.3g}"
    return _HISTOGRAM.substitute(
        caption=caption, label=f"{caption}, range {low} to {high}", bars=bars, colour=colour, low=low, high=high
    )


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...], tag: str) -> str:
        numbers = [name in ("bytes", "SQNR", "of the median sample") for name in header]
        shown = (
            f"<{tag}{' class=number' if number else ''}>{escape(cell)}</{tag}>"
            for cell, number in zip(cells, numbers, strict=True)
        )
        return f"<tr>{''.join(shown)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>{line(header, "th")}{body}</table></div>'


def _decibels(value: float | None) -> str:
    return "no noise" if value is None else f"{value:.1f} dB"


def _bits(value: float | None) -> str:
    return "float" if value is None else f"{round(value, 2):g}"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"
