"""A real SLURM on this machine for the time of a test run: munged, slurmctld and two slurmd, from packages that are only unpacked.

    python tests/slurm_cluster.py unpack      # scripts/test.sh does this once: Debian's packages into build/slurm_packages, 3.5 MB

    with Cluster(packages(), namespaces=True) as cluster:
        job = cluster.submit("--nodes=2", "slurm/train.sbatch", ...)
        cluster.wait(job, "COMPLETED")

Nothing is installed and nothing outside the cluster's own folder is written. With `namespaces` (root alone) each node has a host name,
a loopback interface and a network of its own, as on a real cluster; the rest of the world lies behind an interface that leads nowhere
and counts what is sent there. Without, both nodes are this machine.
"""

import contextlib
import json
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ROOT / "build" / "slurm_packages"
WANTED = ("slurmctld", "slurmd", "slurm-client", "munge")
FREEZER = Path("/sys/fs/cgroup/freezer")
CPUS, GPUS = 8, 2
"""Of each node, as SLURM believes: CPUs are shares of the machine's cores, and a GPU is a link to /dev/null."""


class CannotStart(Exception):
    """Why there is no SLURM here."""


# ---- packages ------------------------------------------------------------------------------------------------------------------


def unpack() -> None:
    """Debian's or Ubuntu's packages, with what they need and this machine lacks, into PACKAGES. Raises CannotStart."""
    if (PACKAGES / "complete").exists():
        return
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise CannotStart("SLURM's packages come from Debian or Ubuntu, and there is no apt-get here")
    shutil.rmtree(PACKAGES, ignore_errors=True)
    PACKAGES.mkdir(parents=True)
    try:
        options: list[str] = []
        if not (names := missing_packages(options)):  # no package lists, as in many container images: get them, beside the system's
            lists = PACKAGES / "apt"
            (lists / "lists" / "partial").mkdir(parents=True)
            (lists / "archives" / "partial").mkdir(parents=True)
            options = ["-o", f"Dir::State::lists={lists / 'lists'}", "-o", f"Dir::Cache={lists}", "-o", "APT::Sandbox::User="]
            run_apt([*options, "update"], PACKAGES)
            names = missing_packages(options)
        run_apt([*options, "download", *(names or WANTED)], PACKAGES)
        for package in sorted(PACKAGES.glob("*.deb")):
            subprocess.run(["dpkg", "-x", package, PACKAGES / "root"], check=True, capture_output=True)
            package.unlink()
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        output = (error.stderr or b"").decode(errors="replace").strip().splitlines() or [str(error)]
        raise CannotStart(f"SLURM's packages cannot be had: {output[-1]}") from None
    shutil.rmtree(PACKAGES / "apt", ignore_errors=True)
    (PACKAGES / "complete").touch()


def missing_packages(options: Sequence[str]) -> list[str]:
    """WANTED and what they depend on that is not installed here."""
    command = ["apt-get", *options, "-s", "install", "--no-install-recommends", *WANTED]
    done = subprocess.run(command, capture_output=True, text=True)
    return re.findall(r"^Inst (\S+)", done.stdout, re.MULTILINE)


def run_apt(arguments: Sequence[str], folder: Path) -> None:
    subprocess.run(["apt-get", "-q", *arguments], check=True, capture_output=True, cwd=folder, timeout=120)


def packages() -> dict[str, str]:
    """The environment in which SLURM's programs are found. Raises CannotStart if they are nowhere."""
    root = PACKAGES / "root" / "usr"
    if not (PACKAGES / "complete").exists():
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        if all(shutil.which(name, path=path) for name in ("munged", "slurmctld", "slurmd", "sbatch")):
            return {"PATH": path}
        raise CannotStart("there is no SLURM here; `bash scripts/test.sh` unpacks Debian's or Ubuntu's packages, nothing is installed")
    plugins = next(root.glob("lib/*/slurm-wlm"))
    libraries = f"{plugins}:{plugins.parent}"
    if inherited := os.environ.get("LD_LIBRARY_PATH"):
        libraries += f":{inherited}"
    for name in ("slurmctld", "slurmd", "slurmstepd"):  # a link that Debian's alternatives would make
        link = root / "sbin" / name
        if not link.exists():
            link.symlink_to(f"{name}-wlm")
    return {"PATH": f"{root / 'sbin'}:{root / 'bin'}:{os.environ['PATH']}:/usr/sbin:/sbin", "LD_LIBRARY_PATH": libraries}


# ---- the cluster ---------------------------------------------------------------------------------------------------------------


def why_no_namespaces() -> str | None:
    """Why nodes cannot have networks of their own here, or None if they can."""
    if os.geteuid() != 0:
        return "only root can give each node a network of its own"
    for tool in ("ip", "unshare", "nsenter", "mount", "hostname"):
        if shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None:
            return f"each node having a network of its own needs the command {tool}"
    name = f"qst{os.getpid() % 100000}"
    make = f"ip link add {name} type bridge && ip link del {name} && unshare --net --uts --mount true"
    tried = subprocess.run(["sh", "-c", make], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"this machine makes no network namespaces: {tried.stderr.strip()}"


class Cluster:
    """Two nodes, partitions `normal` and `high`, which preempts. A context manager."""

    def __init__(self, programs: dict[str, str], namespaces: bool, nodes: int = 2) -> None:
        self.namespaces = namespaces
        self.base_port = free_ports(nodes + 1)
        tag = f"q{self.base_port}"  # SLURM names a node's cgroup for the node: no other cluster here may have the same
        self.nodes = [f"{tag}n{i + 1}" for i in range(nodes)]
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: the path of a socket has 108 bytes at most
        self.env = {**os.environ, **programs, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.bridge, self.network = f"{tag}br", f"10.213.{self.base_port % 250}"

    # ---- up and down ------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException as error:
            self.stop()
            if isinstance(error, TimeoutError | subprocess.CalledProcessError | OSError):
                raise CannotStart(str(error)) from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        for name in ("munge", "ctld", "log", "gpu", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True, mode=0o755)
        self.folder.chmod(0o755)
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        if self.namespaces:
            self._make_networks()
        self._write_configuration()
        munge = [f"--{name}={self.folder / 'munge' / file}" for name, file in MUNGE_FILES.items()]
        self._spawn("munged", ["munged", "--foreground", "--num-threads=2", *munge])
        wait_until((self.folder / "munge" / "socket").exists, 10, "munged does not come up", self.logs)
        self._spawn("slurmctld", [*self._inside_controller(), "slurmctld", "-D", "-f", self.env["SLURM_CONF"]])
        for node in self.nodes:
            self.start_node(node)
        wait_until(lambda: len(self.ask("sinfo", "-h", "-N", "-t", "idle", "-p", "normal", "-o", "%N").split()) == len(self.nodes), 30,
                   "SLURM's nodes do not come up", self.logs)  # fmt: skip

    def stop(self) -> None:
        """End every job and process, and remove every trace."""
        with contextlib.suppress(subprocess.TimeoutExpired, FileNotFoundError):
            if "slurmctld" in self.daemons:
                self.ask("scancel", "--full", "--user", pwd.getpwuid(os.geteuid()).pw_name)
                deadline = time.monotonic() + 10
                while self.ask("squeue", "-h") and time.monotonic() < deadline:
                    time.sleep(0.1)
        for name in sorted(self.daemons, key=lambda n: ("holder" in n, n == "munged")):  # they need munged to the end
            end(self.daemons[name])
        for pid in self.processes():  # what a job has left behind
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.namespaces:
            subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)
        for node in self.nodes:
            for folder in sorted((FREEZER / f"slurm_{node}").glob("**/"), reverse=True):
                with contextlib.suppress(OSError):
                    folder.rmdir()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/"
            )

    def _write_configuration(self) -> None:
        host, user = socket.gethostname().split(".")[0], pwd.getpwuid(os.geteuid()).pw_name
        version = subprocess.run(["slurmctld", "-V"], env=self.env, capture_output=True, text=True, check=True).stdout.split()[-1]
        own_cgroups = os.geteuid() == 0 and os.access(FREEZER / "cgroup.procs", os.W_OK)
        inherits = "disabled" if tuple(map(int, version.split(".")[:2])) >= (23, 2) else "cgroup/v1"
        cgroup = ["CgroupMountpoint=/sys/fs/cgroup", "ConstrainCores=no", "ConstrainRAMSpace=no", "ConstrainDevices=no"]
        plugin = "cgroup/v1" if own_cgroups else inherits
        write_lines(self.folder / "cgroup.conf", f"CgroupPlugin={plugin}", *cgroup)
        for i in range(GPUS):  # SLURM wants a device for each; the digit becomes its number in CUDA_VISIBLE_DEVICES
            (self.folder / "gpu" / f"nvidia{i}").symlink_to("/dev/null")
        first, last = self.nodes[0], self.nodes[-1]
        names = f"{first[:-1]}[1-{last[-1]}]"
        devices = f"NodeName={names} Name=gpu File={self.folder}/gpu/nvidia[0-{GPUS - 1}]"
        write_lines(self.folder / "gres.conf", "AutoDetect=off", devices)
        ports = f"[{self.base_port + 1}-{self.base_port + len(self.nodes)}]"
        if self.namespaces:
            controller, where, communication = f"{self.network}.254", f"Port={self.base_port + 1}", "NoInAddrAny,NoCtldInAddrAny"
        else:
            # The daemons listen where this machine's own name leads to; where it leads nowhere, on every interface.
            controller, communication = "127.0.0.1", ""
            with contextlib.suppress(OSError):
                controller, communication = socket.gethostbyname(host), "NoInAddrAny,NoCtldInAddrAny"
            where = f"NodeHostname={host} NodeAddr={controller} Port={ports}"
        memory = psutil.virtual_memory().total // 2**21
        settings = {
            "ClusterName": "tests",
            "SlurmctldHost": f"{host}({controller})",
            "SlurmctldPort": self.base_port,
            "SlurmUser": user,
            "SlurmdUser": user,
            "AuthType": "auth/munge",
            "CredType": "cred/munge",
            "AuthInfo": f"socket={self.folder}/munge/socket,cred_expire=5",  # a requeued job waits for as long before it starts again
            "CommunicationParameters": communication,
            "StateSaveLocation": self.folder / "ctld",
            "SlurmdSpoolDir": self.folder / "spool" / "%n",
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdPidFile": self.folder / "slurmd.%n.pid",
            "SlurmctldLogFile": self.folder / "log" / "slurmctld.log",
            "SlurmdLogFile": self.folder / "log" / "slurmd.%n.log",
            "ProctrackType": "proctrack/cgroup" if own_cgroups else "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "MailProg": "/bin/true",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=5,bf_interval=5",
            "EnforcePartLimits": "ALL",
            "GresTypes": "gpu",
            "JobRequeue": 1,
            "ReturnToService": 2,
            "SlurmdParameters": "config_overrides",  # 8 CPUs on fewer cores
            "KillWait": 20,  # by default 30: a job that is asked to end on a busy machine needs more than a few
            "UnkillableStepTimeout": 20,
            "MinJobAge": 3600,
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
        }
        if plugins := re.match(r"[^:]*/slurm-wlm", self.env.get("LD_LIBRARY_PATH", "")):
            settings["PluginDir"] = plugins[0]
        lines = [f"{key}={value}" for key, value in settings.items() if value != ""]
        lines.append(f"NodeName={names} {where} CPUs={CPUS} RealMemory={memory} Gres=gpu:{GPUS} State=UNKNOWN")
        lines.append("PartitionName=normal Nodes=ALL Default=YES State=UP PriorityTier=10 PreemptMode=REQUEUE GraceTime=20")
        lines.append("PartitionName=high Nodes=ALL State=UP PriorityTier=20 PreemptMode=OFF")
        write_lines(self.folder / "slurm.conf", *lines)

    # ---- nodes ------------------------------------------------------------------------------------------------------------------

    def start_node(self, node: str) -> None:
        """Start its slurmd, at first or after a crash."""
        stepd = self.which("slurmstepd")
        enter = ["nsenter", f"--target={self.daemons[f'holder {node}'].pid}", "--net", "--uts", "--mount"] if self.namespaces else []
        self._spawn(node, [*enter, "slurmd", "-D", "-f", self.env["SLURM_CONF"], "-N", node, *(["-d", stepd] if stepd else [])])

    def crash(self, node: str) -> None:
        """Kill everything that runs on a node, and tell SLURM, which would notice by itself after minutes."""
        slurmd = self.daemons[node]
        pids = self.processes(node)
        for pid in [slurmd.pid, *sorted(pids, key=lambda pid: not self._is_slurmstepd(pid))]:  # which would report the others' deaths
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        slurmd.wait()
        self.ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=crashed")

    @staticmethod
    def _is_slurmstepd(pid: int) -> bool:
        with contextlib.suppress(psutil.Error):
            return psutil.Process(pid).name().startswith("slurmstepd")
        return False

    def processes(self, node: str | None = None) -> list[int]:
        """Processes of the cluster's jobs, or of one node's: tasks know where they run, their slurmstepd by its socket."""
        spool = str(self.folder / "spool" / (node or ""))

        def is_ours(process: psutil.Process) -> bool:
            if process.name().startswith("slurmstepd"):
                return any(c.laddr.startswith(spool) for c in process.net_connections("unix"))
            env = process.environ()
            return env.get("SLURM_CONF") == self.env["SLURM_CONF"] and env.get("SLURMD_NODENAME") in ([node] if node else self.nodes)

        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if is_ours(process):
                    found.append(process.pid)
        return found

    def _inside_controller(self) -> list[str]:
        if not self.namespaces:
            return []
        # It listens where this machine's name leads to, which has to be the bridge here.
        return ["unshare", "--mount", "sh", "-c", f'mount --bind {self.folder}/hosts /etc/hosts && exec "$@"', "sh"]

    def _make_networks(self) -> None:
        addresses = {f"{self.network}.{i + 1}": node for i, node in enumerate(self.nodes)}
        addresses[f"{self.network}.254"] = socket.gethostname().split(".")[0]
        # torch asks for the names of IPv4 addresses in their IPv6 form
        hosts = [f"{form}{address} {name}" for address, name in addresses.items() for form in ("", "::ffff:")]
        write_lines(self.folder / "hosts", "127.0.0.1 localhost", *hosts)
        write_lines(self.folder / "resolv.conf", "nameserver 192.0.2.53", "options timeout:1 attempts:1")  # an address that nobody has
        shell(f"""ip link add {self.bridge} type bridge
            ip address add {self.network}.254/24 dev {self.bridge}
            ip link set {self.bridge} up""")
        for i, node in enumerate(self.nodes):
            self._spawn(f"holder {node}", ["unshare", "--net", "--uts", "--mount", "sleep", "infinity"])
            pid = self.daemons[f"holder {node}"].pid
            wait_until(lambda pid=pid: Path(f"/proc/{pid}/comm").read_text() == "sleep\n", 5, "unshare does not come up", self.logs)
            shell(f"ip link add {node} type veth peer name eth0 netns {pid} && ip link set {node} master {self.bridge} up")
            # The way out of the cluster: whatever a node sends beyond it, be it a question to a name server, is counted here and lost.
            shell(
                f"""ip address add {self.network}.{i + 1}/24 dev eth0; ip link set lo up; ip link set eth0 up
                ip link add {OUTSIDE} type veth peer name nowhere
                ip link set {OUTSIDE} addrgenmode none; ip link set nowhere addrgenmode none
                ip link set {OUTSIDE} up; ip link set nowhere up; ip route add default dev {OUTSIDE}
                hostname {node}
                for file in hosts resolv.conf; do mount --bind {self.folder}/$file /etc/$file; done""",
                inside=pid,
            )

    def packets_to_outside(self) -> int:
        """How many packets the nodes have sent to addresses outside the cluster."""
        total = 0
        for node in self.nodes if self.namespaces else ():
            pid = self.daemons[f"holder {node}"].pid
            done = subprocess.run(["nsenter", f"--target={pid}", "--net", "ip", "-j", "-s", "link", "show", OUTSIDE],
                                  capture_output=True, check=True)  # fmt: skip
            total += json.loads(done.stdout)[0]["stats64"]["tx"]["packets"]
        return total

    # ---- jobs -------------------------------------------------------------------------------------------------------------------

    def run(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command as a person on the login node gives it, in the repository's root."""
        env = {**self.env, **environment}
        return subprocess.run([str(c) for c in command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)

    def which(self, program: str) -> str | None:
        """Where one of SLURM's programs is."""
        return shutil.which(program, path=self.env["PATH"])

    def ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=10).stdout.strip()

    def submit(self, *arguments: str | Path, **environment: str) -> str:
        """sbatch; returns the job's number."""
        done = self.run("sbatch", "--parsable", *arguments, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.ask("scontrol", "-o", "show", "job", job)))

    def wait(self, job: str, *states: str, timeout: float = 120) -> dict[str, str]:
        """Until the job is in one of the states. Fails at once if it has ended in another."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        wanted = set(states)

        def there() -> bool:
            nonlocal found
            found = self.job(job)
            state = found.get("JobState", "")
            if state in ended - wanted:
                raise AssertionError(f"job {job} is {state}, not {' or '.join(states)}:\n{self.log(found)}")
            return state in wanted

        found: dict[str, str] = {}
        wait_until(there, timeout, f"job {job} does not become {' or '.join(states)}", lambda: f"{found}\n{self.log(found)}")
        return found

    @staticmethod
    def log(job: dict[str, str]) -> str:
        """What a job has printed."""
        path = Path(job.get("StdOut", "/nonexistent"))
        return path.read_text(errors="replace") if path.exists() else f"(no log at {path})"

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in sorted((self.folder / "log").iterdir()))


OUTSIDE = "outside"
MUNGE_FILES = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}


def wait_until(there: Any, timeout: float, complaint: str, logs: Any) -> None:
    """Poll; raises TimeoutError, with the logs, when the time is over."""
    deadline = time.monotonic() + timeout
    while not there():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{complaint} within {timeout:g} s\n{logs()}")
        time.sleep(0.1)


def write_lines(path: Path, *lines: str) -> None:
    path.write_text("\n".join(lines) + "\n")


def free_ports(count: int) -> int:
    """The first of so many free ports in a row, below those that the kernel gives out."""
    for _ in range(100):
        base = random.randrange(30000, 32700 - count)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(base, base + count):
                stack.enter_context(socket.socket()).bind(("", port))
            return base
    raise CannotStart(f"no {count} free ports in a row between 30000 and 32700")


def shell(script: str, inside: int | None = None) -> None:
    enter = ["nsenter", f"--target={inside}", "--net", "--uts", "--mount"] if inside else []
    done = subprocess.run([*enter, "sh", "-ec", script], capture_output=True, text=True)
    if done.returncode != 0:
        raise CannotStart(f"`{script}`: {done.stderr.strip()}")


def end(process: subprocess.Popen[bytes]) -> None:
    """TERM, and KILL if that does not help within seconds."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def start(namespaces: bool) -> Cluster:
    """A running cluster, with namespaces if they are wanted and this machine has them; stop() ends it. Raises CannotStart."""
    programs = packages()
    if namespaces and why_no_namespaces() is None:
        with contextlib.suppress(CannotStart):
            return Cluster(programs, namespaces=True).__enter__()
    return Cluster(programs, namespaces=False).__enter__()


if __name__ == "__main__":
    try:
        unpack()
    except CannotStart as why:
        sys.exit(f"the tests on SLURM will skip: {why}")
