"""The benchmark of a GPU, rehearsed on a CPU at a tiny size, as it is called on a machine with little installed."""

import json
import subprocess
import sys

import pytest

from labelaug.paths import PROJECT


def test_every_part_is_measured_kept_and_told(tmp_path):
    out = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--width", "2", "-n", "40", "--batch", "16", "--size", "64", "--out", out]
    done = subprocess.run(
        [sys.executable, PROJECT / "benchmarks" / "gpu.py", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["device"].startswith("CPU") and record["versions"]["torch"]
    agreement, peak, speed, kernels = record["parts"]
    assert 0 < agreement["cpu_float64_loss"] < 1e-4 and 0 < agreement["cpu_float64_weights"] < 0.2
    # Here the device is the CPU itself: the very same bits in float32, and bfloat16's own rounding.
    assert agreement["float32_loss"] == agreement["float32_weights"] == 0
    assert agreement["cpu_float64_loss"] < agreement["bfloat16_loss"] < 0.05
    assert peak["tflops"] > 0 and speed["n"] == 32 and sum(kernels["seconds"].values()) > 0
    speeds = [speed[f"{way}_images_per_s"] for way in ("trainer", "plain_loop", "alone")]
    assert min(speeds) > 0
    flops = 3 * 2 * _forward_multiply_adds(width=2) * speeds[0]
    assert speed["share_of_peak"] == pytest.approx(flops / (peak["tflops"] * 1e12), rel=1e-9)
    assert len(done.stdout.splitlines()) == 4 and f"{speeds[0]:,.0f} images/s" in done.stdout


def _forward_multiply_adds(width: int) -> int:
    """Of ResNet-18 on 32×32 images and ten classes, layer by layer."""
    total, side, fan_in = 3 * width * 9 * 32**2, 32, width
    for stage in range(4):
        fan_out = width * 2**stage
        side = 32 // 2**stage
        total += (fan_in * fan_out + 3 * fan_out**2) * 9 * side**2
        total += fan_in * fan_out * side**2 if stage else 0
        fan_in = fan_out
    return total + fan_in * 10
