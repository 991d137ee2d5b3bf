"""The pictures of docs/performance.md as SVG, the same bytes for the same figures."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from roofline import Device

COLOURS = {"layer products": "#0b63b0", "head": "#3d7f86", "attention": "#d1570a", "layernorm": "#2b8a4b",
           "embedding": "#6b5b4d", "loss": "#8a4fb0", "optimizer": "#b3213d"}
INK = "#3c434c"


class Bar(NamedTuple):
    label: str
    ms: dict[str, float]                                        # by part


class Point(NamedTuple):
    op: str
    part: str
    intensity: float                                            # FLOP per byte
    bound: float                                                # TFLOP/s
    measured: float | None


def text(x: float, y: float, words: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{INK}">{words}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str = INK, width: float = 1) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def svg(width: int, height: int, parts: Sequence[str]) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">\n'
            f'<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n")


def step_svg(groups: Sequence[Sequence[Bar]]) -> str:
    """A group of bars for each model, each group with a scale of its own."""
    left, wide, y, parts = 20, 760, 10, []
    for bars in groups:
        longest = max(sum(bar.ms.values()) for bar in bars)
        for bar in bars:
            total, x = sum(bar.ms.values()), float(left)
            parts.append(text(left, y + 14, f"{bar.label}: {total:,.1f} ms"))
            for part, colour in COLOURS.items():
                width = wide * bar.ms.get(part, 0) / longest
                parts.append(f'<rect x="{x:.1f}" y="{y + 20}" width="{width:.1f}" height="26" fill="{colour}"/>')
                share = bar.ms.get(part, 0) / total
                if width > 40:
                    parts.append(f'<text x="{x + width / 2:.1f}" y="{y + 38}" text-anchor="middle" font-size="12" '
                                 f'fill="white">{share:.0%}</text>')
                x += width
            y += 56
        y += 10
    x = left
    for part, colour in COLOURS.items():
        parts += [f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}"/>', text(x + 17, y + 11, part)]
        x += 40 + 7 * len(part)
    return svg(800, y + 24, parts)


class Pass(NamedTuple):
    """An op without counted FLOP: its bound is the bandwidth."""
    op: str
    part: str
    measured: float | None                                      # GB/s


def passes_rows(passes: Sequence[Pass], d: Device, y: int) -> list[str]:
    """Frames as long as the bandwidth, filled as far as was measured."""
    x0, x1 = 170, 730
    known = any(p.measured is not None for p in passes)
    parts = [text(x0, y, f"GB/s of all else; frame: bound, {d.gb_per_s:,.0f}" + ("; filled: measured" if known else
                                                                                 ", not measured"))]
    for i, p in enumerate(passes):
        top, colour = y + 10 + 22 * i, COLOURS[p.part]
        parts += [text(x0 - 8, top + 12, p.op, "end", 11), f'<rect x="{x0}" y="{top}" width="{x1 - x0}" height="14" '
                  f'fill="white" stroke="{colour}"/>']
        if p.measured is not None:                              # what caches keep can be faster than the memory
            width = (x1 - x0) * min(1.0, p.measured / d.gb_per_s)
            parts += [f'<rect x="{x0}" y="{top}" width="{width:.1f}" height="14" fill="{colour}"/>',
                      text(x1 + 8, top + 12, f"{p.measured:,.0f}", size=11)]
    return parts


def roofline_svg(points: Sequence[Point], passes: Sequence[Pass], d: Device, title: str) -> str:
    """FLOP/s over FLOP per byte, both logarithmic. Circles lie on the roof and are bounds; dots are measured. Below it
    the ops that have no FLOP to count."""
    x0, x1, y0, y1 = 60, 780, 380, 40                           # of the plot's frame
    low_x, high_x, low_y, high_y = 10.0, 1e4, 10.0, 2e3

    def at(intensity: float, rate: float) -> tuple[float, float]:
        return (x0 + (x1 - x0) * math.log(intensity / low_x) / math.log(high_x / low_x),
                y0 + (y1 - y0) * math.log(rate / low_y) / math.log(high_y / low_y))

    parts = [text((x0 + x1) / 2, 22, title, "middle", 14), line(x0, y0, x1, y0), line(x0, y0, x0, y1),
             text((x0 + x1) / 2, y0 + 34, "FLOP per byte of device memory", "middle"),
             text(x0 - 6, y1 - 8, "TFLOP/s", "middle")]
    for tick in (10, 100, 1000, 10000):
        parts.append(text(at(tick, low_y)[0], y0 + 16, f"{tick:,}", "middle"))
        if tick <= high_y:
            parts.append(text(x0 - 6, at(low_x, tick)[1] + 4, f"{tick:,}", "end"))
    ridge = d.tflop_per_s / d.gb_per_s * 1e3
    parts += [line(*at(low_x, low_x * d.gb_per_s / 1e3), *at(ridge, d.tflop_per_s), INK, 2),
              line(*at(ridge, d.tflop_per_s), *at(high_x, d.tflop_per_s), INK, 2),
              text(x1 - 4, at(1, d.tflop_per_s)[1] - 8, f"{d.tflop_per_s:,.0f} TFLOP/s, {d.gb_per_s:,.0f} GB/s: "
                   f"{d.source}", "end")]
    for i, p in enumerate(sorted(points, key=lambda p: p.intensity)):
        x, y = at(p.intensity, p.bound)
        colour = COLOURS[p.part]
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="white" stroke="{colour}" stroke-width="2"/>')
        label_y = y0 - 8 - 17 * i                               # a stair of labels below the points
        parts += [line(x, y + 6, x, label_y - 4, "#c8ccd0", 0.7), text(x + 4, label_y, p.op, size=11)]
        if p.measured is not None:
            _, y = at(p.intensity, p.measured)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
    known = any(p.measured is not None for p in points)
    key = "circles: bounds; dots: measured" if known else "circles: bounds, not measured"
    parts.append(text(x0 + 10, y1 + 14, key))
    return svg(800, 470 + 22 * len(passes), parts + passes_rows(passes, d, 450))
