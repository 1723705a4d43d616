#!/usr/bin/env python3
"""select_cases.py KIND...: prints the folders of the cases whose config.yaml holds only these kinds."""
import pathlib, sys
import yaml

here = pathlib.Path(__file__).resolve().parent
for case in sorted((here / "cases").iterdir()):
    with open(case / "config.yaml") as f:
        kinds = {doc["kind"] for doc in yaml.safe_load_all(f) if doc}
    if kinds <= set(sys.argv[1:]):
        print(case)
