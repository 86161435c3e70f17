"""Which job this process belongs to: by LLMJAX_* variables, a Slurm step, a TPU slice, or none."""

from collections.abc import Callable, Mapping
import dataclasses
import glob
import importlib.util
import ipaddress
import re
import socket
from typing import Any
import urllib.error
import urllib.request

from llmjax.errors import UserError

TPU_PORT = 8482  # the port that JAX takes for the coordinator on TPUs
SLURM_PORTS = (61440, 4096)  # first port and their number: above the ports that Linux gives to outgoing connections
METADATA_HOST = "metadata.google.internal"
_METADATA_ATTEMPTS, _METADATA_SECONDS, _METADATA_BYTES = 3, 5.0, 1 << 20

Environment = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Job:
    """A job of one or more processes, as one of them sees it.

    source              how the job was found; "" for a process alone, with no trace of a cluster
    coordinator         host:port at which process 0 listens; "" for a job of one process
    local_device_ids    the GPUs of this process, as indices of those it sees; None: all of them
    """

    source: str
    coordinator: str = ""
    num_processes: int = 1
    process_id: int = 0
    local_device_ids: tuple[int, ...] | None = None

    def __str__(self) -> str:
        if self.num_processes == 1:
            return f"one process: {self.source}"
        return f"job of {self.num_processes} processes: {self.source}, coordinator {self.coordinator}"


def find_job(environment: Environment, read_metadata: Callable[[str], str] | None = None) -> Job:
    """The job that the environment describes.

    In this order: LLMJAX_COORDINATOR, LLMJAX_NUM_PROCESSES and LLMJAX_PROCESS_ID, which flags of the command line set
    (where LLMJAX_LOCAL_PROCESSES of them run on each host, they divide its GPUs);
    a step of several tasks that srun started; a TPU slice on GKE; a TPU slice on Compute Engine; this process alone.
    With LLMJAX_DISTRIBUTED=off only the first counts.

    read_metadata   the value of an attribute of this instance on Compute Engine, "" where it is absent; None: this host
                    has no TPU

    Raises UserError for incomplete or malformed variables, and for a loopback coordinator in a job of several hosts.
    """
    job = _from_variables(environment)
    setting = environment.get("LLMJAX_DISTRIBUTED")
    if setting not in (None, "off"):
        raise UserError(
            f"LLMJAX_DISTRIBUTED={setting!r}: unset it to detect a Slurm step or a TPU slice, or set it to 'off'"
        )
    if job is None and setting == "off":
        job = Job("LLMJAX_DISTRIBUTED=off")
    job = job or _from_slurm(environment) or _from_gke(environment)
    if job is None and read_metadata is not None:
        job = _from_compute_engine(environment, read_metadata)
    return job or Job("")


def read_number(environment: Environment, variable: str, default: int | None = None, least: int = 1) -> Any:
    """The integer in an environment variable, `default` where it is not set. Raises UserError below `least`."""
    text = environment.get(variable)
    if text is None:
        return default
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{variable}={text!r}: expected an integer, {least} or more")
    return int(text)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[IPv6]:port"."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether an address or name as written (not what it resolves to) is one that no other machine can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in ("localhost", "localhost.localdomain", "ip6-localhost")


def _from_variables(environment: Environment) -> Job | None:
    coordinator = environment.get("LLMJAX_COORDINATOR")
    count = read_number(environment, "LLMJAX_NUM_PROCESSES")
    index = read_number(environment, "LLMJAX_PROCESS_ID", least=0)
    is_set = (coordinator is not None, count is not None, index is not None)
    if not any(is_set):
        return None
    if not all(is_set) or coordinator is None:
        raise UserError(
            "LLMJAX_COORDINATOR (--coordinator), LLMJAX_NUM_PROCESSES (--num_processes) and LLMJAX_PROCESS_ID "
            "(--process_id) belong together: set all three, or none"
        )
    if not re.fullmatch(r".+:\d+", coordinator) or not 0 < split_address(coordinator)[1] < 65536:
        raise UserError(f"LLMJAX_COORDINATOR={coordinator!r}: expected host:port, the address of process 0")
    if index >= count:
        raise UserError(f"LLMJAX_PROCESS_ID={index}: must be below LLMJAX_NUM_PROCESSES={count}")
    local = read_number(environment, "LLMJAX_LOCAL_PROCESSES", 1)
    if count % local:
        raise UserError(f"LLMJAX_LOCAL_PROCESSES={local}: LLMJAX_NUM_PROCESSES={count} must be a multiple of it")
    hosts = 1 if local == count else _count_hosts(environment)
    if count > 1 and hosts > 1 and is_loopback(split_address(coordinator)[0]):
        raise UserError(
            f"LLMJAX_COORDINATOR={coordinator!r}: the job has {hosts} hosts, and no other host can reach this address; "
            "set it to a name or an address of the host of process 0"
        )
    return Job("LLMJAX_* variables", coordinator, count, index, _share_of_gpus(environment, local, index % local))


def _count_hosts(environment: Environment) -> int:
    """Hosts of the job, by what the cluster says of itself; 1 where it says nothing."""
    names = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    counts = [read_number(environment, name, 1) for name in ("SLURM_STEP_NUM_NODES", "SKYPILOT_NUM_NODES")]
    return max(len(set(names)), *counts)


def _from_slurm(environment: Environment) -> Job | None:
    """A step of several tasks; a Slurm job without one is a process alone, as in a batch script or a shell."""
    if "SLURM_JOB_ID" not in environment:
        return None
    job_id, step = read_number(environment, "SLURM_JOB_ID", least=0), environment.get("SLURM_STEP_ID", "")
    count = read_number(environment, "SLURM_STEP_NUM_TASKS", 1)
    if count == 1 or "SLURM_STEP_NODELIST" not in environment or "SLURM_PROCID" not in environment:
        return Job(f"Slurm job {job_id}, not a step of several tasks; `srun` starts one")
    first_port, ports = SLURM_PORTS
    # Steps that run at the same time need ports of their own.
    port = read_number(environment, "JAX_COORDINATOR_PORT", first_port + (job_id + int(step or 0)) % ports)
    return Job(
        source=f"Slurm step {job_id}.{step} on {environment['SLURM_STEP_NODELIST']}",
        coordinator=f"{first_node(environment['SLURM_STEP_NODELIST'])}:{port}",
        num_processes=count,
        process_id=read_number(environment, "SLURM_PROCID", least=0),
        local_device_ids=_slurm_gpus(environment),
    )


def first_node(nodes: str) -> str:
    """The first host of a list as Slurm writes it, such as "gpu[007-011,020],login1" -> "gpu007"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r}: expected host names")
    return re.sub(r"\[([^,\-\]]+)[^\]]*\]", r"\1", first.group())


def _slurm_gpus(environment: Environment) -> tuple[int, ...] | None:
    """The GPUs of this task among those it sees; None: all of them."""
    on_node = read_number(environment, "SLURM_GPUS_ON_NODE")
    seen = _visible_gpus(environment)
    if seen and on_node and seen < on_node:  # as with --gpus-per-task: each task sees its own GPUs only
        return None
    local = read_number(environment, "SLURM_LOCALID", 0, least=0)
    return _share_of_gpus(environment, _tasks_on_this_node(environment), local, on_node)


def _share_of_gpus(
    environment: Environment, processes: int, local: int, on_host: int | None = None
) -> tuple[int, ...] | None:
    """The GPUs of process `local` of the `processes` on this host, which divide its GPUs; None: all that it sees.

    on_host   GPUs of this host; None: those that CUDA_VISIBLE_DEVICES names, else those in /dev, else one a process

    Raises UserError where the GPUs cannot be divided evenly.
    """
    seen = _visible_gpus(environment)
    if (
        processes == 1
        or seen == 0
        or "JAX_LOCAL_DEVICE_IDS" in environment
        or environment.get("JAX_PLATFORMS") == "cpu"
    ):
        return None
    on_host = on_host or seen or _count_gpus() or processes
    share, rest = divmod(on_host, processes)
    if rest or not share:
        raise UserError(
            f"{processes} processes on this host share {on_host} GPUs: start one process per GPU ({on_host}) or one "
            "per host; under Slurm, --ntasks-per-node is their number"
        )
    return tuple(range(local * share, (local + 1) * share))


def _visible_gpus(environment: Environment) -> int | None:
    """How many GPUs CUDA_VISIBLE_DEVICES or ROCR_VISIBLE_DEVICES lets this process see; None where neither is set."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", environment.get("ROCR_VISIBLE_DEVICES"))
    # Slurm writes NoDevFiles in a job without GPUs.
    return (
        None if visible is None else len([name for name in visible.split(",") if name not in ("", "-1", "NoDevFiles")])
    )


def _count_gpus() -> int:
    """NVIDIA's GPUs of this host."""
    return len(glob.glob("/dev/nvidia[0-9]*"))


def _tasks_on_this_node(environment: Environment) -> int:
    """From SLURM_STEP_TASKS_PER_NODE, such as "2(x3),1", and the index of this node in the step."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "1")):
        counts += [int(count)] * int(times or 1)
    node = read_number(environment, "SLURM_NODEID", 0, least=0)
    return counts[node] if node < len(counts) else 1


def _from_gke(environment: Environment) -> Job | None:
    """A TPU slice whose hosts GKE names in variables of each pod, or several slices that a JobSet connects."""
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if not workers:
        return None
    index = read_number(environment, "TPU_WORKER_ID", least=0)
    if index is None:
        raise UserError("TPU_WORKER_HOSTNAMES is set and TPU_WORKER_ID is not: set both, or LLMJAX_DISTRIBUTED=off")
    return _tpu_job("TPU slice of GKE", workers.split(","), index, environment.get)


def _from_compute_engine(environment: Environment, read_metadata: Callable[[str], str]) -> Job | None:
    """A TPU slice whose hosts are TPU VMs; the metadata server of each names all of them."""
    index = read_metadata("agent-worker-number")
    if not index:
        return None
    # Host names, or triples name:index:address.
    workers = [endpoint.split(":")[-1] for endpoint in read_metadata("worker-network-endpoints").split(",")]
    described = dict(re.findall(r"(?m)^\s*(\w+)\s*:\s*'?([^'\n]*)'?\s*$", read_metadata("tpu-env")))
    return _tpu_job("TPU VMs", workers, int(index), {**described, **environment}.get)


def _tpu_job(kind: str, workers: list[str], index: int, get: Callable[[str], str | None]) -> Job | None:
    """One slice, or the slices that MEGASCALE_* variables describe: they are numbered slice by slice."""
    names = {name: text for name in ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID") if (text := get(name))}
    slices = read_number(names, "MEGASCALE_NUM_SLICES", 1)
    slice_id = read_number(names, "MEGASCALE_SLICE_ID", 0, least=0)
    if index >= len(workers) or slice_id >= slices:
        raise UserError(
            f"{kind}: host {index} of {len(workers)} in slice {slice_id} of {slices} cannot be: check TPU_WORKER_ID, "
            "TPU_WORKER_HOSTNAMES, MEGASCALE_SLICE_ID and MEGASCALE_NUM_SLICES, or set LLMJAX_DISTRIBUTED=off"
        )
    if len(workers) * slices == 1:
        return None
    coordinator = (get("MEGASCALE_COORDINATOR_ADDRESS") if slices > 1 else None) or workers[0]
    return Job(
        source=f"{kind}, {slices} slice{'s' if slices > 1 else ''} of {len(workers)} hosts",
        coordinator=f"{coordinator.split(':')[0]}:{get('JAX_COORDINATOR_PORT') or TPU_PORT}",
        num_processes=len(workers) * slices,
        process_id=slice_id * len(workers) + index,
    )


def has_tpu() -> bool:
    """Whether this host has TPU chips, or other devices that look like them."""
    return any(glob.glob(pattern) for pattern in ("/dev/accel*", "/dev/vfio/[0-9]*"))


def metadata_reader(environment: Environment) -> Callable[[str], str] | None:
    """What reads attributes of this instance on Compute Engine; None where they can't describe a TPU slice."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if "TPU_SKIP_MDS_QUERY" in environment or (platforms and "tpu" not in platforms):
        return None
    if importlib.util.find_spec("libtpu") is None or not has_tpu():
        return None
    host = environment.get("GCE_METADATA_IP", METADATA_HOST)
    return lambda attribute: read_instance_metadata(f"attributes/{attribute}", host)


def request_instance_metadata(path: str, host: str) -> str:
    """`instance/PATH` of the metadata server of Compute Engine, asked once. Raises OSError where it gives none."""
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/{path}", headers={"Metadata-Flavor": "Google"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this host's own link
    with opener.open(request, timeout=_METADATA_SECONDS) as answer:
        return answer.read(_METADATA_BYTES).decode(errors="replace")


def read_instance_metadata(path: str, host: str = METADATA_HOST) -> str:
    """`instance/PATH` of Compute Engine's metadata server; "" where it is absent or this is no such instance.

    Raises TimeoutError where the server exists and does not answer.
    """
    reason = ""
    for _ in range(_METADATA_ATTEMPTS):
        try:
            return request_instance_metadata(path, host)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return ""
            reason = str(error)
        except OSError as error:
            if isinstance(getattr(error, "reason", error), socket.gaierror):  # unknown outside Compute Engine
                return ""
            reason = str(error)
    raise TimeoutError(
        f"the metadata server at {host} does not give instance/{path} ({reason}): set LLMJAX_COORDINATOR, "
        "LLMJAX_NUM_PROCESSES and LLMJAX_PROCESS_ID, or LLMJAX_DISTRIBUTED=off"
    )
