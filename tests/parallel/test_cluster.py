"""Which job an environment describes, without processes: variables, Slurm steps, TPU slices, and what is refused."""

import http.server
import re
import threading

import pytest

from llmjax.errors import UserError
from llmjax.parallel import cluster
from llmjax.parallel.cluster import Job, find_job, first_node, read_instance_metadata

EXPLICIT = {"LLMJAX_COORDINATOR": "a:1", "LLMJAX_NUM_PROCESSES": "2", "LLMJAX_PROCESS_ID": "1"}
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}
GKE = {"TPU_WORKER_HOSTNAMES": "job-0.svc,job-1.svc", "TPU_WORKER_ID": "1"}
SLICES = {
    "MEGASCALE_NUM_SLICES": "3",
    "MEGASCALE_SLICE_ID": "2",
    "MEGASCALE_COORDINATOR_ADDRESS": "job-slice0-0.svc:8080",
}


def test_the_first_of_variables_slurm_and_tpu_counts():
    everything = {**EXPLICIT, **SLURM, **GKE}
    assert find_job(everything) == Job("LLMJAX_* variables", "a:1", 2, 1)
    assert find_job({**SLURM, **GKE}).source == "Slurm step 4097.2 on gpu[07-08]"
    assert find_job(GKE).source == "TPU slice of GKE, 1 slice of 2 hosts"
    assert find_job({}) == Job("")


def test_one_process_by_variables_is_not_overruled_by_a_slurm_step():
    job = find_job({**SLURM, **EXPLICIT, "LLMJAX_NUM_PROCESSES": "1", "LLMJAX_PROCESS_ID": "0"})
    assert job.num_processes == 1


def test_detection_can_be_switched_off():
    job = find_job({**SLURM, **GKE, "LLMJAX_DISTRIBUTED": "off"})
    assert str(job) == "one process: LLMJAX_DISTRIBUTED=off"
    assert find_job({**EXPLICIT, "LLMJAX_DISTRIBUTED": "off"}).num_processes == 2


def test_a_slurm_step_of_several_tasks():
    job = find_job(SLURM)
    assert (job.coordinator, job.num_processes, job.process_id) == ("gpu07:61443", 4, 3)
    assert str(job) == "job of 4 processes: Slurm step 4097.2 on gpu[07-08], coordinator gpu07:61443"
    assert find_job({**SLURM, "SLURM_STEP_ID": "3"}).coordinator == "gpu07:61444"
    assert find_job({**SLURM, "JAX_COORDINATOR_PORT": "7"}).coordinator == "gpu07:7"


@pytest.mark.parametrize("changes", [{"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_NODELIST": None}])
def test_a_slurm_job_without_a_step_of_several_tasks_is_one_process(changes):
    variables = {name: text for name, text in {**SLURM, **changes}.items() if text}
    assert str(find_job(variables)) == "one process: Slurm job 4097, not a step of several tasks; `srun` starts one"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[007-011,020],login1", "gpu007"),
        ("a-b[3,5-6]", "a-b3"),
        ("rack[1-2]node[05-06]", "rack1node05"),
        ("rack[1-2]-x,y", "rack1-x"),
    ],
)
def test_the_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first


@pytest.mark.parametrize(
    ("changes", "gpus"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, None),  # the task has all GPUs of its node
        ({}, (1,)),  # their number is unknown: one per task
        ({"SLURM_GPUS_ON_NODE": "8"}, (4, 5, 6, 7)),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, (1,)),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"}, (2, 3)),
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "2"}, None),  # Slurm has chosen: --gpus-per-task
        ({"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b,MIG-c,MIG-d"}, (2, 3)),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, None),  # a job without GPUs
        ({"JAX_LOCAL_DEVICE_IDS": "0"}, None),
        ({"SLURM_GPUS_ON_NODE": "3", "JAX_PLATFORMS": "cpu"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,4", "SLURM_LOCALID": "3", "SLURM_GPUS_ON_NODE": "4"}, (3,)),
    ],
)
def test_slurm_tasks_of_a_node_share_its_gpus(changes, gpus):
    assert find_job({**SLURM, **changes}).local_device_ids == gpus


@pytest.mark.parametrize("option", [{}, {"SLURM_GPUS_ON_NODE": "8"}, {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}])
@pytest.mark.parametrize("tasks", [1, 2, 4, 8])
def test_the_tasks_of_a_slurm_node_take_each_gpu_once(monkeypatch, tasks, option):
    """Two nodes of eight GPUs, with the variables that Slurm sets for each task of a step."""
    monkeypatch.setattr(cluster, "_count_gpus", lambda: 8)
    for node in range(2):
        taken = []
        for local in range(tasks):
            variables = {
                **SLURM,
                "SLURM_STEP_NUM_TASKS": str(2 * tasks),
                "SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x2)",
                "SLURM_PROCID": str(node * tasks + local),
                "SLURM_NODEID": str(node),
                "SLURM_LOCALID": str(local),
            }
            ids = find_job({**variables, **option}).local_device_ids
            taken += range(8) if ids is None else ids
        assert sorted(taken) == list(range(8))


@pytest.mark.parametrize(("local", "gpus"), [(2, [(0, 1), (2, 3)] * 2), (4, [(0,), (1,), (2,), (3,)]), (1, [None] * 4)])
def test_processes_of_a_host_share_its_gpus(monkeypatch, local, gpus):
    """As launch/local.py starts them, or another launcher on several hosts."""
    monkeypatch.setattr(cluster, "_count_gpus", lambda: 4)
    variables = {**EXPLICIT, "LLMJAX_NUM_PROCESSES": "4", "LLMJAX_LOCAL_PROCESSES": str(local)}
    jobs = [find_job({**variables, "LLMJAX_PROCESS_ID": str(index)}) for index in range(4)]
    assert [job.local_device_ids for job in jobs] == gpus


def test_gke_slices_are_numbered_one_after_the_other():
    assert find_job(GKE) == Job("TPU slice of GKE, 1 slice of 2 hosts", "job-0.svc:8482", 2, 1)
    job = find_job({**GKE, **SLICES})
    assert job == Job("TPU slice of GKE, 3 slices of 2 hosts", "job-slice0-0.svc:8482", 6, 5)
    assert find_job({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) == Job("")
    assert find_job({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", **SLICES}).process_id == 2


@pytest.mark.parametrize("endpoints", ["w-0,w-1,w-2,w-3", "a:0:w-0,a:1:w-1,a:2:w-2,a:3:w-3"])
def test_tpu_vms_are_described_by_their_metadata(endpoints):
    metadata = {"agent-worker-number": "2", "worker-network-endpoints": endpoints, "tpu-env": "ZONE: 'here'\n"}
    job = find_job({}, lambda name: metadata.get(name, ""))
    assert job == Job("TPU VMs, 1 slice of 4 hosts", "w-0:8482", 4, 2)
    metadata["tpu-env"] = "".join(f"{name}: '{text}'\n" for name, text in SLICES.items())
    assert find_job({}, metadata.__getitem__) == Job("TPU VMs, 3 slices of 4 hosts", "job-slice0-0.svc:8482", 12, 10)
    assert find_job({}, lambda name: "") == Job("")


def test_the_metadata_server_is_asked_for_attributes():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.headers["Metadata-Flavor"] == "Google" and self.path.endswith("/instance/attributes/known")
            self.send_response(200 if known else 503 if self.path.endswith("broken") else 404)
            self.end_headers()
            self.wfile.write(b"value" if known else b"")

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        assert read_instance_metadata("attributes/known", host) == "value"
        assert read_instance_metadata("attributes/absent", host) == ""
        with pytest.raises(TimeoutError, match="does not give instance/attributes/broken"):
            read_instance_metadata("attributes/broken", host)
        server.shutdown()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LLMJAX_COORDINATOR": "h:1"}, "belong together: set all three"),
        ({"LLMJAX_NUM_PROCESSES": "2", "LLMJAX_PROCESS_ID": "0"}, "belong together: set all three"),
        ({"LLMJAX_NUM_PROCESSES": "two"}, "LLMJAX_NUM_PROCESSES='two': expected an integer, 1 or more"),
        ({"LLMJAX_PROCESS_ID": "-1"}, "LLMJAX_PROCESS_ID='-1': expected an integer, 0 or more"),
        ({"LLMJAX_DISTRIBUTED": "auto"}, "LLMJAX_DISTRIBUTED='auto': unset it to detect a Slurm step or a TPU slice"),
        ({**EXPLICIT, "LLMJAX_COORDINATOR": "h"}, "LLMJAX_COORDINATOR='h': expected host:port"),
        ({**EXPLICIT, "LLMJAX_COORDINATOR": "h:70000"}, "LLMJAX_COORDINATOR='h:70000': expected host:port"),
        ({**EXPLICIT, "LLMJAX_PROCESS_ID": "2"}, "LLMJAX_PROCESS_ID=2: must be below LLMJAX_NUM_PROCESSES=2"),
        ({**SLURM, "SLURM_GPUS_ON_NODE": "3"}, "2 processes on this host share 3 GPUs"),
        ({**EXPLICIT, "LLMJAX_LOCAL_PROCESSES": "3"}, "LLMJAX_NUM_PROCESSES=2 must be a multiple of it"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_ID is not"),
        ({**GKE, "TPU_WORKER_ID": "2"}, "host 2 of 2 in slice 0 of 1 cannot be"),
        ({**GKE, "MEGASCALE_NUM_SLICES": "many"}, "MEGASCALE_NUM_SLICES='many': expected an integer"),
    ],
)
def test_bad_variables_are_refused(variables, message):
    with pytest.raises(UserError, match=re.escape(message)):
        find_job(variables)


@pytest.mark.parametrize("coordinator", ["127.0.0.1:1", "localhost:1", "[::1]:1", "127.0.1.1:1"])
@pytest.mark.parametrize("cluster", [{"SLURM_STEP_NUM_NODES": "2"}, {"SKYPILOT_NUM_NODES": "2"}, GKE])
def test_a_loopback_coordinator_is_refused_in_a_job_of_several_hosts(coordinator, cluster):
    variables = {**EXPLICIT, "LLMJAX_COORDINATOR": coordinator}
    with pytest.raises(UserError, match="the job has 2 hosts, and no other host can reach this address"):
        find_job({**variables, **cluster})
    assert find_job(variables).coordinator == coordinator
    assert find_job({**variables, **cluster, "LLMJAX_LOCAL_PROCESSES": "2"}).coordinator == coordinator
