"""All observers by name."""

from __future__ import annotations

from collections.abc import Mapping

from qatkit.observers.estimators import (
    estimate_channel_mean,
    estimate_fixed,
    estimate_lsq,
    estimate_minmax,
    estimate_shrink,
    estimate_sigma,
)
from qatkit.observers.memory import (
    average_weight,
    blending,
    cumulative_weight,
    moving_weight,
    remember_extremes,
    remember_fixed,
)
from qatkit.observers.observer import Observer

_ALL = (
    Observer("shrink", estimate_shrink, blending(cumulative_weight)),
    Observer("minmax", estimate_minmax, remember_extremes),
    Observer("ema", estimate_minmax, blending(moving_weight)),
    Observer("average", estimate_minmax, blending(average_weight)),
    Observer("sigma", estimate_sigma, blending(cumulative_weight)),
    Observer("channel-mean", estimate_channel_mean, blending(cumulative_weight)),
    Observer("fixed", estimate_fixed, remember_fixed),
    Observer("lsq", estimate_lsq, blending(average_weight)),
    Observer("lsq+", estimate_minmax, blending(average_weight)),
    Observer("pact", estimate_minmax, blending(average_weight)),
    Observer("tqt", estimate_sigma, blending(average_weight)),
)

OBSERVERS: Mapping[str, Observer] = {each.name: each for each in _ALL}
