"""A network between namespaces in user space, with a delay and a rate, for kernels without netem.

Each node has a TUN device, whose packets a thread reads, holds back and writes to the device of the
node that they are for.
"""

import ctypes
import fcntl
import heapq
import os
import select
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
# A packet that would wait for longer is dropped, as by a queue that is full.
LONGEST_QUEUE = 0.4
PACKET_BYTES = 65536


class Forwarder:
    """Forwards packets between nodes; each link has a rate in each direction, and a delay.

    Parameters
    ----------
    delay
        Seconds from node to node.
    rate
        Bytes per second.
    """

    def __init__(self, delay, rate):
        self._delay, self._rate = delay, rate
        self._devices, self._addresses = [], {}
        # When each direction of each link has sent what it holds.
        self._free, self._held = {}, []
        self.dropped = set()
        """Nodes whose links drop everything."""
        self._wake, self._stop = os.pipe()
        self._thread = threading.Thread(target=self._forward, daemon=True)

    def make_device(self, pid, name, address):
        """Make a TUN device in the namespace of a process, and add it."""

        def make():
            # A thread enters the namespace by itself, and ends there.
            with open(f"/proc/{pid}/ns/net") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "no namespace")
            device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
            return device

        with ThreadPoolExecutor(1) as maker:
            # What was wrong in the thread is raised here.
            self.add_device(maker.submit(make).result(), address)

    def add_device(self, device, address):
        """Add a file that packets are read from and written to; its node gets the next number."""
        self._addresses[bytes(map(int, address.split(".")))] = len(self._devices)
        self._devices.append(device)

    def start(self):
        """Begin to forward; the devices are up."""
        self._thread.start()

    def _forward(self):
        while True:
            wait = max(0.0, self._held[0][0] - time.monotonic()) if self._held else None
            ready, _, _ = select.select([*self._devices, self._wake], [], [], wait)
            if self._wake in ready:
                return
            for device in ready:
                self._hold(self._devices.index(device), os.read(device, PACKET_BYTES))
            while self._held and self._held[0][0] <= time.monotonic():
                *_, target, packet = heapq.heappop(self._held)
                os.write(self._devices[target], packet)

    def _hold(self, source, packet):
        """Keep a packet until it is due, or drop it."""
        # The address that an IPv4 packet is for.
        target = self._addresses.get(packet[16:20]) if packet[0] >> 4 == 4 else None
        if target is None or {source, target} & self.dropped:
            return
        due = now = time.monotonic()
        for link in ((source, "out"), (target, "in")):
            due = max(due, self._free.get(link, 0.0)) + len(packet) / self._rate
            if due > now + LONGEST_QUEUE:
                return
            self._free[link] = due
        heapq.heappush(self._held, (due + self._delay, len(self._held), target, packet))

    def close(self):
        """End the thread and the devices."""
        os.write(self._stop, b".")
        if self._thread.ident is not None:
            self._thread.join(10)
        for end in (*self._devices, self._wake, self._stop):
            os.close(end)
