"""Two network namespaces joined by a veth pair, with addresses that answer, hang, reject and lie.

    pods  203.0.113.1  2001:db8:1::1          (clients)
      |   eth0 -- eth0
    world 203.0.113.2  2001:db8:1::2          (servers: 198.51.100.0/25, 2001:db8:2::/64, all of it answers)

In: nothing. Out: a `Lab` with both namespaces, rules on demand, and a private /etc whose resolver is the
lab's. Documentation addresses (RFC 5737, RFC 3849), because ebfw's default excludes hide the private ranges.
Not its job: what listens there (`servers`) and who connects (`workload`, `clients`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.cgroup import PREFIX, Cgroup, LabError, cgroup2_root, entering, signals_raise, undisturbed, unique

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Cgroup", "Lab", "LabError", "Namespace", "cgroup2_root", "preflight", "sweep"]

POD4, POD6 = "203.0.113.1", "2001:db8:1::1"
GATEWAY4, GATEWAY6 = "203.0.113.2", "2001:db8:1::2"
# The UDP servers answer on these and on the resolver only.
SERVERS4 = tuple(f"198.51.100.{n}" for n in range(1, 9))
SERVERS6 = tuple(f"2001:db8:2::{n}" for n in range(1, 9))
RESOLVER4, RESOLVER6 = "198.51.100.53", "2001:db8:2::53"
VIRTUAL4, VIRTUAL6 = "198.51.100.180", "2001:db8:3::180"  # nobody has them: for `Lab.dnat` and `Lab.redirect`
BLACKHOLE4, BLACKHOLE6 = "198.51.100.200", "2001:db8:3::200"  # swallowed: a connect times out after 3 s
# ICMP host (IPv6: address) unreachable comes back: EHOSTUNREACH (IPv6: ENETUNREACH). At once for a
# non-blocking connect; a blocking one still holds the socket when the first ICMP arrives over a veth, and
# ends with the second SYN after 1 s.
REJECT4, REJECT6 = "198.51.100.201", "2001:db8:3::201"
NO_ROUTE4, NO_ROUTE6 = "192.0.2.1", "2001:db8:ffff::1"  # connect fails at once, without a packet
CLOSED_PORT = 1  # nothing listens: refused

_NETNS = Path("/run/netns")
_BPFFS = Path("/sys/fs/bpf")
_TOOLS = {
    "ip": "iproute2",
    "openssl": "openssl",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "mount": "mount",
}


def preflight() -> None:
    """Raises LabError with the next step where the lab cannot work: not root, a tool or cgroup2 missing."""
    if os.geteuid() != 0:
        raise LabError("the lab makes network namespaces and cgroups: run it as root (sudo)")
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        packages = " ".join(sorted({_TOOLS[tool] for tool in missing}))
        raise LabError(f"not found: {', '.join(missing)}; try: apt-get install {packages}")
    cgroup2_root()
    if not Path("/etc/resolv.conf").exists():
        # A file of the lab's is mounted over it, and there has to be something to mount over.
        raise LabError("/etc/resolv.conf is missing or a link to nothing; try: touch /etc/resolv.conf")


def _call(argv: Sequence[str], **options: Any) -> None:
    """Runs a tool. Raises LabError with what it complained about."""
    done = subprocess.run(argv, capture_output=True, text=True, **options)
    if done.returncode:
        complaint = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
        raise LabError(f"{' '.join(argv)}: {complaint}")


class Namespace:
    """A named network namespace. `etc` holds the files that hide those of /etc from processes inside."""

    def __init__(self, name: str, etc: Path | None = None) -> None:
        self.name = name
        self.path = _NETNS / name
        self.etc = etc

    def add(self) -> None:
        _call(("ip", "netns", "add", self.name))

    def delete(self) -> None:
        """Idempotent. A namespace with processes in it lives on, nameless, until they end."""
        with undisturbed():
            if self.path.exists():
                _call(("ip", "netns", "del", self.name))

    def ip(self, *lines: str) -> None:
        """Runs `ip` commands inside, all in one process: `pods.ip("link set lo up", "route add …")`."""
        _call(("ip", "-netns", self.name, "-batch", "-"), input="\n".join(lines) + "\n")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """This thread, and no other, is inside; a socket made here stays here. (os.setns is Python
        3.12's.)"""
        libc = ctypes.CDLL(None, use_errno=True)

        def setns(fd: int) -> None:
            if libc.setns(fd, 0x40000000):  # CLONE_NEWNET
                raise OSError(ctypes.get_errno(), f"setns {self.name}")

        with open("/proc/thread-self/ns/net") as outside, open(self.path) as inside:
            setns(inside.fileno())
            try:
                yield
            finally:
                setns(outside.fileno())

    def sysctl(self, key: str, value: object) -> None:
        """Writes net.*; /proc/sys/net shows the namespace of the thread that opens it."""
        with self.entered():
            Path("/proc/sys", *key.split(".")).write_text(str(value))

    def popen(self, argv: Sequence[str | Path], **options: Any) -> subprocess.Popen[Any]:
        """subprocess.Popen inside, in the caller's cgroup; see Cgroup.popen for both."""
        return subprocess.Popen(entering(argv, netns=self.path, etc=self.etc), **options)

    def run(self, argv: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[Any]:
        """subprocess.run inside, in the caller's cgroup."""
        return subprocess.run(entering(argv, netns=self.path, etc=self.etc), **options)


class Lab:
    """The two namespaces, `pods` and `world`; a context manager that removes what it made, come what may.

    `gso=False` keeps the kernel from building packets larger than the MTU, so that counts agree with
    tcpdump's. `directory` is scratch space that goes with the lab. `ipv6` says whether this kernel has it.
    """

    def __init__(self, *, mtu: int = 1500, gso: bool = True) -> None:
        self.name = unique()
        self.directory = Path(tempfile.gettempdir()) / self.name
        self.pods = Namespace(f"{self.name}-pods", self.directory / "etc")
        self.world = Namespace(f"{self.name}-world")
        self.ipv6 = Path("/proc/net/if_inet6").exists()
        self._mtu, self._gso = mtu, gso
        self._guard = contextlib.ExitStack()

    def __enter__(self) -> Lab:
        preflight()
        with contextlib.ExitStack() as undo:
            undo.enter_context(signals_raise())
            undo.callback(shutil.rmtree, self.directory, ignore_errors=True)
            self._write_etc()
            # Registered before they are made: a signal may arrive between the two.
            for namespace in (self.pods, self.world):
                undo.callback(namespace.delete)
                namespace.add()
            self._wire()
            self._guard = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with undisturbed():
            self._guard.close()

    def _write_etc(self) -> None:
        etc = self.directory / "etc"
        etc.mkdir(parents=True)
        (etc / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files dns\n")
        # One attempt: a name that is never answered costs two seconds and one query per type.
        (etc / "resolv.conf").write_text(f"nameserver {RESOLVER4}\noptions timeout:2 attempts:1\n")

    def _wire(self) -> None:
        pods, world = self.pods, self.world
        for namespace in (pods, world):
            if self.ipv6:
                for which in ("all", "default"):
                    namespace.sysctl(f"net.ipv6.conf.{which}.disable_ipv6", 0)
                    namespace.sysctl(f"net.ipv6.conf.{which}.accept_dad", 0)
        # SYN at 0 s and 1 s, ETIMEDOUT at 3 s.
        pods.sysctl("net.ipv4.tcp_syn_retries", 1)
        # Only a router sends "host unreachable", and by default one per second and client.
        world.sysctl("net.ipv4.ip_forward", 1)
        world.sysctl("net.ipv4.icmp_ratelimit", 0)
        if self.ipv6:
            world.sysctl("net.ipv6.conf.all.forwarding", 1)
            world.sysctl("net.ipv6.icmp.ratelimit", 0)
        gso = "" if self._gso else "gso_max_segs 1"
        pods.ip(f"link add eth0 mtu {self._mtu} type veth peer name eth0 mtu {self._mtu} netns {world.name}")
        for namespace, v4, v6 in ((pods, POD4, POD6), (world, GATEWAY4, GATEWAY6)):
            lines = ["link set lo up", f"link set eth0 up {gso}", f"address add {v4}/24 dev eth0"]
            namespace.ip(*lines, *([f"address add {v6}/64 dev eth0 nodad"] if self.ipv6 else []))
        pods.ip(f"route add 198.51.100.0/24 via {GATEWAY4}")
        world.ip(
            # The whole range is local (a wildcard listener answers on any of it); replies of UDP servers need
            # real addresses.
            "route add local 198.51.100.0/25 dev lo",
            *(f"address add {address}/32 dev lo" for address in (*SERVERS4, RESOLVER4)),
            f"route add blackhole {BLACKHOLE4}",
            f"route add unreachable {REJECT4}",
        )
        if not self.ipv6:
            return
        pods.ip(*(f"route add {net} via {GATEWAY6}" for net in ("2001:db8:2::/64", "2001:db8:3::/64")))
        world.ip(
            "route add local 2001:db8:2::/64 dev lo",
            *(f"address add {address}/128 dev lo nodad" for address in (*SERVERS6, RESOLVER6)),
            f"route add blackhole {BLACKHOLE6}",
            f"route add unreachable {REJECT6}",
        )

    def dnat(self, address: str, port: int, to: str, to_port: int, *, protocol: str = "tcp") -> None:
        """What pods send to address:port goes to `to`:`to_port` instead, as behind kube-proxy. Both of one
        family. Raises LabError where the machine has neither iptables nor nft, or the kernel no NAT."""
        target = f"[{to}]:{to_port}" if ":" in to else f"{to}:{to_port}"
        self._nat(address, port, protocol, ("DNAT", "--to-destination", target), f"dnat to {target}")

    def redirect(self, address: str, port: int, to_port: int, *, protocol: str = "tcp") -> None:
        """What pods send to address:port goes to their own `to_port`, as with a mesh's sidecar."""
        self._nat(address, port, protocol, ("REDIRECT", "--to-ports", str(to_port)), f"redirect to :{to_port}")

    def _nat(self, address: str, port: int, protocol: str, iptables: tuple[str, ...], nft: str) -> None:
        six = ":" in address
        tool, family = ("ip6tables", "ip6") if six else ("iptables", "ip")
        match = ("-p", protocol, "-d", address, "--dport", str(port))
        rule = f"{family} daddr {address} {protocol} dport {port} {nft}"
        chain = f"type nat hook output priority -100\n{rule}\n"
        table = f"table {family} lab {{\nchain output {{\n{chain}}}\n}}\n"
        tries: list[tuple[tuple[str, ...], str]] = [
            ((tool, "-w", "-t", "nat", "-A", "OUTPUT", *match, "-j", *iptables), ""),
            (("nft", "-f", "-"), table),
        ]
        complaints = []
        for argv, text in tries:
            if shutil.which(argv[0]):
                done = self.pods.run(argv, input=text, capture_output=True, text=True)
                if done.returncode == 0:
                    return
                complaints.append(f"{argv[0]}: {done.stderr.strip()}")
        reason = "; ".join(complaints) or "iptables is not installed; try: apt-get install iptables"
        raise LabError(f"cannot make a NAT rule: {reason}")


def sweep() -> list[str]:
    """Removes what labs left behind whose process is dead (SIGKILL, power): cgroups with what runs in them,
    namespaces, scratch directories, BPF pins. Returns what was removed. Never touches a living lab's."""
    removed: list[str] = []

    def leftovers(directory: Path) -> list[Path]:
        found = []
        for path in directory.glob(f"{PREFIX}-*"):
            pid = path.name.removeprefix(f"{PREFIX}-").split("-")[0]
            if pid.isdecimal() and not Path("/proc", pid).exists():
                found.append(path)
        return found

    for path in leftovers(cgroup2_root()):
        left = Cgroup("")
        left.path = path
        left.remove()
        removed.append(str(path))
    for path in leftovers(_NETNS):
        Namespace(path.name).delete()
        removed.append(str(path))
    # What is under /run was mounted for the pins of a bench.
    for directory in (Path(tempfile.gettempdir()), _BPFFS, Path("/run")):
        for path in leftovers(directory):
            if os.path.ismount(path):
                subprocess.run(["umount", str(path)], check=False, capture_output=True)
            shutil.rmtree(path, ignore_errors=True)
            removed.append(str(path))
    return removed
