"""Statistics of predictions alone: intervals, verdicts, labels saved, and patients needed.

`cells` reads the predictions, `resampling` draws patients, `intervals` makes of resamples and seeds
what can be said; `estimates`, `comparisons` (with the verdicts of `families`), `label_efficiency`
(with `learning_curves`) and `power` are the tables of a study.
"""

from medssl.evaluation.statistics.comparisons import compare
from medssl.evaluation.statistics.estimates import estimate
from medssl.evaluation.statistics.families import holm
from medssl.evaluation.statistics.label_efficiency import labels_saved
from medssl.evaluation.statistics.learning_curves import learning_curves
from medssl.evaluation.statistics.power import power
from medssl.evaluation.statistics.resampling import draw_resamples, expanded_interval

__all__ = [
    "compare",
    "draw_resamples",
    "estimate",
    "expanded_interval",
    "holm",
    "labels_saved",
    "learning_curves",
    "power",
]
