"""Hosts that are apart: network namespaces joined only by this process, which carries their packets late, loses some, or cuts a host off.

Each host has a TUN device (tun(4)), a network, a name and an /etc/hosts of its own. What it sends arrives here as IP packets, so
every connection passes, whatever its ports are. Linux, as root. When the process ends, the kernel takes all of it back.
"""

import contextlib
import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import subprocess
import threading
import time
from typing import NamedTuple

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
NETWORK, PORT = "10.77.0", 7000  # a coordinator's port, below those that the kernel gives


class Host(NamedTuple):
    """A namespace: `inside` is what precedes a command to run it there."""

    address: str
    inside: tuple[str, ...]
    tun: int
    holder: subprocess.Popen

    @property
    def coordinator(self):
        return f"{self.address}:{PORT}"


def _make_host(index, hosts_file):
    """A host that reaches the others through its TUN device, whose other end is the file `tun` here."""
    name, address = f"apart{index}", f"{NETWORK}.{index + 1}"
    hold = 'mount --bind "$1" /etc/hosts && hostname "$2" && ip link set lo up && echo ready && exec sleep infinity'
    command = ["unshare", "--net", "--uts", "--mount", "sh", "-c", hold, "sh", hosts_file, name]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "ready\n", f"no namespaces: {' '.join(command[:4])} needs root"
        inside = ("nsenter", f"--target={holder.pid}", "--net", "--uts", "--mount", "env", f"--chdir={os.getcwd()}")
        tun, device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK), f"ap{os.getpid()}-{index}"
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI))
        for words in (
            ["ip", "link", "set", device, "netns", str(holder.pid)],
            [*inside, "ip", "address", "add", f"{address}/24", "dev", device],
            [*inside, "ip", "link", "set", device, "up"],
        ):
            subprocess.run(words, check=True)
    except BaseException:
        holder.kill()
        raise
    return Host(address, inside, tun, holder)


class Network:
    """The hosts and what lies between them. `delay` (seconds, one way) and `loss` (a share of packets) may be set at any time."""

    def __init__(self, hosts, delay, loss):
        self.hosts, self.delay, self.loss = hosts, delay, loss
        self.carried = self.lost = 0
        self._away, self._due, self._number, self._draw = set(), [], itertools.count(), random.Random(0)
        self._wake, self._stop = os.pipe()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def cut(self, index):
        """Nothing reaches this host any more or leaves it, not even what is on its way; nobody is told."""
        self._away.add(index)

    def heal(self, index):
        self._away.discard(index)

    def _carry(self):
        tuns = [host.tun for host in self.hosts]
        while True:
            wait = max(0, self._due[0][0] - time.monotonic()) if self._due else None
            ready = select.select([*tuns, self._wake], [], [], wait)[0]
            if self._wake in ready:
                return
            for tun in ready:
                self._take(tuns.index(tun))
            while self._due and self._due[0][0] <= time.monotonic():
                self._give(*heapq.heappop(self._due)[2:])

    def _take(self, source):
        """Read what a host has sent."""
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = os.read(self.hosts[source].tun, 65536)
                target = packet[19] - 1  # last byte of the destination of an IPv4 packet
                if packet[0] >> 4 == 4 and 0 <= target < len(self.hosts):
                    late = time.monotonic() + self.delay
                    heapq.heappush(self._due, (late, next(self._number), source, target, packet))

    def _give(self, source, target, packet):
        if {source, target} & self._away or self._draw.random() < self.loss:
            self.lost += 1
            return
        self.carried += 1
        with contextlib.suppress(OSError):  # its queue is full: lost too
            os.write(self.hosts[target].tun, packet)

    def close(self):
        os.close(self._stop)
        self._thread.join()
        os.close(self._wake)
        for host in self.hosts:
            os.close(host.tun)
            host.holder.kill()
            host.holder.communicate()


@contextlib.contextmanager
def apart(count, folder, delay=0.0, loss=0.0):
    """A Network of `count` hosts; `folder` is for its files."""
    hosts_file, hosts = folder / "hosts", []
    names = [f"{NETWORK}.{index + 1} apart{index}\n" for index in range(count)]
    hosts_file.write_text("".join(["127.0.0.1 localhost\n", *names]))
    with contextlib.ExitStack() as stack:
        for index in range(count):
            hosts.append(_make_host(index, hosts_file))
            stack.callback(hosts[-1].holder.kill)
        network = Network(hosts, delay, loss)
        stack.callback(network.close)
        yield network
