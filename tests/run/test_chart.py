"""Line charts in SVG."""

from __future__ import annotations

from xml.etree import ElementTree

from mapo_fast.run.chart import Curve, chart


def test_a_chart_is_well_formed_and_says_itself() -> None:
    curves = [Curve("a<b", [(0, 1.0), (10, -3.0), (20, float("nan"))]), Curve("c", [(0, 2.0)], [(1.0, 3.0)])]
    figure = ElementTree.fromstring(chart("x & y", curves))
    svg = figure.find("svg")
    assert svg is not None
    assert svg.get("aria-label") == "x & y: a<b from 1 to -3; c from 2 to 2"
    assert len(svg.findall("polyline")) == 2
    assert len(svg.findall("polygon")) == 1


def test_nothing_finite_is_no_chart() -> None:
    assert chart("x", [Curve("a", [(0, float("nan"))])]) == ""
