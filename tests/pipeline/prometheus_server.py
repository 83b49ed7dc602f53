"""A real Prometheus 3: examples/prometheus.yaml, but for the target's port and the interval; and promtool.

Comes in: the built programs (scripts/tools), a directory, the port that the scraped agent will listen on. Goes out:
answers of its HTTP API. Not its job: judging them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from lab.tools import tool
from tests.pipeline.collector import EXAMPLES, START_SECONDS, free_ports


class Series(NamedTuple):
    labels: dict[str, str]
    value: float
    time: float

    @property
    def name(self) -> str:
        return self.labels["__name__"]


class PrometheusServer:
    """A context manager. `target` is the address that it scrapes; `otlp` the URL to push metrics to."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        scraped, listens = free_ports(2)
        self.target, self.url = f"127.0.0.1:{scraped}", f"http://127.0.0.1:{listens}"
        self.otlp = f"{self.url}/api/v1/otlp"
        config = (EXAMPLES / "prometheus.yaml").read_text()
        for documented, here in (
            ("127.0.0.1:9090]", f"{self.target}]"),
            ("scrape_interval: 15s", "scrape_interval: 1s"),
        ):
            assert config.count(documented) == 1
            config = config.replace(documented, here)
        self._config = directory / "prometheus.yaml"
        self._config.write_text(config)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PrometheusServer:
        log = self.directory / "prometheus.log"
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [
                    tool("prometheus"), f"--config.file={self._config}", f"--storage.tsdb.path={self.directory}/data",
                    f"--web.listen-address={self.url.removeprefix('http://')}", "--web.enable-otlp-receiver",
                    "--enable-feature=exemplar-storage",
                ],
                cwd=self.directory, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                env={key: text for key, text in os.environ.items() if not key.lower().endswith("_proxy")},
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/-/ready", timeout=5).close()
                return self
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.__exit__()
                    raise AssertionError(f"Prometheus did not start:\n{log.read_text()[-3000:]}") from None
                time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _api(self, path: str, **parameters: str) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{url}: {error.read().decode()}") from None

    def query(self, text: str) -> list[Series]:
        """The newest samples that match a PromQL expression."""
        rows = self._api("query", query=text)["result"]
        return [Series(row["metric"], float(row["value"][1]), float(row["value"][0])) for row in rows]

    def exemplars(self, text: str, seconds: float = 600) -> list[tuple[dict[str, str], dict[str, Any]]]:
        """(labels of the series, exemplar) for each exemplar of the last `seconds`."""
        now = time.time()
        rows = self._api("query_exemplars", query=text, start=str(now - seconds), end=str(now + 5))
        return [(row["seriesLabels"], exemplar) for row in rows for exemplar in row["exemplars"]]

    def metadata(self) -> dict[str, list[dict[str, str]]]:
        """What scraped targets say of each metric: type, help, unit."""
        found: dict[str, list[dict[str, str]]] = self._api("metadata")
        return found


def promtool(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run((str(tool("promtool")), *arguments), input=text, capture_output=True, text=True, timeout=60)
