"""The only room that knows BPF exists: bytes and counters come out, nothing goes in but settings."""
