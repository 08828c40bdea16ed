"""The benchmark's arithmetic and its command line; figures are its own business."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch import bench


def test_bench_exact_takes_the_median_of_ratios_within_a_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"w1-m0-0": 100.0, "w1-m0-1": 50.0, "w1-m0-2": 90.0, "w1-m8-0": 80.0, "w1-m8-1": 50.0, "w1-m8-2": 60.0}
    monkeypatch.setattr(bench, "images_per_second", lambda place, name, *cell: speeds.get(name, 70.0))
    rows = {(row["world_size"], row["micro_batches"]): row for row in bench.measure(3)}
    assert len(rows) == 5 + 4  # two processes cannot share one micro-batch
    assert rows[1, 8]["slower"] == pytest.approx(0.25)  # of 1.25, 1.00 and 1.50
    assert rows[1, 8]["images_per_second"] == {"median": 60.0, "min": 50.0, "max": 80.0}
    text = bench.table(list(rows.values()), bench.facts(3))
    assert "| 1 | exact, 8 x 64 | 60 (50 to 80) | +25.0% |" in text
    assert "n = 3" in text
    json.dumps(list(rows.values()))


def test_bench_measures_a_real_run(tmp_path: Path) -> None:
    assert 50 < bench.images_per_second(tmp_path, "run", 2, 2) < 1e6


def test_bench_refuses_bad_options() -> None:
    for options in (["exact", "--repeats", "0"], ["nothing"]):
        done = subprocess.run([sys.executable, "-m", "launch", "bench", *options], capture_output=True, text=True)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
