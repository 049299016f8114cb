"""All charts that some results have data for, in the order in which a page shows them.

Each chart is drawn in the room of its question: accuracy.py, layers.py, memory.py,
predictions.py, speed.py, contexts.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from qquant.charts.accuracy import pareto_charts, task_charts
from qquant.charts.contexts import context_charts
from qquant.charts.layers import layer_charts
from qquant.charts.memory import memory_charts, parts_charts
from qquant.charts.predictions import prediction_charts
from qquant.charts.speed import speed_charts
from qquant.charts.svg import Chart
from qquant.results import Result


def charts(results: Sequence[Result]) -> list[Chart]:
    """Draw every chart that there is data for.

    Args:
        results: read, never written; their places give the charts' anchors their numbers.

    Returns:
        Charts in reading order: what it costs, where, what it saves, how fast. All ids of all charts differ.
    """
    drawers = (
        pareto_charts,
        task_charts,
        layer_charts,
        memory_charts,
        parts_charts,
        prediction_charts,
        speed_charts,
        context_charts,
    )
    return [chart for draw in drawers for chart in draw(results)]
