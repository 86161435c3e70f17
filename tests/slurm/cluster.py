"""A real Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd, each ended by its own pid.

Nothing is installed and no file of the system is changed. The daemons run in mount namespaces of their own, in which
/etc/hosts has the names of the nodes.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare")
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
CONFIG = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmctldPort={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerParameters=sched_interval=1,bf_interval=1
GresTypes=gpu
MpiDefault=none
ReturnToService=2
KillWait=10
MessageTimeout=60
SlurmdParameters=config_overrides
SlurmctldParameters=enable_configless
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=2000 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=2000 Gres=gpu:2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""


MUNGE_FILES = {
    "socket": "munge.socket",
    "key-file": "munge.key",
    "pid-file": "munged.pid",
    "seed-file": "munge.seed",
    "log-file": "munged.log",
}


def why_not() -> str:
    """Why a cluster can't run here; "" where it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "Slurm's daemons need Linux and root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install --no-install-recommends slurm-wlm munge"
    return "" if subprocess.run(["unshare", "-m", "true"], check=False).returncode == 0 else "no mount namespaces"


def search_path() -> str:
    """PATH with the folders of daemons."""
    return f"{os.environ['PATH']}:{SBIN}"


def free_ports(count: int) -> list[int]:
    """Different free ports."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


class Cluster:
    """Two nodes, n1 and n2. A context manager."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.environment = {**os.environ, "PATH": search_path(), "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Cluster":
        host = socket.gethostname()
        (self.folder / "slurm.conf").write_text(
            CONFIG.format(folder=self.folder, ports=free_ports(3), host=host.partition(".")[0])
        )
        # Slurm allocates these devices as GPUs, and sets the variables of each task. It opens none.
        devices = "".join(f"NodeName=n[1-2] Name=gpu File={device}\n" for device in ("/dev/null", "/dev/zero"))
        (self.folder / "gres.conf").write_text(devices)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost n1 n2 {host}\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (self.folder / "state").mkdir()
        try:
            files = [f"--{name}={self.folder / file}" for name, file in MUNGE_FILES.items()]
            self._start("munged", "--foreground", "--force", *files)
            self._wait_until(lambda: (self.folder / "munge.socket").exists(), "munged")
            self._start("slurmctld", "-D")
            for node in ("n1", "n2"):
                self._start("slurmd", "-D", "-N", node)
            self._wait_until(self.is_idle, "both nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start(self, *command: str) -> None:
        """Start a daemon in the foreground. `unshare` and `sh` replace themselves by it, so the pid is its own."""
        with open(self.folder / f"{pathlib.Path(command[0]).name}.out", "ab") as out:
            daemon = subprocess.Popen(
                [
                    "unshare",
                    "-m",
                    "sh",
                    "-c",
                    'mount --bind "$0" /etc/hosts && exec "$@"',
                    self.folder / "hosts",
                    *command,
                ],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self._daemons.append(daemon)

    def _wait_until(self, is_reached, what: str) -> None:
        deadline = time.monotonic() + 60
        while not is_reached():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self._daemons):
                logs = "".join(
                    f"{path.name}:\n{path.read_text()[-3000:]}\n" for path in self.folder.glob("*.[ol][ou][tg]")
                )
                raise RuntimeError(f"{what} did not start:\n{logs}")
            time.sleep(0.2)

    def run(self, *command: str) -> str:
        """The output of a client command of Slurm."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False, cwd=self.folder
        )
        assert done.returncode == 0 or command[0] == "sinfo", f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def is_idle(self) -> bool:
        """Whether no job runs or ends on the nodes."""
        return self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2"

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        shown = self.run("scontrol", "show", "job", "-o", job_id)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)
