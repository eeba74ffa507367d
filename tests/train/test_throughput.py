"""Tokens per second, MFU and time left, by a fake clock."""

import pytest

from llmtrain.train.throughput import PEAK_FLOPS, Throughput, peak_flops


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rate_counts_training_time_only() -> None:
    clock = Clock()
    meter = Throughput(flops_per_token=6e9, devices=2, peak=1e15, clock=clock)
    meter.start()
    clock.now += 4.0
    meter.add(8000)
    meter.pause()
    clock.now += 100.0
    meter.start()
    clock.now += 1.0
    meter.add(2000)
    rate, mfu, seconds = meter.read()
    assert rate == pytest.approx(2000.0)
    assert seconds == pytest.approx(5.0)
    assert mfu == pytest.approx(2000.0 * 6e9 / 2e15)
    assert meter.eta_seconds(10_000) == pytest.approx(5.0)


def test_read_starts_a_new_window_and_the_clock_goes_on() -> None:
    clock = Clock()
    meter = Throughput(1.0, 1, None, clock)
    meter.start()
    clock.now += 1.0
    meter.add(10)
    assert meter.read()[0] == pytest.approx(10.0)
    clock.now += 2.0
    meter.add(10)
    rate, mfu, _ = meter.read()
    assert rate == pytest.approx(5.0)
    assert mfu is None


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA H20", 148),
    ],
)
def test_peaks_by_device_name(name: str, tflops: float) -> None:
    assert peak_flops(name) == pytest.approx(tflops * 1e12)


def test_unknown_device_has_no_peak() -> None:
    assert peak_flops("Quantum Abacus 9000") is None


def test_no_key_is_hidden_by_an_earlier_one() -> None:
    for key, peak in PEAK_FLOPS:
        assert peak_flops(f"NVIDIA {key}") == peak, key
