"""Reads what prepare.py made, and prints how well a runtime's maps agree with it."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def measure(runtime: str, run: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], repeat: int = 5) -> None:
    """Run the model of the folder sys.argv[1] and print its time and the error of each map.

    Args:
        runtime: its name and version.
        run: inputs by name to outputs by name.
        repeat: how often it runs after the first time; the median counts.
    """
    work = Path(sys.argv[1])
    about = json.loads((work / "about.json").read_text())
    image = np.fromfile(work / "input.f32", "<f4").reshape(about["input"]["shape"])
    feeds = {about["input"]["name"]: image, "targets": np.array([[-1]], np.int64)}
    times = []
    for _ in range(1 + repeat):
        begun = time.perf_counter()
        outputs = run(feeds)
        times.append(time.perf_counter() - begun)
    print(f"{runtime}: {np.median(times[1:] or times) * 1e3:.0f} ms")
    for name, shape in about["maps"].items():
        expected = np.fromfile(work / "expected" / f"{name}.f32", "<f4").reshape(shape)
        # Relative to the map itself: maps of early layers are small, and an absolute difference would hide an error.
        error = np.linalg.norm(outputs[name] - expected) / np.linalg.norm(expected)
        print(f"  {name} {'x'.join(map(str, shape))}: relative error {error:.1e}")
