"""Builds and caches what a guest boots from: kernels, their modules, initramfs, root file system.

In: the list of kernel series, the checkout's pyproject.toml, this machine's apt and pip configuration.
Out: a `Kernel` (paths and resolved version) per series and the path of the root image, all below the cache
folder, one folder per entry named by a hash of its recipe. An entry appears by rename only, so what is there
is whole. Not its job: booting (run.py), and what happens in the guest (init.sh, guest.sh).

No package version is pinned: a Debian mirror keeps only the newest kernel ABI of a suite. Each entry's
manifest.json says what was found.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import lzma
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent

# Kernel series -> Debian suite whose cloud kernel it is.
SERIES = {"5.10": "bullseye", "6.1": "bookworm", "6.12": "trixie"}
GUEST_SUITE = "bookworm"
GUEST_PACKAGES = (
    "python3", "python3-bpfcc", "python3-pip", "python3-venv", "libbpf1", "linux-libc-dev", "gcc",
    "libc6-dev", "bpftool", "iproute2", "iptables", "nftables", "conntrack", "ethtool", "tcpdump",
    "curl", "openssl", "ca-certificates", "kmod", "procps",
)  # fmt: skip
# What guest.sh itself calls; the rest comes from the checkout.
GUEST_PYTHON = ("pytest", "pytest-timeout")
# Modules that must be in before the root file system is; absent ones are built into that kernel.
BOOT_MODULES = ("virtio_pci", "virtio_blk", "ext4", "virtio_rng")
# Modules that the tests rely on: their absence is a broken build, not a skipped test.
TEST_MODULES = (
    "veth", "dummy", "bridge", "nf_conntrack", "nf_nat", "nft_nat", "nft_redir", "nft_compat",
    "nft_chain_nat", "iptable_nat", "ip_tables", "x_tables", "xt_nat", "xt_REDIRECT", "xt_conntrack",
    "xt_MASQUERADE",
)  # fmt: skip
# command or file -> package that brings it on Debian and Ubuntu
HOST_NEEDS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "debootstrap": "debootstrap",
    "/usr/share/keyrings/debian-archive-keyring.gpg": "debian-archive-keyring",
    "cpio": "cpio",
    "mke2fs": "e2fsprogs",
    "depmod": "kmod",
    "zstd": "zstd",
    "setpriv": "util-linux",
}
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
STALE_DAYS = 21


class BuildError(Exception):
    """Something that a guest needs cannot be had; the message says what and what to do."""


@dataclass(frozen=True)
class Kernel:
    """One bootable kernel. `release` is what uname -r says there, `version` the Debian package's."""

    series: str
    release: str
    version: str
    vmlinuz: Path
    initrd: Path
    modules: Path


def cache_dir() -> Path:
    """${XDG_CACHE_HOME:-~/.cache}/ebfw/kernels, made if need be."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = base / "ebfw" / "kernels"
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def step(label: str) -> Iterator[None]:
    """One line per step with its seconds: said at once, completed when done."""
    print(f"  {label} ... ", end="", flush=True)
    start = time.monotonic()
    try:
        yield
    except BaseException:
        print(f"FAILED after {time.monotonic() - start:.1f} s", flush=True)
        raise
    print(f"{time.monotonic() - start:.1f} s", flush=True)


def run(argv: Sequence[str | Path], env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Stdout of a command; on failure a BuildError with the end of what it said."""
    words = [str(a) for a in argv]
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    child = subprocess.Popen(words, stdin=null, stdout=pipe, stderr=pipe, text=True, env=env, cwd=cwd)
    try:
        out, err = child.communicate()
    except BaseException:
        end(child)
        raise
    if child.returncode:
        said = "\n    ".join((out + err).strip().splitlines()[-25:])
        raise BuildError(f"{shlex.join(words[:6])} ... failed ({child.returncode}):\n    {said}")
    return out


def end(child: subprocess.Popen[str]) -> None:
    """Ends an interrupted command, gently first: a killed apt-get leaves dpkg in disorder."""
    # sudo is root's process; Ctrl-C reached it through the terminal.
    with contextlib.suppress(PermissionError):
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
    child.wait()


def as_root(argv: Sequence[str | Path], env: Mapping[str, str] | None = None) -> list[str | Path]:
    """The command as root: itself, or through sudo (which drops the environment, so it is handed over)."""
    given = [f"{k}={v}" for k, v in (env or {}).items()]
    if os.geteuid() == 0:
        return ["env", *given, *argv]
    if not shutil.which("sudo"):
        what = shlex.join(str(a) for a in argv[:4])
        raise BuildError(f"needs root (run as root or install sudo) for: {what} ...")
    return ["sudo", "env", *given, *argv]


def need_tools(needs: Mapping[str, str] = HOST_NEEDS) -> None:
    """Installs with apt what this machine lacks."""

    def there(need: str) -> bool:
        return Path(need).exists() if need.startswith("/") else bool(shutil.which(need))

    def missing() -> list[str]:
        return sorted({package for need, package in needs.items() if not there(need)})

    os.environ["PATH"] += ":/usr/sbin:/sbin"  # a user's PATH on Debian lacks depmod, mke2fs, debootstrap
    packages = missing()
    if not packages:
        return
    if not shutil.which("apt-get"):
        raise BuildError(f"missing here and no apt-get to install it: {' '.join(packages)}")
    apt = ["apt-get", "-o", "DPkg::Lock::Timeout=300"]
    install = [*apt, "install", "-y", "--no-install-recommends", *packages]
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    with step(f"apt-get install {' '.join(packages)}"):
        try:
            run(as_root(install, env))
        except BuildError:
            run(as_root([*apt, "update"], env))
            run(as_root(install, env))
    if left := missing():
        raise BuildError(f"still missing after installation: {' '.join(left)}")


def requirements(checkout: Path) -> list[str]:
    """What the checkout's tests need in the guest: dependencies and test extra of its pyproject.toml."""
    found = set(GUEST_PYTHON)
    pyproject = checkout / "pyproject.toml"
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text()).get("project", {})
        found |= set(project.get("dependencies", ()))
        found |= set(project.get("optional-dependencies", {}).get("test", ()))
    named = {re.split(r"[^A-Za-z0-9._-]", r, maxsplit=1)[0].lower() for r in found - set(GUEST_PYTHON)}
    return sorted(r for r in found if r not in GUEST_PYTHON or r not in named)


def entry(kind: str, recipe: object, fresh: bool, build: Callable[[Path], dict[str, object]]) -> Path:
    """Folder of a cache entry, built now if it is not there.

    `build` fills a temporary folder and returns the manifest; the folder gets its name only when whole. Old
    entries of the same kind go once nobody has used them for STALE_DAYS.
    """
    cache = cache_dir()
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / f"{kind}-{digest}"
    with (cache / "lock").open("w") as lock:
        # A second run waits for the first one's build instead of doubling it.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with step("wait for another run's build"):
                fcntl.flock(lock, fcntl.LOCK_EX)
        if fresh or not (path / "manifest.json").is_file():
            for left in cache.glob("building-*"):  # of a build that was killed; the lock is ours
                remove(left)
            temp = Path(tempfile.mkdtemp(prefix=f"building-{kind}-", dir=cache))
            try:
                start = time.monotonic()
                manifest = build(temp)
                manifest |= {"recipe": recipe, "built": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
                manifest["seconds"] = round(time.monotonic() - start, 1)
                (temp / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
                if path.exists():
                    remove(path)
                temp.chmod(0o755)
                temp.rename(path)
            finally:
                remove(temp)
        os.utime(path)
        for old in cache.glob(f"{kind}-*"):
            if old != path and time.time() - old.stat().st_mtime > STALE_DAYS * 86400:
                remove(old)
    return path


def remove(folder: Path) -> None:
    """Removes a folder, with root's rights where an interrupted build left root's files."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        run(as_root(["rm", "-rf", "--one-file-system", folder]))


# --- Debian's mirror and packages


@functools.cache
def mirrors() -> tuple[str, str]:
    """(main, security) base URIs of Debian as this machine is configured to reach it.

    EBFW_DEBIAN_MIRROR wins; then apt's own configuration; on another distribution, the one that debootstrap
    or python-apt carries for Debian. The security archive, where not configured, is the main one's neighbour.
    """
    main = os.environ.get("EBFW_DEBIAN_MIRROR", "")
    security = ""
    if not main:
        # Other vendors' sources have other release names.
        names = "|".join([*SERIES.values(), "(old)*stable", "testing", "sid", "unstable", "forky", "duke"])
        columns = "$(CREATED_BY) $(REPO_URI) $(RELEASE) $(COMPONENT)"
        for line in run(["apt-get", "indextargets", "--format", columns]).splitlines():
            kind, uri, release, component = ([*line.split(), "", "", "", ""])[:4]
            if kind != "Packages" or component != "main":
                continue
            if re.fullmatch(rf"({names})-security", release):
                security = security or uri
            elif re.fullmatch(names, release):
                main = main or uri
    if not main:
        scripts = sorted(Path("/usr/share/debootstrap/scripts").glob("*"))
        vendors = Path("/usr/share/python-apt/templates").glob("Debian.*")
        for place in (Path("/usr/sbin/debootstrap"), *scripts, *vendors):
            text = place.read_text(errors="replace") if place.is_file() else ""
            if hit := re.search(r"""https?://[^\s"'|]+/debian/?(?=\s|["'])""", text):
                main = hit[0]
                break
    if not main:
        raise BuildError("no Debian mirror in apt's configuration: set EBFW_DEBIAN_MIRROR to one")
    main, security = (first_mirror(u).rstrip("/") for u in (main, security))
    return main, security or f"{main}-security"


def first_mirror(uri: str) -> str:
    """A URI that debootstrap understands too: of apt's mirror+file: lists the first line."""
    if not uri.startswith("mirror+file:"):
        return uri
    lines = Path(uri.removeprefix("mirror+file:").rstrip("/")).read_text().splitlines()
    return next(line.split()[0] for line in lines if line.strip() and not line.startswith("#"))


class PrivateApt:
    """apt over one suite with own state, cache and sources; the machine's proxies and certificates hold."""

    def __init__(self, folder: Path, suite: str) -> None:
        main, security = mirrors()
        for sub in ("state/lists/partial", "cache/archives/partial", "etc"):
            (folder / sub).mkdir(parents=True)
        (folder / "state/status").touch()
        (folder / "etc/sources.list").write_text(
            f"deb [arch=amd64 signed-by={KEYRING}] {main} {suite} main\n"
            f"deb [arch=amd64 signed-by={KEYRING}] {security} {suite}-security main\n"
        )
        self.conf = folder / "apt.conf"
        # Read after the machine's own configuration. Its hooks are cleared: they tidy the machine's cache,
        # not ours. An archived suite's index is past its date but still signed.
        self.conf.write_text(
            "#clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n"
            f'Dir::State "{folder}/state";\nDir::State::status "{folder}/state/status";\n'
            f'Dir::Cache "{folder}/cache";\nDir::Etc "{folder}/etc";\n'
            f'Dir::Etc::sourcelist "{folder}/etc/sources.list";\nDir::Etc::sourceparts "/dev/null";\n'
            'APT::Architecture "amd64";\nAPT::Architectures { "amd64"; };\nAcquire::Languages "none";\n'
            'Acquire::Check-Valid-Until "false";\nAcquire::Retries "3";\nAPT::Sandbox::User "root";\n'
        )
        # One of the two archives may be gone from the mirror (end of life); the package lookup decides.
        with contextlib.suppress(BuildError):
            run(["apt-get", "-c", self.conf, "update"])
        self.suite = suite

    def newest(self, prefix: str, pattern: str) -> tuple[str, str]:
        """(package, version) with the highest version among the packages whose name matches `pattern`."""
        names = run(["apt-cache", "-c", self.conf, "pkgnames", prefix]).split()
        names = [n for n in names if re.fullmatch(pattern, n)]
        best: tuple[str, str] | None = None
        for row in run(["apt-cache", "-c", self.conf, "madison", *names]).splitlines() if names else ():
            name, version = (column.strip() for column in row.split("|")[:2])
            if best is None or not subprocess.call(["dpkg", "--compare-versions", version, "gt", best[1]]):
                best = name, version
        if best is None:
            raise BuildError(f"no package {pattern} in {self.suite} on {' and '.join(mirrors())}")
        return best

    def unpack(self, name: str, version: str, into: Path) -> None:
        """Downloads a package (its hash is checked against the signed index) and unpacks it."""
        debs = self.conf.parent / "debs"
        shutil.rmtree(debs, ignore_errors=True)
        debs.mkdir()
        run(["apt-get", "-c", self.conf, "download", f"{name}={version}"], cwd=debs)
        into.mkdir(exist_ok=True)
        run(["dpkg-deb", "-x", next(debs.glob("*.deb")), into])


# --- kernels


def kernel(series: str, fresh: bool = False) -> Kernel:
    """The newest cloud kernel of a series: image, initramfs and a disk with its modules."""
    suite = SERIES[series]
    init = (HERE / "init.sh").read_text()
    recipe = {"format": 1, "series": series, "suite": suite, "init": init}
    recipe |= {"boot": BOOT_MODULES, "tests": TEST_MODULES}

    def build(out: Path) -> dict[str, object]:
        with tempfile.TemporaryDirectory(prefix="work-", dir=out) as name:
            work = Path(name)
            with step(f"{series}: index of {suite}"):
                apt = PrivateApt(work / "apt", suite)
                prefix = f"linux-image-{series}."
                package, version = apt.newest(prefix, rf"{re.escape(prefix)}\d+[-+.~\w]*-cloud-amd64")
                shell = apt.newest("busybox-static", "busybox-static")
            with step(f"{series}: download and unpack {package} {version}"):
                apt.unpack(package, version, work / "tree")
                apt.unpack(*shell, work / "busybox")
            release = package.removeprefix("linux-image-")
            # Either side of the merged /usr, by the suite's age.
            modules = next(p for p in (work / "tree").glob("**/lib/modules") if p.is_dir())
            with step(f"{series}: modules, initramfs"):
                disk_of_modules(modules, release, out / "modules.img", work)
                busybox = next(p for p in (work / "busybox").glob("**/bin/busybox") if p.is_file())
                initramfs(modules / release, busybox, init, out / "initrd.gz", work)
                shutil.copyfile(work / f"tree/boot/vmlinuz-{release}", out / "vmlinuz")
        return {"package": package, "version": version, "release": release, "busybox": shell[1]}

    path = entry(f"linux-{series}", recipe, fresh, build)
    manifest = json.loads((path / "manifest.json").read_text())
    files = (path / "vmlinuz", path / "initrd.gz", path / "modules.img")
    return Kernel(series, manifest["release"], manifest["version"], *files)


def disk_of_modules(modules: Path, release: str, image: Path, work: Path) -> None:
    """ext4 image of /lib/modules with depmod's tables, after a check that what tests need is there."""
    # depmod -b wants BASE/lib/modules.
    base = work / "depmod"
    (base / "lib").mkdir(parents=True)
    (base / "lib/modules").symlink_to(modules)
    run(["depmod", "-b", base, "-a", release])
    have = {p.name.split(".ko")[0].replace("-", "_") for p in modules.rglob("*.ko*")}
    builtin = (modules / release / "modules.builtin").read_text()
    have |= {Path(line).stem.replace("-", "_") for line in builtin.splitlines()}
    if lack := sorted(set(TEST_MODULES) - have):
        raise BuildError(f"{release} has no module {' '.join(lack)}")
    size = sum(p.stat().st_size for p in modules.rglob("*") if p.is_file())
    options = ["-t", "ext4", "-O", "^has_journal,^metadata_csum,^orphan_file", "-E", "root_owner=0:0"]
    run(["mke2fs", "-q", *options, "-d", modules, image, f"{size * 5 // 4 // 1048576 + 32}M"])


def initramfs(modules: Path, busybox: Path, init: str, archive: Path, work: Path) -> None:
    """busybox, init.sh and the modules between power-on and the root disk, in load order (/m/order)."""
    tree = work / "initramfs"
    for sub in ("bin", "m", "proc", "sys", "dev", "root"):
        (tree / sub).mkdir(parents=True)
    shutil.copy(busybox, tree / "bin/busybox")
    (tree / "init").write_text(init)
    for program in (tree / "init", tree / "bin/busybox"):
        program.chmod(0o755)
    depends: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        module, _, needs = line.partition(":")
        # depmod lists what a module needs from the nearest to the farthest: load in reverse.
        depends[Path(module).name.split(".ko")[0].replace("-", "_")] = [*reversed(needs.split()), module]
    order: dict[str, None] = {}
    for wanted in BOOT_MODULES:
        for file in depends.get(wanted, ()):
            data = (modules / file).read_bytes()
            name = Path(file).name
            if name.endswith(".xz"):
                name, data = name.removesuffix(".xz"), lzma.decompress(data)
            (tree / "m" / name).write_bytes(data)
            order[name] = None
    (tree / "m/order").write_text("\n".join(order) + "\n")
    pack = f"find . | cpio -o -H newc -R 0:0 --quiet | gzip -1 > {shlex.quote(str(archive))}"
    run(["sh", "-c", pack], cwd=tree)


# --- the guest's root file system


def root_image(checkout: Path, fresh: bool = False) -> Path:
    """ext4 image of the guest's root with the venv /opt/ebfw for this checkout's requirements.

    Two entries: the Debian tree (minutes) and the image with the Python packages (half a minute), so that a
    changed requirement does not fetch Debian again.
    """
    text = (HERE / "rootfs.sh").read_text()
    base_text = re.sub(r"(?ms)^image\)\n.*?^    ;;\n", "", text)
    base_recipe = {"format": 1, "suite": GUEST_SUITE, "packages": GUEST_PACKAGES, "script": base_text}

    def build_base(out: Path) -> dict[str, object]:
        mirror = mirrors()[0]
        with step(f"guest: Debian {GUEST_SUITE} with {len(GUEST_PACKAGES)} packages (debootstrap)"):
            script, packages = HERE / "rootfs.sh", ",".join(GUEST_PACKAGES)
            tree = out / "base.tar.zst"
            run(as_root(["bash", script, "base", tree, GUEST_SUITE, mirror, KEYRING, packages]))
        return {}

    base = entry("base", base_recipe, fresh, build_base)
    needs = requirements(checkout)

    def build_image(out: Path) -> dict[str, object]:
        (out / "requirements.txt").write_text("\n".join(needs) + "\n")
        env, ca = pip_environment()
        with step(f"guest: {len(needs)} Python requirements, image"):
            script, image, tree = HERE / "rootfs.sh", out / "root.img", base / "base.tar.zst"
            run(as_root(["bash", script, "image", image, tree, out / "requirements.txt", ca], env))
        return {"python": (out / "python.txt").read_text().split()}

    recipe = {"format": 1, "base": base.name, "script": text, "requirements": needs}
    return entry("root", recipe, fresh, build_image) / "root.img"


def pip_environment() -> tuple[dict[str, str], str]:
    """This machine's pip and proxy settings as variables, and the CA bundle that pip shall trust."""
    env: dict[str, str] = {}
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.partition(".")
        if section in ("global", "install"):
            env["PIP_" + key.upper().replace("-", "_")] = " ".join(value.strip("'\"").split("\\n")).strip()
    env |= {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.lower().endswith("_proxy")}
    ca = env.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE") or "/etc/ssl/certs/ca-certificates.crt"
    # Folders and files of this machine are not in the guest tree.
    return {k: v for k, v in env.items() if not v.startswith("/")}, ca
