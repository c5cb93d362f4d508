"""How graphs and branches become pictures: ranks, places, SVG, Graphviz text and pages."""
