"""Means gathered on the device: read once, undefined metrics passed over, losses never."""

from __future__ import annotations

import math

import pytest
import torch

from medssl.training.meter import Meter


def test_a_meter_reads_the_means_once_and_starts_again():
    meter = Meter()
    assert meter.read() == {}
    for value in (1.0, 2.0, 6.0):
        meter.add({"loss": torch.tensor(value), "accuracy": torch.tensor(value / 2)})
    assert meter.read() == {"loss": 3.0, "accuracy": 1.5}
    assert meter.read() == {}


def test_a_metric_that_one_batch_leaves_undefined_is_the_mean_of_the_others():
    meter = Meter()
    for dice in (0.5, math.nan, 0.7):
        meter.add({"loss": torch.tensor(1.0), "dice": torch.tensor(dice)})
    assert meter.read() == pytest.approx({"loss": 1.0, "dice": 0.6})


def test_a_loss_that_is_not_a_number_is_never_passed_over():
    meter = Meter()
    for loss in (1.0, math.nan):
        meter.add({"loss": torch.tensor(loss)})
    assert math.isnan(meter.read()["loss"])


def test_a_meter_tells_which_losses_were_finite_until_it_is_read():
    meter = Meter()
    assert meter.finite() == []
    for loss in (1.0, math.nan, math.inf, 2.0):
        meter.add({"loss": torch.tensor(loss)})
    assert meter.finite() == [True, False, False, True]
    meter.read()
    assert meter.finite() == []
