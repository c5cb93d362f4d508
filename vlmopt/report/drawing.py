"""Drawings of graphs as SVG, as Graphviz text and as pages."""

from __future__ import annotations

from vlmopt.report.pictures.dot import drawing_dot, drawings_dot
from vlmopt.report.pictures.graph_svg import drawing_svg, drawings_svg
from vlmopt.report.pictures.page import drawings_page

__all__ = ["drawing_dot", "drawing_svg", "drawings_dot", "drawings_page", "drawings_svg"]
