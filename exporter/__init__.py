"""ebfw: tells what every workload on a node sends out, as OpenTelemetry, Prometheus, text and JSON."""

__version__ = "0.1.0"
