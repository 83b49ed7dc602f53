"""The table of OTEL_* variables, row by row (D18): each does what it says; a mistake warns and falls back.

Excluded: what arrives at a receiver because of them (test_otlp.py, and the real Collector's tests).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.emit.otlp_settings import VARIABLES, Batch, Endpoint, Limits, Settings, load
from exporter.emit.resource import Resources
from exporter.emit.sampling import Sampler
from exporter.errors import SettingsError
from exporter.settings import load as load_all

BASE = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318"}
SIGNALS = ("traces", "metrics", "logs")
CA = str(Path(__file__))  # any file that is there


def endpoints(settings: Settings) -> dict[str, Endpoint]:
    return {endpoint.signal: endpoint for endpoint in settings.endpoints}


# variable -> a value, and what it makes of the settings
ROWS: dict[str, tuple[str, Callable[[Settings], Any], Any]] = {
    "OTEL_SDK_DISABLED": ("TRUE", lambda s: s.endpoints, ()),
    "OTEL_TRACES_EXPORTER": ("none", lambda s: sorted(endpoints(s)), ["logs", "metrics"]),
    "OTEL_METRICS_EXPORTER": ("prometheus", lambda s: sorted(endpoints(s)), ["logs", "traces"]),
    "OTEL_LOGS_EXPORTER": ("console", lambda s: (s.logs.url, s.logs.console), ("", True)),
    "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": ("LowMemory", lambda s: (s.delta, s.lowmemory), (True, True)),
    "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION": (
        "base2_exponential_bucket_histogram", lambda s: s.exponential, True,
    ),
    "OTEL_METRIC_EXPORT_INTERVAL": ("5000", lambda s: s.interval, 5.0),
    "OTEL_METRIC_EXPORT_TIMEOUT": ("2000", lambda s: (s.metrics.timeout, s.logs.timeout), (2.0, 10.0)),
    "OTEL_METRICS_EXEMPLAR_FILTER": ("always_off", lambda s: s.exemplars, "always_off"),
    "OTEL_TRACES_SAMPLER": ("parentbased_always_off", lambda s: s.sampler, Sampler(0.0, True)),
    "OTEL_TRACES_SAMPLER_ARG": ("0.25", lambda s: s.sampler, Sampler(0.25, False)),
    "OTEL_BSP_SCHEDULE_DELAY": ("100", lambda s: s.spans, Batch(2048, 512, 0.1)),
    "OTEL_BSP_EXPORT_TIMEOUT": ("2000", lambda s: (s.traces.timeout, s.logs.timeout), (2.0, 10.0)),
    "OTEL_BSP_MAX_QUEUE_SIZE": ("100", lambda s: s.spans, Batch(100, 100, 5.0)),
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": ("7", lambda s: s.spans, Batch(2048, 7, 5.0)),
    "OTEL_BLRP_SCHEDULE_DELAY": ("100", lambda s: s.records, Batch(2048, 512, 0.1)),
    "OTEL_BLRP_EXPORT_TIMEOUT": ("2000", lambda s: (s.logs.timeout, s.traces.timeout), (2.0, 10.0)),
    "OTEL_BLRP_MAX_QUEUE_SIZE": ("9000", lambda s: s.records, Batch(9000, 512, 1.0)),
    "OTEL_BLRP_MAX_EXPORT_BATCH_SIZE": ("7", lambda s: s.records, Batch(2048, 7, 1.0)),
    "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT": (
        "50", lambda s: (s.span_limits, s.record_limits), (Limits(50, 128), Limits(50, 128)),
    ),
    "OTEL_ATTRIBUTE_COUNT_LIMIT": ("9", lambda s: (s.span_limits, s.record_limits), (Limits(None, 9),) * 2),
    "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT": (
        "50", lambda s: (s.span_limits, s.record_limits), (Limits(50), Limits()),
    ),
    "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": ("9", lambda s: (s.span_limits, s.record_limits), (Limits(None, 9), Limits())),
    "OTEL_LOGRECORD_ATTRIBUTE_VALUE_LENGTH_LIMIT": (
        "50", lambda s: (s.span_limits, s.record_limits), (Limits(), Limits(50)),
    ),
    "OTEL_LOGRECORD_ATTRIBUTE_COUNT_LIMIT": (
        "9", lambda s: (s.span_limits, s.record_limits), (Limits(), Limits(None, 9)),
    ),
}  # fmt: skip
ALSO = {"OTEL_TRACES_SAMPLER_ARG": {"OTEL_TRACES_SAMPLER": "traceidratio"}}

# the last words of a variable of the exporters -> a value, and what it makes of an endpoint
EXPORTER: dict[str, tuple[str, Callable[[Endpoint], Any], Any]] = {
    "ENDPOINT": ("https://b:1/base/", lambda e: e.url.startswith("https://b:1/base/"), True),
    "PROTOCOL": ("grpc", lambda e: e.protocol, "grpc"),
    "HEADERS": ("Authorization=Bearer%20x, y = z", lambda e: e.headers, {"authorization": "Bearer x", "y": "z"}),
    "TIMEOUT": ("2500", lambda e: e.timeout, 2.5),
    "COMPRESSION": ("gzip", lambda e: e.compression, "gzip"),
    "CERTIFICATE": (CA, lambda e: e.certificate, CA),
    "CLIENT_KEY": (CA, lambda e: e.client_key, CA),
    "CLIENT_CERTIFICATE": (CA, lambda e: e.client_certificate, CA),
    "INSECURE": ("true", lambda e: e.insecure, True),
}
ELSEWHERE = {
    "OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_INSTRUMENTATION_HTTP_CLIENT_CAPTURE_REQUEST_HEADERS",
}  # fmt: skip


def test_d18_every_row_of_the_table_has_a_test_here() -> None:
    table = {variable.name for variable in VARIABLES}
    assert table == set(ROWS) | {f"OTEL_EXPORTER_OTLP_{last}" for last in EXPORTER} | ELSEWHERE
    assert {variable.name for variable in VARIABLES if variable.per_signal} == {
        f"OTEL_EXPORTER_OTLP_{last}" for last in EXPORTER
    }


@pytest.mark.parametrize("name", ROWS)
def test_d18_a_variable_does_what_the_table_says(name: str, caplog: pytest.LogCaptureFixture) -> None:
    value, read, expected = ROWS[name]
    made = load(BASE | ALSO.get(name, {}) | {name: f" {value} "})
    assert read(made) == expected
    assert caplog.text == ""
    assert load(BASE | {name: "  "}) == load(BASE)  # empty is not set


@pytest.mark.parametrize("last", EXPORTER)
def test_d18_a_variable_of_the_exporters_holds_for_all_signals_or_one(
    last: str, caplog: pytest.LogCaptureFixture
) -> None:
    value, read, expected = EXPORTER[last]
    default = load(BASE)
    for endpoint in endpoints(load(BASE | {f"OTEL_EXPORTER_OTLP_{last}": value})).values():
        assert read(endpoint) == expected
    for signal in SIGNALS:
        made = endpoints(load(BASE | {f"OTEL_EXPORTER_OTLP_{signal.upper()}_{last}": value}))
        for other in SIGNALS:
            assert (read(made[other]) == expected) == (other == signal)
            if other != signal:
                assert made[other] == endpoints(default)[other]
    assert caplog.text == ""


def test_d18_variables_that_other_modules_read() -> None:
    resources = Resources("h", environ={"OTEL_SERVICE_NAME": "mine", "OTEL_RESOURCE_ATTRIBUTES": "a.b=c"})
    assert {("service.name", "mine"), ("a.b", "c")} <= set(resources.agent.attributes)
    name = "OTEL_INSTRUMENTATION_HTTP_CLIENT_CAPTURE_REQUEST_HEADERS"
    assert load_all(None, {name: "X-Team, x-b", "EBFW_HTTP_HEADERS": "C"}).allowed_headers == {"x-team", "x-b", "c"}


def test_d18_variables_of_one_signal_win() -> None:
    made = endpoints(
        load(
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318/base/",
                "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": "https://b/own/path",
                "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "grpc",
                "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "2500",
                "OTEL_EXPORTER_OTLP_TIMEOUT": "3",
                "OTEL_EXPORTER_OTLP_HEADERS": "a=1",
                "OTEL_EXPORTER_OTLP_LOGS_HEADERS": "b=2",
            }
        )
    )
    assert (made["traces"].url, made["traces"].timeout) == ("http://a:4318/base/v1/traces", 2.5)
    assert (made["metrics"].url, made["metrics"].timeout) == ("http://a:4318/base/", 3)
    assert made["logs"].url == "https://b/own/path"
    assert (made["logs"].headers, made["traces"].headers) == ({"b": "2"}, {"a": "1"})


@pytest.mark.parametrize(
    ("key", "value", "told", "read", "expected"),
    [
        ("OTEL_SDK_DISABLED", "yes", "false is used", lambda s: len(s.endpoints), 3),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "/protobuf is used", lambda s: s.logs.protocol, "http/protobuf"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon", "10 seconds are used", lambda s: s.logs.timeout, 10.0),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd", "none is used", lambda s: s.logs.compression, "none"),
        ("OTEL_EXPORTER_OTLP_INSECURE", "yes", "true or false", lambda s: s.logs.insecure, None),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere.pem", "cannot be read", lambda s: s.logs.certificate, ""),
        ("OTEL_EXPORTER_OTLP_HEADERS", "rubbish", "not key=value", lambda s: s.logs.headers, {}),
        ("OTEL_METRIC_EXPORT_INTERVAL", "-5", "60000 is used", lambda s: s.interval, 60.0),
        ("OTEL_METRIC_EXPORT_TIMEOUT", "x", "30000 is used", lambda s: s.metrics.timeout, 10.0),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "many", "2048 is used", lambda s: s.spans.queue, 2048),
        ("OTEL_BLRP_SCHEDULE_DELAY", "0", "1000 is used", lambda s: s.records.delay, 1.0),
        ("OTEL_TRACES_SAMPLER", "xray", "EBFW_SPANS_PER_SECOND", lambda s: s.sampler, Sampler()),
        ("OTEL_TRACES_SAMPLER_ARG", "2", "1 is used", lambda s: s.sampler, Sampler(1.0)),
        ("OTEL_TRACES_EXPORTER", "zipkin", "otlp, console or none", lambda s: s.traces.url, "http://a:4318/v1/traces"),
        ("OTEL_LOGS_EXPORTER", "prometheus", "otlp, console or none", lambda s: s.logs.console, False),
        (
            "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "both", "cumulative is used",
            lambda s: s.temporality, "cumulative",
        ),
        (
            "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION", "summary", "explicit_bucket_histogram is used",
            lambda s: s.exponential, False,
        ),
        ("OTEL_METRICS_EXEMPLAR_FILTER", "some", "trace_based is used", lambda s: s.exemplars, "trace_based"),
        ("OTEL_ATTRIBUTE_COUNT_LIMIT", "0", "128 is used", lambda s: s.span_limits, Limits()),
        ("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "-1", "a number from 0", lambda s: s.span_limits, Limits()),
    ],
)  # fmt: skip
def test_d18_a_mistake_warns_and_falls_back(
    key: str, value: str, told: str, read: Callable[[Settings], Any], expected: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made = load(BASE | ALSO.get(key, {}) | {key: value})
    assert read(made) == expected
    assert told in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * len(caplog.records)


@pytest.mark.parametrize(
    ("given", "used"), [("banana", "banana"), ("u:canary@banana:1", "banana:1"), ("ftp://banana", "banana")]
)
def test_d18_an_endpoint_without_http_says_what_is_used(
    given: str, used: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = load({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": given})
    assert made.traces is not None
    assert made.traces.url.rpartition("@")[2].removeprefix("http://") == used
    assert made.traces.url.startswith("http://")
    (record,) = caplog.records
    assert record.message == f"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT={used} is no URL of HTTP; http://{used} is used"


def test_d18_what_is_not_supported_warns_and_a_service_called_otel_does_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    load({
        "OTEL_SPAN_EVENT_COUNT_LIMIT": "1", "OTEL_EXPORTER_ZIPKIN_ENDPOINT": "http://u:canary@z",
        "OTEL_COLLECTOR_SERVICE_HOST": "10.0.0.1", "OTEL_COLLECTOR_PORT_4317_TCP": "tcp://10.0.0.1:4317",
        "OTEL_COLLECTOR_PORT": "tcp://10.0.0.1:4317", "PATH": "x",
    })  # fmt: skip
    assert [record.message for record in caplog.records] == [
        "OTEL_EXPORTER_ZIPKIN_ENDPOINT is not supported and has no effect",
        "OTEL_SPAN_EVENT_COUNT_LIMIT is not supported and has no effect",
    ]


def test_d18_a_mistake_in_our_own_variables_fails() -> None:
    for name, value in (("EBFW_INSTRUMENTED", "perhaps"), ("EBFW_SLOW_CONNECTION_MS", "0"),
                        ("EBFW_CONNECTION_SPANS", "some"), ("EBFW_HTTP_HEADERS", "a b")):  # fmt: skip
        with pytest.raises(SettingsError, match=name):
            load_all(None, {name: value})


def test_d10_nothing_is_pushed_until_an_endpoint_is_set(caplog: pytest.LogCaptureFixture) -> None:
    assert load({}).endpoints == ()
    assert caplog.text == ""
    assert load({"OTEL_TRACES_EXPORTER": "otlp"}).endpoints == ()
    assert "no endpoint is set" in caplog.text


def test_d8_no_secret_of_the_variables_is_told(caplog: pytest.LogCaptureFixture) -> None:
    made = load({
        "OTEL_EXPORTER_OTLP_ENDPOINT": "user:canary@host:4318",
        "OTEL_EXPORTER_OTLP_HEADERS": "a=canary,canary,b@=canary",
    })  # fmt: skip
    assert "canary" not in caplog.text
    assert "canary" not in repr([endpoint.headers is not None and endpoint.mixed_up() for endpoint in made.endpoints])


@pytest.mark.parametrize(
    ("url", "protocol", "other"),
    [
        ("http://127.0.0.1:4317", "http/protobuf", "grpc"),
        ("collector:4318", "grpc", "http/protobuf"),
        ("http://collector:4318", "grpc", "http/protobuf"),
    ],
)
def test_d19_a_port_of_the_other_protocol_is_one_sentence(url: str, protocol: str, other: str) -> None:
    made = load({"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol})
    assert made.traces is not None
    assert f"OTEL_EXPORTER_OTLP_PROTOCOL={other}" in made.traces.mix_up
    right = load({"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_EXPORTER_OTLP_PROTOCOL": other})
    assert right.traces is not None
    assert right.traces.mix_up == ""
