#!/usr/bin/env python
"""Several hosts on one machine: network namespaces with addresses, names and process tables of their own (Linux, root).

    python tools/hosts.py --hosts 2 [--cut 1 --when 'rto 2/'] [--log-dir DIR] -- WORDS...

starts `python -m rto_megatron.launch --nnodes ... WORDS` on every host as a cluster's script would, WORDS being
torchrun's and the module's, and ends with the first exit code that is not 0. What a host prints is in DIR/host-N.log,
and here with its name in front. `--cut` takes a host's cable out when some host prints the words of `--when`.

Each host is a namespace with one end of a cable; the other ends are on a bridge in a namespace of its own, so the
machine's own network is not touched. A host knows itself as 127.0.1.1, as Debian's hosts do, and the others by their
addresses.
"""

import argparse
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NETWORK = "192.0.2"
"""Addresses for documentation (RFC 5737): no real network has them."""
PORT = 29500
ENTER = (
    'mount --bind "$1" /etc/hosts && mount --bind /dev/null /etc/resolv.conf && hostname "$2" && shift 2 && exec "$@"'
)
_numbers = itertools.count()


class NoHosts(RuntimeError):
    """This machine does not let us make any."""


@dataclass(frozen=True)
class Host:
    """A network namespace that a process can be started in."""

    name: str
    address: str
    namespace: str
    switch: str
    """Namespace with the other end of its cable, which has the host's name."""
    hosts_file: Path

    def start(self, command: Sequence[str | Path], log: Path, env: dict[str, str] | None = None) -> subprocess.Popen:
        """Run a command there, in a process table of its own, which ends with it. Output goes to the log."""
        network = f"--net=/run/netns/{self.namespace}"
        room = [
            "setpriv",
            "--pdeathsig=KILL",
            "unshare",
            "--mount",
            "--uts",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]
        inside = ["sh", "-c", ENTER, "sh", self.hosts_file, self.name, *command]
        words = list(map(str, ["nsenter", network, *room, *inside]))
        own = {"GLOO_SOCKET_IFNAME": "eth0"}
        with log.open("w") as out:
            return subprocess.Popen(words, stdout=out, stderr=out, env={**os.environ, **own, **(env or {})})

    def cut(self) -> None:
        """Take the cable out: what is sent gets lost, and nobody is told."""
        _ip("-n", self.switch, "link", "set", self.name, "down")

    def mend(self) -> None:
        """Put the cable back."""
        _ip("-n", self.switch, "link", "set", self.name, "up")


@contextmanager
def make_hosts(count: int) -> Iterator[list[Host]]:
    """So many hosts, connected; gone at the end.

    Raises:
        NoHosts: not Linux, not root, no iproute2, or a container that may not make namespaces.
    """
    stem = f"rto{os.getpid()}-{next(_numbers)}"
    switch, made = f"{stem}-switch", []
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder:
        hosts = [
            Host(f"host-{i}", f"{NETWORK}.{i + 1}", f"{stem}-{i}", switch, Path(folder) / f"hosts-{i}")
            for i in range(count)
        ]
        try:
            for namespace in (switch, *(host.namespace for host in hosts)):
                _ip("netns", "add", namespace)
                made.append(namespace)
            _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", switch, "link", "set", "bridge", "up")
            for host in hosts:
                others = [f"{other.address} {other.name}" for other in hosts if other is not host]
                host.hosts_file.write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {host.name}", *others, ""]))
                cable = ("type", "veth", "peer", "name", "eth0", "netns", host.namespace)
                _ip("-n", switch, "link", "add", host.name, *cable)
                _ip("-n", switch, "link", "set", host.name, "master", "bridge", "up")
                _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    _ip("-n", host.namespace, "link", "set", device, "up")
            _try_to_enter(hosts[0], Path(folder) / "log")
            yield hosts
        finally:
            for namespace in made:
                subprocess.run(["ip", "netns", "delete", namespace], check=False)


def _ip(*words: str) -> None:
    try:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise NoHosts("there is no `ip`; install iproute2") from None
    except subprocess.CalledProcessError as error:
        raise NoHosts(f"ip {' '.join(words)}: {error.stderr.strip()}") from None


def _try_to_enter(host: Host, log: Path) -> None:
    try:
        code = host.start(["true"], log).wait(timeout=20)
    except FileNotFoundError as error:
        raise NoHosts(f"{error}; install util-linux") from None
    if code:
        raise NoHosts(f"no process can be started in a namespace: {log.read_text().strip()}")


def launch_words(hosts: Sequence[Host], host: Host, words: Sequence[str]) -> list[str]:
    """What a host runs: our launcher, and torchrun's words for a meeting point on the first host."""
    first = hosts[0]
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={first.name}:{PORT}", "--rdzv-id=hosts"]
    meeting += [f"--rdzv-conf=is_host={int(host is first)}", f"--local-addr={host.name}"]
    return [sys.executable, "-m", "rto_megatron.launch", f"--nnodes={len(hosts)}", *meeting, *words]


def main() -> int:
    """Make the hosts, start the words on each, show what they print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--cut", type=int, help="host, from 0, whose cable is taken out")
    parser.add_argument("--when", default="", help="the cut comes with the first line that has these words")
    parser.add_argument("--log-dir", type=Path, help="folder for each host's output")
    parser.add_argument("words", nargs="+", help="torchrun's words, then -m rto_megatron STAGE ...")
    options = parser.parse_args()
    folder = options.log_dir or Path(tempfile.mkdtemp(prefix="hosts-"))
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the hosts go too
    with make_hosts(options.hosts) as hosts:
        logs = [folder / f"{host.name}.log" for host in hosts]
        processes = [
            host.start(launch_words(hosts, host, options.words), log) for host, log in zip(hosts, logs, strict=True)
        ]
        to_cut = hosts[options.cut] if options.cut is not None else None
        began, shown, running = time.monotonic(), [0] * len(hosts), list(processes)
        try:
            while running:
                ended = [process for process in running if process.poll() is not None]
                for number, (host, log) in enumerate(zip(hosts, logs, strict=True)):
                    lines = _whole_lines(log, shown[number])
                    shown[number] += sum(map(len, lines))
                    for line in lines:
                        _say(began, host, line.decode(errors="replace").rstrip("\n"))
                        if to_cut and options.when in line.decode(errors="replace"):
                            to_cut.cut()
                            _say(began, to_cut, "its cable is out")
                            to_cut = None
                for process in ended:
                    _say(began, hosts[processes.index(process)], f"ended with exit code {process.returncode}")
                    running.remove(process)
                time.sleep(0.2)
        finally:
            for process in running:
                process.kill()
    print(f"logs in {folder}")
    return next((process.returncode for process in processes if process.returncode), 0)


def _whole_lines(log: Path, start: int) -> list[bytes]:
    with log.open("rb") as file:
        file.seek(start)
        return [line for line in file if line.endswith(b"\n")]


def _say(began: float, host: Host, text: str) -> None:
    print(f"{time.monotonic() - began:6.1f} {host.name}: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
