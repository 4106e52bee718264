"""What `/metrics` says is what Prometheus' own parser reads."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from diptych.serving.metrics import HELP, Metrics
from serving_process import Running


def test_numbers_are_read_back_as_they_were_counted() -> None:
    metrics = Metrics()
    for name, text in HELP.items():
        if text.startswith("counter"):
            metrics.count(name, 12_345_678)
    metrics.count("diptych_requests_total", 3, 'path="/v1/models",status="200"')
    metrics.seconds("draw", 0.1234567891)
    metrics.rounds(0.5, running=2, waiting=1)
    families = {family.name: family for family in text_string_to_metric_families(metrics.text())}
    for name, text in HELP.items():
        kind, _, words = text.partition(" ")
        if name in ("diptych_device_memory_bytes", "diptych_decoder_rows_last"):
            continue
        family = families[name.removesuffix("_total") if kind == "counter" else name]
        assert (family.type, family.documentation) == (kind, words)
    values = {(s.name, *s.labels.values()): s.value for family in families.values() for s in family.samples}
    assert values["diptych_requests_total", "/v1/models", "200"] == 3
    assert values["diptych_phase_seconds_total", "draw"] == 0.1234567891
    assert values["diptych_images_total",] == 12_345_678
    assert values["diptych_running",] == 2
    assert values["diptych_memory_bytes",] > 1e7


def test_a_server_names_the_kind_of_all_its_numbers(server: Running) -> None:
    with urllib.request.urlopen(f"{server.address}/health", timeout=60):
        pass
    with urllib.request.urlopen(f"{server.address}/metrics", timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        families = list(text_string_to_metric_families(answer.read().decode()))
    assert {family.type for family in families} == {"counter", "gauge"}
    assert all(family.documentation and family.name.startswith("diptych_") for family in families)
    (requests,) = [family for family in families if family.name == "diptych_requests"]
    assert any(sample.labels == {"path": "/health", "status": "200"} for sample in requests.samples)
