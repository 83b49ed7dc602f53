"""The ways out: text, Prometheus, OTLP. Each takes plain values and knows nothing of the kernel."""
