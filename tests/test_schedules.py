"""Schedules: closed forms, and those of torch."""

import pytest
import torch

import schedules


def test_multistep_falls_at_99_and_104_of_110_epochs():
    schedule = schedules.SCHEDULES["multistep"](0.1, 0.0, 0.4)
    epochs = {0: 0.1, 98.99: 0.1, 99: 0.01, 103.99: 0.01, 104: 0.001, 109.99: 0.001}
    assert [schedule(epoch / 110) for epoch in epochs] == pytest.approx(list(epochs.values()))


def test_cyclic_is_a_triangle():
    schedule = schedules.SCHEDULES["cyclic"](0.2, 0.02, 0.25)
    points = {0.0: 0.02, 0.125: 0.11, 0.25: 0.2, 0.625: 0.11, 1.0: 0.02}
    assert [schedule(t) for t in points] == pytest.approx(list(points.values()))


def test_one_cycle_is_the_one_of_torch():
    steps, lr, rise = 101, 0.3, 0.3
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=(rise * (steps - 1) + 1) / steps
    )
    ours = schedules.SCHEDULES["onecycle"](lr, lr / 25 / 1e4, rise)
    for step in range(steps):
        assert ours(step / (steps - 1)) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        theirs.step() if step + 1 < steps else None


def test_stages_are_as_equal_as_epochs_allow():
    def stages(*values, epochs):
        return [schedules.stage(values, epoch, epochs) for epoch in range(1, epochs + 1)]

    assert stages(16, 24, 32, epochs=6) == [16, 16, 24, 24, 32, 32]
    assert stages(16, 24, 32, epochs=8) == [16, 16, 16, 24, 24, 24, 32, 32]
    assert stages(16, 24, 32, epochs=2) == [16, 24] and stages(32, epochs=3) == [32] * 3
    assert all(
        stages(16, 32, epochs=n) == [16] * (n - n // 2) + [32] * (n // 2) for n in range(2, 200)
    )


def test_cosine_and_constant_and_line():
    schedule = schedules.SCHEDULES["cosine"](0.1, 0.01, 0.4)
    assert [schedule(t) for t in (0, 0.5, 1)] == pytest.approx([0.1, 0.055, 0.01])
    assert schedules.SCHEDULES["constant"](0.1, 0.0, 0.4)(0.7) == 0.1
    assert [schedules.line(4, 1)(t) for t in (0, 0.5, 1)] == [4, 2.5, 1]
    assert [schedules.ramp(t, 0.1) for t in (0, 0.05, 0.1, 1)] == [0, 0.5, 1, 1]
    assert schedules.ramp(0, 0) == 1  # no warm-up
