"""Settings: every value, every mistake. What is excluded: whether the kernel can do what is asked for."""

from __future__ import annotations

import dataclasses
import ipaddress
import socket
from pathlib import Path

import pytest

from exporter.errors import SettingsError
from exporter.scope import scope_of
from exporter.settings import VARIABLES, Settings, load


def config(tmp_path: Path, text: str) -> str:
    path = tmp_path / "ebfw.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_are_the_seeds_but_for_the_address() -> None:
    settings = load(None, {})
    assert settings == Settings()
    assert settings.cgroup is None
    assert settings.metrics_addr == ("127.0.0.1", 9090)
    assert settings.node_name == socket.gethostname()
    assert settings.pin_path == Path("/sys/fs/bpf/ebfw")
    assert [str(network) for network in settings.exclude_cidrs] == [
        "127.0.0.0/8",
        "::1/128",
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "169.254.0.0/16",
        "fe80::/10",
        "fc00::/7",
    ]
    assert settings.exclude_suffixes == ("cluster.local", "svc", "local", "in-addr.arpa", "ip6.arpa")
    assert (settings.inspect_paths, settings.inspect_headers, settings.inspect_body) == (True, False, False)


def test_every_variable_sets_a_field_and_every_field_is_documented() -> None:
    fields = {field.name for field in dataclasses.fields(Settings)}
    assert {variable.field for variable in VARIABLES} <= fields
    source = Path(load.__code__.co_filename).read_text()
    for name in fields:
        assert f"    {name}: " in source
        after = source.split(f"\n    {name}: ", 1)[1].split("\n", 1)[1]
        assert after.startswith('    """'), name


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("EBFW_CGROUP", "/sys/fs/cgroup/unified/a", "cgroup", Path("/sys/fs/cgroup/unified/a")),
        ("EBFW_CGROUP", "/sys/fs/cgroup/", "cgroup", None),
        ("EBFW_INSPECT_PATHS", "Off", "inspect_paths", False),
        ("EBFW_INSPECT_HEADERS", "YES", "inspect_headers", True),
        ("EBFW_INSPECT_BODY", "1", "inspect_body", True),
        ("EBFW_OUTPUT", "JSON", "output", "json"),
        ("EBFW_METRICS_ADDR", "", "metrics_addr", None),
        ("EBFW_METRICS_ADDR", " ", "metrics_addr", None),
        ("EBFW_METRICS_ADDR", ":9090", "metrics_addr", ("", 9090)),
        ("EBFW_METRICS_ADDR", "[::1]:0", "metrics_addr", ("::1", 0)),
        ("EBFW_METRICS_ADDR", "localhost:80", "metrics_addr", ("localhost", 80)),
        ("EBFW_METRICS_TLS_CERT", "/etc/c.pem", "metrics_cert", Path("/etc/c.pem")),
        ("EBFW_METRICS_USERS", "/etc/users", "metrics_users", Path("/etc/users")),
        ("EBFW_NODE_NAME", "node-1", "node_name", "node-1"),
        ("EBFW_ENFORCE_MODE", "off", "enforce_mode", "off"),
        ("EBFW_POLICY_SOURCE", "crd", "policy_source", "crd"),
        ("EBFW_POLICY", "/etc/p.yaml", "policy", Path("/etc/p.yaml")),
        ("EBFW_ENFORCE_DRY_RUN", "true", "enforce_dry_run", True),
        ("EBFW_BPF_PIN_PATH", "/sys/fs/bpf/x", "pin_path", Path("/sys/fs/bpf/x")),
        ("EBFW_CACHE_PATH", "/tmp/c", "cache_path", Path("/tmp/c")),
        ("EBFW_CACHE_PATH", "", "cache_path", None),
        ("EBFW_SPANS_PER_SECOND", "0", "spans_per_second", 0),
        ("EBFW_LOGS", "all", "logs", "all"),
        ("EBFW_INVENTORY", "/var/lib/ebfw/i.json", "inventory", Path("/var/lib/ebfw/i.json")),
        ("EBFW_PEER_GROUPS", "/etc/g.yaml", "peer_groups", Path("/etc/g.yaml")),
        ("EBFW_FLOWS", "1024", "flows", 1024),
        ("EBFW_RING_BYTES", "8MiB", "ring_bytes", 8 << 20),
        ("EBFW_RING_BYTES", "65536", "ring_bytes", 65536),
        ("EBFW_TLS_UPROBES", "no", "uprobes", False),
        ("EBFW_PERSIST", "on", "persist", True),
        ("EBFW_QUERY_VALUES", "page, Limit,", "query_values", frozenset({"page", "limit"})),
        ("EBFW_METRICS_LEVEL", "POD", "metrics_level", "pod"),
        ("EBFW_METRICS_ATTRIBUTES", "url.scheme, url.template", "metrics_attributes", {"url.scheme", "url.template"}),
        ("EBFW_METRICS_OPT_IN", "http.client.request.body.size", "metrics_opt_in", {"http.client.request.body.size"}),
        ("EBFW_ROUTES", "/users/{id}/*, /,", "routes", ("/users/{id}/*", "/")),
        ("EBFW_LOG_LEVEL", "debug", "log_level", "debug"),
    ],
)
def test_variable(name: str, text: str, field: str, value: object) -> None:
    assert getattr(load(None, {name: text}), field) == value


def test_d9_a_key_goes_with_a_certificate() -> None:
    with pytest.raises(SettingsError, match="EBFW_METRICS_TLS_KEY is set without EBFW_METRICS_TLS_CERT"):
        load(None, {"EBFW_METRICS_TLS_KEY": "/etc/k.pem"})
    both = load(None, {"EBFW_METRICS_TLS_KEY": "/etc/k.pem", "EBFW_METRICS_TLS_CERT": "/etc/c.pem"})
    assert both.metrics_key == Path("/etc/k.pem")


def test_set_but_empty_is_not_set() -> None:
    means_something = {"EBFW_CGROUP", "EBFW_METRICS_ADDR", "EBFW_CACHE_PATH"}
    environ = {variable.name: "" for variable in VARIABLES if variable.name not in means_something}
    assert load(None, environ | {"EBFW_CONFIG": ""}) == Settings()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("EBFW_INSPECT_PATHS", "maybe", "true or false"),
        ("EBFW_OUTPUT", "xml", "text, json or none"),
        ("EBFW_METRICS_ADDR", "9090", ":9090"),
        ("EBFW_METRICS_ADDR", "::1:9090", "brackets"),
        ("EBFW_METRICS_ADDR", "h:65536", "0 to 65535"),
        ("EBFW_METRICS_ADDR", "http://h:1", "scheme"),
        ("EBFW_METRICS_ADDR", "[::zz]:1", "zz"),
        ("EBFW_CGROUP", "unified/a", "absolute"),
        ("EBFW_CGROUP", "", "leave it out to watch the whole host"),
        ("EBFW_CGROUP", " ", "leave it out to watch the whole host"),
        ("EBFW_BPF_PIN_PATH", "/sys/fs/bpf/../x", "without .."),
        ("EBFW_SPANS_PER_SECOND", "-1", "whole number"),
        ("EBFW_SPANS_PER_SECOND", "\u0661", "whole number"),
        ("EBFW_FLOWS", "65000", "for instance 65536"),
        ("EBFW_FLOWS", "512", "for instance 1024"),
        ("EBFW_FLOWS", "2097152", "for instance 1048576"),
        ("EBFW_FLOWS", "0", "for instance 1024"),
        ("EBFW_RING_BYTES", "lots", "4MiB"),
        ("EBFW_LOGS", "none", "notable or all"),
        ("EBFW_ENFORCE_MODE", "log", "not in this version"),
        ("EBFW_ENFORCE_MODE", "enforce", "not in this version"),
        ("EBFW_ENFORCE_MODE", "of", "off, log or enforce"),
        ("EBFW_POLICY_SOURCE", "http", "file or crd"),
        ("EBFW_NODE_NAME", "a\nb", "printable"),
        ("EBFW_QUERY_VALUES", "a b", "commas"),
        ("EBFW_QUERY_VALUES", "a&b", "without any of &"),
        ("EBFW_HTTP_HEADERS", "Foo Bar", "a name has no blanks"),
        ("EBFW_METRICS_LEVEL", "node", "workload or pod"),
        ("EBFW_METRICS_ATTRIBUTES", "a b", "commas"),
        *[("EBFW_ROUTES", f"/fine,{text}", "/users/{id}/*") for text in ("users", "/a b", "/a?b", "/a//b", "/a#b")],
    ],
)
def test_wrong_value_names_the_variable(name: str, text: str, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(None, {name: text})
    assert name in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("EBFW_METRIC_ADDR", "EBFW_METRICS_ADDR"),
        ("EBFW_INSPECTPATHS", "EBFW_INSPECT_PATHS"),
        ("EBFW_XYZZY", ""),
    ],
)
def test_unknown_variable_suggests_the_near_one(name: str, near: str) -> None:
    with pytest.raises(SettingsError, match=name) as caught:
        load(None, {name: "1"})
    text = str(caught.value)
    assert (f"did you mean {near}?" in text) if near else ("did you mean" not in text)


@pytest.mark.parametrize(
    "name",
    [
        "EBFW_SERVICE_HOST",
        "EBFW_SERVICE_PORT",
        "EBFW_METRICS_SERVICE_PORT_HTTP",
        "EBFW_PORT",
        "EBFW_OPERATOR_PORT_8081_TCP_ADDR",
        "EBFW_METRICS_PORT_9090_TCP",
    ],
)
def test_service_links_of_kubernetes_are_no_mistakes(name: str) -> None:
    assert load(None, {name: "tcp://10.0.0.1:9090"}) == Settings()


def test_file_and_environment(tmp_path: Path) -> None:
    path = config(
        tmp_path,
        "cgroup: /sys/fs/cgroup\nexclude:\n  cidrs: [10.1.2.3/8, 192.0.2.1, '::ffff:198.51.100.0/120']\n"
        "  domainSuffixes: ['*.Example.COM.', svc, svc]\n",
    )
    for settings in (load(path, {}), load(None, {"EBFW_CONFIG": path})):
        assert settings.cgroup is None
        assert settings.exclude_cidrs == (
            ipaddress.ip_network("10.0.0.0/8"),
            ipaddress.ip_network("192.0.2.1/32"),
            ipaddress.ip_network("198.51.100.0/24"),
        )
        assert settings.exclude_suffixes == ("example.com", "svc")
    assert load(path, {"EBFW_CGROUP": "/a"}).cgroup == Path("/a")


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "exclude:\n", "exclude: {cidrs: }\ncgroup: null\n"])
def test_absent_keys_keep_their_defaults(tmp_path: Path, text: str) -> None:
    assert load(config(tmp_path, text), {}) == Settings()


def test_present_list_replaces_its_default_only(tmp_path: Path) -> None:
    settings = load(config(tmp_path, "exclude:\n  cidrs: []\n"), {})
    assert settings.exclude_cidrs == ()
    assert settings.exclude_suffixes == Settings().exclude_suffixes


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("cgruop: /x\n", 1, "did you mean cgroup?"),
        ("EBFW_CGROUP: /x\n", 1, "did you mean cgroup?"),
        (
            "cgroup: /x\nEBFW_OUTPUT: json\n",
            2,
            "EBFW_OUTPUT: is no key of this file; set it as an environment variable",
        ),
        ("\nexclude:\n  cidr: []\n", 3, "exclude.cidr: there is no such key; did you mean exclude"),
        ("exclude:\n  domain_suffixes: []\n", 2, "domainSuffixes?"),
        ("exclude:\n  cidrs: []\n  cidrs: []\n", 3, "second time"),
        ("cgroup: /a\ncgroup: /b\n", 2, "second time"),
        ("exclude:\n  cidrs:\n    - 10.0.0.0/8\n    - 10.0.0.0/33\n", 4, "exclude.cidrs[1]"),
        ("exclude: {cidrs: [10.0.0.0/255.0.0.0]}\n", 1, "such as 10.0.0.0/8"),
        ("exclude: {cidrs: ['fe80::1%eth0/64']}\n", 1, "such as 10.0.0.0/8"),
        ("exclude: {cidrs: 10.0.0.0/8}\n", 1, "expected a list"),
        ("exclude: {domainSuffixes: [no]}\n", 1, "expected text"),
        ("exclude: {domainSuffixes: ['a b']}\n", 1, "such as example.com"),
        ("exclude: {domainSuffixes: ['.']}\n", 1, "such as example.com"),
        ("- a\n", 1, "expected a mapping"),
        ("exclude: [a]\n", 1, "exclude: expected a mapping"),
        ("cgroup: relative\n", 1, "absolute"),
        ("cgroup: 1\n", 1, "expected text"),
        ("cgroup: [\n", 2, "not YAML"),
        ("a: b: c\n", 1, "not YAML"),
        ("--- {}\n--- {}\n", 2, "not YAML"),
        ("<<: {cgroup: /x}\n", 1, "<<"),
        ("? [a]\n: b\n", 1, "not a plain key"),
    ],
)
def test_mistake_in_the_file_names_key_and_line(tmp_path: Path, text: str, line: int, says: str) -> None:
    path = config(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        load(path, {})
    said = str(caught.value)
    assert said.startswith(f"{path}:{line}: "), said
    if "did you mean exclude" not in says:
        assert says in said
    else:
        assert "did you mean cidrs?" in said


def test_a_cgroup_that_is_none_is_told_as_it_was_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    path = config(tmp_path, f"cgroup: {missing}\n")
    for settings, says in (
        (load(path, {}), f"{path}: cgroup: {missing} does not exist"),
        (load(path, {"EBFW_CGROUP": f"{missing}-2"}), f"EBFW_CGROUP={missing}-2 does not exist"),
    ):
        with pytest.raises(SettingsError) as caught:
            scope_of(settings, tmp_path)
        assert str(caught.value).startswith(says)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    none = tmp_path / "none"
    with pytest.raises(SettingsError, match=f"^EBFW_CONFIG={none}: cannot read the configuration: No such file"):
        load(None, {"EBFW_CONFIG": str(none)})
    with pytest.raises(SettingsError, match="No such file"):
        load(str(tmp_path / "none"), {})
    with pytest.raises(SettingsError, match="directory"):
        load(str(tmp_path), {})
    with pytest.raises(SettingsError, match="name of a file"):
        load("", {})
    big = tmp_path / "big"
    big.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(SettingsError, match="larger"):
        load(str(big), {})
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\x00\x01")
    with pytest.raises(SettingsError, match="not YAML"):
        load(str(binary), {})
    bomb = tmp_path / "bomb"
    for depth in (20_000, 1_000_000):
        bomb.write_text("[" * depth)
        with pytest.raises(SettingsError, match="not YAML"):
            load(str(bomb), {})


def test_d20_the_inventorys_default_is_the_services_state_directory() -> None:
    assert load(None, {}).inventory is None
    service = {"STATE_DIRECTORY": "/var/lib/ebfw:/var/lib/other"}
    assert load(None, service).inventory == Path("/var/lib/ebfw/inventory.json")
    assert load(None, service | {"EBFW_INVENTORY": "/x"}).inventory == Path("/x")
    assert load(None, service | {"EBFW_INVENTORY": ""}).inventory is None


def test_colour_follows_the_conventions() -> None:
    assert load(None, {}).colour is None
    assert load(None, {"NO_COLOR": ""}).colour is None
    assert load(None, {"NO_COLOR": "1"}).colour is False
    assert load(None, {"TERM": "dumb"}).colour is False


def test_otel_variables_pass_unchecked_and_unshown() -> None:
    settings = load(None, {"OTEL_EXPORTER_OTLP_HEADERS": "api-key=CANARY", "OTEL_X": "?", "PATH": "/"})
    assert dict(settings.otel) == {"OTEL_EXPORTER_OTLP_HEADERS": "api-key=CANARY", "OTEL_X": "?"}
    assert "CANARY" not in repr(settings)
