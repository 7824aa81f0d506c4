"""Train the clinic's patients, a minute each, and write down their charts: `python data/clinic.py` → clinic.json.

A patient is the trainer of `minillama/course/clinic.py` with one of its eight parts broken.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

from minillama.course.chapters.clinic import BROKEN, HEALTHY, PATIENTS
from minillama.course.clinic import train

CHARTS = Path(__file__).with_name("clinic.json")


def rounded(value: Any) -> Any:
    """Numbers to five digits: more is not to be seen in a chart."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def main() -> None:
    torch.set_num_threads(1)  # one is faster than two that wait for each other
    charts = {"healthy": train(HEALTHY)}
    for patient, (fault, copies) in PATIENTS.items():
        print(patient)
        charts[patient] = train({**HEALTHY, fault: BROKEN[fault]}, copies)
    unfinished = CHARTS.with_suffix(".tmp")
    lines = [f"{json.dumps(name)}: {json.dumps(chart, ensure_ascii=False)}" for name, chart in rounded(charts).items()]
    unfinished.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    os.replace(unfinished, CHARTS)


if __name__ == "__main__":
    main()
