"""Nodes on one machine: network namespaces that are joined, and ranks in them.

A bridge joins them, whose links the kernel delays and limits; or where it can't delay them, a
thread that forwards packets.

The namespaces have no names. Each lives as long as a process in it, so the kernel takes it away,
with its interfaces, when the processes that this file starts have ended, however the tests end.
"""

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import sys
import time

from gloo import context

from helpers.forwarder import CLONE_NEWNET, Forwarder

CLONE_NEWUTS = 0x04000000
RATE, BYTES_PER_SECOND, DELAY = "50mbit", 50e6 / 8, 0.001


class NetworkError(Exception):
    """This machine makes no network namespaces, or no interfaces for them."""


class Network:
    """Nodes 10.77.0.1, 10.77.0.2, ... with a link each to the others; a context manager."""

    def __init__(self, n_nodes):
        if not sys.platform.startswith("linux") or os.geteuid():
            raise NetworkError("network namespaces need Linux and its root user")
        missing = [name for name in ("unshare", "nsenter", "ip", "tc") if not shutil.which(name)]
        if missing:
            raise NetworkError(f"no program {missing}")
        self._holders = []
        self.nodes, self.limits = [], set()
        self._forwarder = None
        try:
            self._switch = self._make_namespace()
            if not self._can_delay() and os.access("/dev/net/tun", os.R_OK | os.W_OK):
                self._forwarder = Forwarder(DELAY, BYTES_PER_SECOND)
                self.limits.add(f"a thread: {RATE}, {1e3 * DELAY:g} ms")
            else:
                self._set(self._switch, "ip link add br0 type bridge", "ip link set br0 up")
            for node in range(n_nodes):
                self._add_node(node)
            if self._forwarder:
                self._forwarder.start()
        except BaseException:
            self.close()
            raise

    def _can_delay(self):
        """Say whether the kernel delays packets."""
        with contextlib.suppress(NetworkError):
            self._set(self._switch, "tc qdisc add dev lo root netem delay 1ms")
            return True
        return False

    def _make_namespace(self):
        """Start a process in a namespace of its own; return its process id."""
        # It ends with its input, which is this process's end of a pipe.
        holder = subprocess.Popen(
            ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._holders.append(holder)
        own = os.readlink("/proc/self/ns/net")
        deadline = time.monotonic() + 10
        while True:
            if holder.poll() is not None:
                raise NetworkError(holder.stderr.read().decode().strip())
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{holder.pid}/ns/net") != own:
                    return holder.pid
            if time.monotonic() > deadline:
                raise NetworkError("unshare made no namespace in 10 s")
            time.sleep(0.01)

    def _set(self, pid, *commands):
        """Run commands in the namespace of a process."""
        for command in commands:
            done = subprocess.run(
                ["nsenter", f"--net=/proc/{pid}/ns/net", *command.split()],
                capture_output=True, text=True, timeout=20,
            )  # fmt: skip
            if done.returncode:
                raise NetworkError(f"{command}: {done.stderr.strip()}")

    def _add_node(self, node):
        pid = self._make_namespace()
        self.nodes.append(pid)
        address = f"ip address add {self.address(node)}/24 dev eth0"
        if self._forwarder:
            try:
                self._forwarder.make_device(pid, "eth0", self.address(node))
            except OSError as error:
                raise NetworkError(f"no TUN device: {error}") from error
            self._set(pid, "ip link set lo up", address, "ip link set eth0 mtu 9000 up")
            return
        self._set(
            self._switch,
            f"ip link add port{node} type veth peer name eth0 netns {pid}",
            f"ip link set port{node} master br0",
            f"ip link set port{node} up",
        )
        self._set(pid, "ip link set lo up", address, "ip link set eth0 up")
        self._limit(self._switch, f"port{node}")
        self._limit(pid, "eth0")

    def _limit(self, pid, interface):
        """Limit what leaves by an interface, by the first of the ways that this kernel has."""
        for limit in (
            f"netem delay 1ms rate {RATE}",
            f"tbf rate {RATE} burst 8kb latency 400ms",
            None,
        ):
            with contextlib.suppress(NetworkError):
                if limit:
                    self._set(pid, f"tc qdisc add dev {interface} root {limit}")
                self.limits.add(limit)
                return

    @staticmethod
    def address(node):
        """Address of a node in the network."""
        return f"10.77.0.{node + 1}"

    def stall(self, node):
        """Let the link drop everything; the node still sees a carrier."""
        if self._forwarder:
            self._forwarder.dropped.add(node)
        else:
            self._set(self._switch, f"ip link set port{node} nomaster")

    def resume(self, node):
        """Undo `stall`."""
        if self._forwarder:
            self._forwarder.dropped.discard(node)
        else:
            self._set(self._switch, f"ip link set port{node} master br0")

    def unplug(self, node):
        """Take the link down, so that nothing tells the others when processes of the node end."""
        if self._forwarder:
            self.stall(node)
        else:
            self._set(self._switch, f"ip link set port{node} down")

    def close(self):
        """End the processes that hold the namespaces; the namespaces end with their last rank."""
        if self._forwarder:
            self._forwarder.close()
        for holder in self._holders:
            holder.kill()
        for holder in self._holders:
            holder.wait()
            holder.stdin.close()
            holder.stderr.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Ranks:
    """A process for each rank, on the given nodes, which obeys orders; a context manager.

    ``obey(rank, order)`` is called in the processes, and its result is sent back.
    """

    def __init__(self, network, node_of_rank, obey):
        self._pipes, self._processes = [], []
        try:
            for rank, node in enumerate(node_of_rank):
                ours, theirs = context().Pipe()
                place = network.nodes[node], f"node{node}"
                process = context().Process(
                    target=_serve, args=(theirs, place, rank, obey), daemon=True
                )
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)
        except BaseException:
            self.close()
            raise

    def order(self, ranks, *order):
        """Send an order to several ranks."""
        for rank in ranks:
            self._pipes[rank].send(order)

    def results(self, ranks, seconds):
        """Return the result of each rank, by rank, and fail if one takes longer."""
        deadline = time.monotonic() + seconds
        found = {}
        for rank in ranks:
            left = max(0.0, deadline - time.monotonic())
            assert self._pipes[rank].poll(left), f"rank {rank} hangs after {seconds} s"
            found[rank] = self._pipes[rank].recv()
            assert not isinstance(found[rank], BaseException), f"rank {rank}: {found[rank]!r}"
        return found

    def kill(self, ranks):
        """Kill the processes of some ranks."""
        for rank in ranks:
            self._processes[rank].kill()
        for rank in ranks:
            self._processes[rank].join(20)

    def close(self):
        """Kill all processes."""
        self.kill(range(len(self._processes)))
        for pipe in self._pipes:
            pipe.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _serve(pipe, place, rank, obey):
    """Enter a namespace, with a host name of its own, and obey orders until the pipe ends."""
    pid, host = place
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) or libc.unshare(CLONE_NEWUTS):
            raise OSError(ctypes.get_errno(), "no namespace")
    socket.sethostname(host)
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    with contextlib.suppress(EOFError):
        while True:
            order = pipe.recv()
            try:
                pipe.send(obey(rank, *order))
            except Exception as error:
                # What refers to a process group can't be sent.
                pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))
    os._exit(0)
