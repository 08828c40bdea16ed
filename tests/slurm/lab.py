"""Run a real Slurm cluster of several nodes on one Linux machine. This needs root and Debian's packages:

    apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins iproute2

Each node and the head has its own network, host name, mounts and processes (Linux namespaces). The machine itself is
not changed. `python tests/slurm/lab.py DIRECTORY` starts a cluster and opens a shell on its head. The cluster ends with
the shell.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NETWORK = "10.78.0"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter", "setpriv")
CONFIG = """
ClusterName=lab
SlurmctldHost=head
SlurmUser=root
AuthInfo=socket={place}/munge/socket,cred_expire=5
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool/%n
SlurmctldPidFile={place}/head.pid
SlurmdPidFile={place}/%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
GresTypes=gpu
DefMemPerCPU=100
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MessageTimeout=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SlurmdParameters=config_overrides
NodeName=node[1-{nodes}] CPUs=8 RealMemory=64000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
# The first process of a node sets the node up and then only reaps orphans.
BOOT = """
mount -t proc proc /proc
mount --bind "$2/hosts" /etc/hosts
mount -t tmpfs tmpfs /dev/shm
echo "$1" > /proc/sys/kernel/hostname
ip link set lo up
touch "$2/$1.up"
trap : TERM INT HUP
while :; do sleep 100000 & wait $!; done
"""


def why_not() -> str | None:
    """Return why no lab can be started here, or None."""
    if os.geteuid() != 0:
        return "a Slurm lab needs root"
    missing = [
        program for program in PROGRAMS if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    ]
    return f"a Slurm lab needs {', '.join(missing)}" if missing else None


class Lab:
    """A cluster of a head and `nodes` nodes with `gpus` fake GPUs each."""

    def __init__(self, place: Path, nodes: int = 3, gpus: int = 2) -> None:
        self.place, self.nodes = place, [f"node{number}" for number in range(1, nodes + 1)]
        self.processes: dict[str, int] = {}  # of each node's first process, as the machine counts them
        self.parents: dict[str, subprocess.Popen] = {}  # of those
        self.addresses = {"head": f"{NETWORK}.1"} | {node: f"{NETWORK}.{11 + i}" for i, node in enumerate(self.nodes)}
        for folder in ("munge", "state", "spool", "dev"):
            (place / folder).mkdir(parents=True)
        for directory in (place, *place.parents):  # munge's own user must get through
            if directory.stat().st_uid == os.geteuid() and not directory.stat().st_mode & 1:
                directory.chmod(directory.stat().st_mode | 0o111)
        (place / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in self.addresses.items())
        )
        (place / "slurm.conf").write_text(CONFIG.format(place=place, nodes=nodes, gpus=gpus))
        (place / "gres.conf").write_text(f"Name=gpu File={place}/dev/nvidia[0-{gpus - 1}]\n")
        for gpu in range(gpus):  # copies of /dev/null: enough for Slurm to hand them out
            os.mknod(place / "dev" / f"nvidia{gpu}", 0o600 | 0o020000, os.makedev(1, 3))

    def boot_head(self) -> None:
        """Boot the head, whose bridge connects the nodes."""
        self._boot("head")
        for command in ("ip link add br0 type bridge", f"ip addr add {NETWORK}.1/24 dev br0", "ip link set br0 up"):
            self.sh(*command.split())

    def up(self) -> None:
        """Start the head and all nodes; return when Slurm reports them as idle."""
        self.boot_head()
        munge = self.place / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        shutil.chown(munge, "munge", "munge")
        shutil.chown(munge / "key", "munge", "munge")
        (munge / "key").chmod(0o400)
        munge.chmod(0o755)
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        files = [f"--{option}={munge}/{file}" for option, file in names.items()]
        self.sh("setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged", *files)
        self.sh("slurmctld", "-i")
        for node in self.nodes:
            self.start(node)
        deadline = time.monotonic() + 60
        while self.sh("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N", check=False).split() != self.nodes:
            assert time.monotonic() < deadline, self.sh("sinfo", check=False)
            time.sleep(0.1)

    def down(self) -> None:
        """End every process of the cluster."""
        for node in list(self.processes):
            self.kill(node)

    def _boot(self, node: str) -> None:
        (self.place / f"{node}.up").unlink(missing_ok=True)
        command = ["unshare", "-n", "-u", "-m", "-p", "-f", "--kill-child", "--propagation", "private"]
        with open(self.place / f"{node}.boot", "w") as log:
            arguments = ["bash", "-c", BOOT, node, node, str(self.place)]
            outer = self.parents[node] = subprocess.Popen([*command, *arguments], stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not (self.place / f"{node}.up").exists():
            assert time.monotonic() < deadline, (self.place / f"{node}.boot").read_text()
            time.sleep(0.01)
        self.processes[node] = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()[0])

    def boot(self, node: str) -> None:
        """Boot a node and connect it to the head's bridge."""
        self._boot(node)
        head = ["nsenter", "-t", str(self.processes["head"]), "-n", "ip", "link"]  # in our own count of processes
        end = ["type", "veth", "peer", "name", "eth0", "netns", str(self.processes[node])]
        subprocess.run([*head, "add", f"v-{node}", *end], check=True)
        subprocess.run([*head, "set", f"v-{node}", "master", "br0", "up"], check=True)
        mac = f"02:00:00:00:00:{int(self.addresses[node].split('.')[-1]):02x}"  # others keep it in their ARP tables
        self.run_on(node, "ip", "link", "set", "eth0", "address", mac)
        self.run_on(node, "ip", "addr", "add", f"{self.addresses[node]}/24", "dev", "eth0")
        self.run_on(node, "ip", "link", "set", "eth0", "up")

    def start(self, node: str) -> None:
        """Boot a node and start its daemon."""
        self.boot(node)
        self.run_on(node, "slurmd", "-N", node)

    def kill(self, node: str) -> None:
        """End all processes of a node at once, as a power failure does."""
        os.kill(self.processes.pop(node), signal.SIGKILL)
        self.parents.pop(node).wait()

    def netdown(self, node: str) -> None:
        """Cut a node off from the network. Its processes continue to run."""
        self.sh("ip", "link", "set", f"v-{node}", "down")

    def netup(self, node: str) -> None:
        """Connect a node again."""
        self.sh("ip", "link", "set", f"v-{node}", "up")

    def enter(self, node: str, cwd: Path | None = None) -> list[str]:
        """Return the command that runs the one after it on a node."""
        target = ["nsenter", "-t", str(self.processes[node])]
        return [*target, "-m", "-u", "-n", "-p", f"--wdns={cwd or Path.cwd()}", "--"]

    def run_on(self, node: str, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        """Run a command on a node; return what it printed."""
        env = os.environ | {"SLURM_CONF": f"{self.place}/slurm.conf", "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        with tempfile.TemporaryFile("w+") as output:  # a daemon would keep a pipe open
            done = subprocess.run(
                [*self.enter(node, cwd), *command], stdout=output, stderr=subprocess.STDOUT, env=env, timeout=120
            )
            output.seek(0)
            text = output.read()
        assert not check or done.returncode == 0, f"{command} on {node}: {done.returncode}\n{text}"
        return text

    def sh(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        """Run a command on the head; return what it printed."""
        return self.run_on("head", *command, check=check, cwd=cwd)


@contextmanager
def lab(place: Path, nodes: int = 3, gpus: int = 2) -> Iterator[Lab]:
    """Run a cluster and end it in every case."""
    cluster = Lab(place, nodes, gpus)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(reason)
    with lab(Path(sys.argv[1]).absolute()) as started:
        subprocess.run([*started.enter("head"), "bash"], env=os.environ | {"SLURM_CONF": f"{started.place}/slurm.conf"})
