"""Reads a page of metrics with Prometheus's own parser and prints its samples as JSON."""
import json
import sys

from prometheus_client.parser import text_string_to_metric_families

families = list(text_string_to_metric_families(sys.stdin.read()))
names = [family.name for family in families]
assert len(names) == len(set(names)), "a metric in two places"
for family in families:
    assert family.documentation, f"{family.name} is not explained"
    assert family.type in ("counter", "gauge", "summary"), f"{family.name} is of type {family.type}"
samples = [
    {"name": sample.name, "labels": sample.labels, "value": sample.value}
    for family in families
    for sample in family.samples
]
keys = [json.dumps([sample["name"], sample["labels"]], sort_keys=True) for sample in samples]
assert len(keys) == len(set(keys)), "a sample twice"
json.dump(samples, sys.stdout)
