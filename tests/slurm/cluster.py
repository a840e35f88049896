"""A real Slurm cluster for one test session: a controller and two nodes, each a host in its own namespaces.

Every host has its own processes, network, host name and mounts. A bridge inside the controller's network namespace connects
them: nothing is reachable from outside, and `localhost` is each host itself. A host exists as long as the pipe to its first
process. Whatever ends this process, kill -9 included, therefore ends the complete cluster.

    python -m tests.slurm.cluster sbatch --test-only slurm/distill_xlmr.sh     one command, or none for a shell
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

SUBNET = "10.91.7"  # exists only inside the namespaces
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "unshare", "nsenter", "ip")
SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
CLIENT_TIMEOUT_S = 120
NODE_LOSS_S = 10  # after which a silent node is DOWN; Slurm's own default is 300
KILL_WAIT_S = 10  # between TERM and KILL
# The first process of a host must reap orphans until its standard input is closed. bash does.
FIRST_PROCESS = """
hostname "$1" && mount --bind "$2/etc/hosts" /etc/hosts && ip link set lo up || exit 1
for gpu in "$2"/dev/gpu*; do mount --bind /dev/null "$gpu" || exit 1; done
echo up
read -r
"""


class ClusterError(RuntimeError):
    """The cluster did not reach a state that a test needs."""


def why_impossible() -> str | None:
    """None when this machine can hold a cluster, else the reason."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=SBIN) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: slurm-wlm slurmctld slurmd slurm-client munge iproute2)"
    if os.geteuid() != 0:
        return "namespaces and slurmd need root"
    tried = subprocess.run(
        ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--mount-proc", "ip", "link", "set", "lo", "up"],
        env={**os.environ, "PATH": SBIN},
        capture_output=True,
        text=True,
    )
    return None if tried.returncode == 0 else f"this machine does not allow namespaces: {tried.stderr.strip()}"


class Host:
    """A set of namespaces with a first process. Its end kills all processes inside immediately, like a power loss."""

    def __init__(self, name: str, address: str, directory: Path):
        self.name, self.address, self._directory = name, address, directory
        self.holder: subprocess.Popen[str] | None = None
        self.pid = 0

    def power_on(self) -> None:
        flags = ["--mount", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["unshare", *flags, "bash", "-c", FIRST_PROCESS, "host", self.name, str(self._directory)]
        log = open(self._directory / "log" / f"{self.name}.host.log", "a")
        with log:
            self.holder = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PATH": SBIN},
                text=True,
                start_new_session=True,  # Ctrl-C must reach only the tests, which then stop the cluster
            )
        assert self.holder.stdout is not None
        if self.holder.stdout.readline().strip() != "up":
            self.power_off()
            raise ClusterError(f"host {self.name} did not start: {Path(log.name).read_text()[-500:]}")
        children = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text().split()
        self.pid = int(children[0])

    @property
    def is_on(self) -> bool:
        return self.holder is not None

    def power_off(self) -> None:
        """SIGKILL to the first process of a PID namespace ends all others of it."""
        if self.holder is None:
            return
        if self.pid and Path(f"/proc/{self.pid}").exists():
            os.kill(self.pid, signal.SIGKILL)
        else:
            self.holder.kill()
        self.holder.wait()  # it waits for the first process, and the kernel for all others
        for pipe in (self.holder.stdin, self.holder.stdout):
            assert pipe is not None
            pipe.close()
        self.holder, self.pid = None, 0

    def enter(self, *command: str, only_network: bool = False) -> list[str]:
        """The command line that runs `command` on this host."""
        spaces = ["--net"] if only_network else ["--mount", "--net", "--uts", "--pid"]
        return ["nsenter", "--target", str(self.pid), *spaces, f"--wd={Path.cwd()}", "--", *command]

    def run_inside(self, *command: str) -> None:
        """Run a command on this host as its administrator. It must succeed."""
        subprocess.run(self.enter(*command), check=True)


class Cluster:
    """Controller `head` and nodes `n1`, `n2`; use it as a context manager.

    `track` is how Slurm finds the processes that a signal is for. linuxproc: all of a step. pgid: the process group of each task.
    torchrun's ranks are in others, so that, as with cgroups, only the launcher receives a signal.
    """

    def __init__(self, directory: Path, num_nodes: int = 2, cpus: int = 16, gpus: int = 2, track: str = "linuxproc"):
        self.directory, self.cpus, self.gpus, self.track = directory, cpus, gpus, track
        self.head = Host("head", f"{SUBNET}.1", directory)
        self.nodes = {f"n{i}": Host(f"n{i}", f"{SUBNET}.{10 + i}", directory) for i in range(1, num_nodes + 1)}

    def __enter__(self) -> Cluster:
        try:
            self._write_configuration()
            self.head.power_on()
            self._on_network("link", "add", "bridge0", "type", "bridge")
            self._on_network("addr", "add", f"{self.head.address}/24", "dev", "bridge0")
            self._on_network("link", "set", "bridge0", "up")
            munge = self.directory / "munge"
            self.run(
                *("munged", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key"),
                *(f"--pid-file={munge}/pid", f"--seed-file={munge}/seed", f"--log-file={munge}/log"),
            )
            self.run("slurmctld")
            for name in self.nodes:
                self.boot(name)
            self.wait_for(lambda: all(self.node_state(name) == "IDLE" for name in self.nodes), "idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for host in (*self.nodes.values(), self.head):
            host.power_off()

    # -- hosts

    def boot(self, name: str) -> None:
        """Switch a node on and start its slurmd."""
        node, port = self.nodes[name], f"to-{name}"
        node.power_on()
        # The kernel removes the network link of the earlier boot somewhat later than its host.
        subprocess.run(self.head.enter("ip", "link", "del", port, only_network=True), capture_output=True)
        peer = ["peer", "name", "eth0", "netns", str(node.pid)]
        self._on_network("link", "add", port, "type", "veth", *peer)
        self._on_network("link", "set", port, "master", "bridge0", "up")
        subprocess.run(node.enter("ip", "addr", "add", f"{node.address}/24", "dev", "eth0"), check=True)
        subprocess.run(node.enter("ip", "link", "set", "eth0", "up"), check=True)
        subprocess.run(node.enter("slurmd", "-N", name), check=True, env=self._environment({}))

    def on_node(self, name: str, *command: str) -> None:
        """Run a command as the administrator of a node."""
        self.nodes[name].run_inside(*command)

    def lose_power(self, name: str) -> None:
        self.nodes[name].power_off()

    def node_state(self, name: str) -> str:
        return self.describe("node", name)["State"]

    def _on_network(self, *arguments: str) -> None:
        done = subprocess.run(
            self.head.enter("ip", *arguments, only_network=True), capture_output=True, text=True, env={"PATH": SBIN}
        )
        if done.returncode != 0:
            raise ClusterError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")

    # -- clients

    def _environment(self, extra: dict[str, str]) -> dict[str, str]:
        ours = {"SLURM_CONF": str(self.directory / "etc" / "slurm.conf"), "PATH": SBIN}
        return {**os.environ, **ours, **extra}

    def attempt(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the controller. Its exit code is not checked."""
        return subprocess.run(
            self.head.enter(*command),
            env=self._environment(environment),
            capture_output=True,
            text=True,
            timeout=CLIENT_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )

    def run(self, *command: str, **environment: str) -> str:
        """Run a command that must succeed on the controller; its output."""
        done = self.attempt(*command, **environment)
        if done.returncode != 0:
            raise ClusterError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, *arguments: str, **environment: str) -> str:
        """sbatch; the job's number."""
        return self.run("sbatch", "--parsable", *arguments, **environment).strip()

    def describe(self, kind: str, name: str) -> dict[str, str]:
        """`scontrol show` as a dictionary; an array gives its last task."""
        shown = self.run("scontrol", "--oneliner", "show", kind, name)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def state(self, job: str) -> str:
        return self.describe("job", job)["JobState"]

    def wait_for(self, holds: Callable[[], Any], what: str, timeout_s: float = 240) -> None:
        """Poll until `holds()` is true."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > deadline:
                raise ClusterError(f"no {what} within {timeout_s:.0f} s\n{self.run('squeue')}{self.run('sinfo')}")
            time.sleep(0.1)

    def wait_state(self, job: str, *states: str, timeout_s: float = 240) -> str:
        """Wait until the job is in one of `states`; which one."""
        self.wait_for(lambda: self.state(job) in states, f"{' or '.join(states)} of job {job}", timeout_s)
        return self.state(job)

    def end(self, jobs: Iterable[str]) -> None:
        """Cancel the jobs and wait until they have left the queue."""
        jobs = list(jobs)
        self.attempt("scancel", *jobs)
        self.wait_for(lambda: not self.run("squeue", "--noheader", f"--jobs={','.join(jobs)}").strip(), "end of jobs")

    # -- configuration

    def _write_configuration(self) -> None:
        for name in ("etc", "log", "dev", "state", "spool", "munge"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        key = self.directory / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        names = [f"{host.address} {host.name}" for host in (self.head, *self.nodes.values())]
        (self.directory / "etc" / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        for number in range(self.gpus):
            (self.directory / "dev" / f"gpu{number}").touch()
        gres = f"Name=gpu Type=fake File={self.directory}/dev/gpu[0-{self.gpus - 1}]\n"
        (self.directory / "etc" / "gres.conf").write_text(gres)
        (self.directory / "etc" / "slurm.conf").write_text(self._slurm_conf())

    def _slurm_conf(self) -> str:
        nodes = "\n".join(f"NodeName={n.name} NodeHostname={n.name} NodeAddr={n.address}" for n in self.nodes.values())
        template = (Path(__file__).parent / "slurm.conf").read_text()
        values = {"DIRECTORY": self.directory, "ADDRESS": self.head.address, "NODES": nodes, "CPUS": self.cpus}
        values |= {"GPUS": self.gpus, "TRACK": self.track, "NODE_LOSS_S": NODE_LOSS_S, "KILL_WAIT_S": KILL_WAIT_S}
        for name, value in values.items():
            template = template.replace(f"@{name}@", str(value))
        return template


def main(command: list[str]) -> int:
    """One command, or a shell, on the controller of a fresh cluster."""
    if reason := why_impossible():
        print(f"error: no cluster on this machine: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="slurm-") as directory, Cluster(Path(directory)) as cluster:
        return subprocess.run(cluster.head.enter(*(command or ["bash"])), env=cluster._environment({})).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
